"""Text from a model, one token after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_moe.train.restore import RestoredRun


def generate(
    run: RestoredRun, prompt: list[int], *, vocab_size: int, temperature: float, top_p: float, seed: int
) -> Iterator[int]:
    """Token ids that follow a prompt, without end. The whole context is computed for each: there is no cache.

    Args:
        run: restored.
        prompt: ids, at least one; of a longer context the last `data.sequence_length` ids count.
        vocab_size: ids that may come, of the tokenizer; a model may have more.
        temperature: 0 takes the likeliest token, 1 samples as the model predicts.
        top_p: sample among the likeliest tokens that make up this share of the probability.
        seed: of the samples.
    """
    generator = torch.Generator(run.device).manual_seed(seed)
    context = list(prompt)
    while True:
        window = torch.tensor([context[-run.config.data.sequence_length :]], device=run.device)
        logits = run.logits(window)[0, -1, :vocab_size].float()
        context.append(next_token(logits, temperature=temperature, top_p=top_p, generator=generator))
        yield context[-1]


def next_token(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose a token, of logits [vocab_size]; the likeliest at temperature 0.

    Source of top-p: nucleus sampling, arXiv:1904.09751, 3.1.
    """
    if temperature == 0:
        return int(logits.argmax())
    probs, tokens = (logits / temperature).softmax(dim=-1).sort(descending=True)
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill(before >= top_p, 0.0)  # the likeliest always stays
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])
