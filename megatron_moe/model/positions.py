"""Rotary positions that count from the beginning of a document."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_moe.model.micro_batch import OfMicroBatch


class PositionIds(torch.nn.Module):
    """Makes a model rotate by the position ids of its micro batch, which megatron-core takes for 0, 1, 2, ...

    It hooks into the rotary embeddings: they yield those of the whole sequence, [s, 1, 1, d], and it picks
    [s, b, 1, d], with this rank's part of s under context parallelism.
    """

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self.position_ids = OfMicroBatch()
        for module in model.modules():
            if isinstance(module, RotaryEmbedding):
                module.register_forward_pre_hook(_of_whole_sequence, with_kwargs=True)
                module.register_forward_hook(self._pick)

    def begin_micro_batch(self, batch: dict[str, Tensor]) -> None:
        """Take the position ids, [b, s]."""
        self.position_ids.begin(batch["position_ids"])

    def _pick(self, _: torch.nn.Module, args: tuple, output: Tensor | tuple[Tensor, float]) -> Any:
        whole, *factor = output if isinstance(output, tuple) else (output,)  # YaRN has a factor
        picked = whole[:, 0, 0][self.position_ids.get(training=self.training).T].unsqueeze(2)
        return (picked, *factor) if factor else picked


def _of_whole_sequence(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "packed_seq": True}  # its name for: not this rank's part only
