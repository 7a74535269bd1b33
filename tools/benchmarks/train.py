"""Training steps beside transformers and plain megatron-core: the same sizes, tokens and optimizer, on one process."""

from __future__ import annotations

import functools
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

Step = Callable[[], None]
CONTENDER = "ours"  # beside which the others are put
WARM_UP = 12  # steps, in which memory grows and oneDNN compiles what it meets
MATRIX = 2048  # rows and columns of the product whose rate is the yardstick
SIZES = {
    "nano": "model=deepseekmoe_nano data.sequence_length=128 train.micro_batch_size=8",
    "small": (
        "model=deepseekmoe_nano model.num_layers=6 model.num_dense_layers=0 model.hidden_size=512 "
        "model.num_attention_heads=8 model.kv_channels=64 model.expert_ffn_hidden_size=176 "
        "data.sequence_length=512 train.micro_batch_size=4"
    ),
    "slice_2b": "model=deepseekmoe_2b model.num_layers=2 data.sequence_length=512 train.micro_batch_size=4",
    "slice_16b": (
        "model=deepseekmoe_16b model.num_layers=1 model.num_dense_layers=0 model.vocab_size=8192 "
        "data.sequence_length=512 train.micro_batch_size=4"
    ),
}
# Without device-level balance, which transformers does not have, and with a batch of one micro batch.
ALIKE = (
    "data=mock run.dir=without_a_run model.device_balance_factor=0 model.num_device_groups=null "
    "train.global_batch_size=${train.micro_batch_size} optimizer.lr=1e-4"
)


def measure(contender: str, size: str, precision: str, steps: int) -> dict[str, float]:
    """Seconds of a step, peak memory and the rate of a large product, in a process of its own.

    Returns:
        `median`, `fastest` and `slowest` step in seconds, `tokens` of a step, `flops` a token, `gib` at the peak, and
        `product_flops`, the FLOP/s of a large matrix product in the same precision.
    """
    from megatron_moe.config.load import compose_config
    from megatron_moe.distributed.accelerators import quiet
    from megatron_moe.plan.flops import model_flops_per_token

    quiet()
    config = compose_config([*SIZES[size].split(), f"precision={precision}", *ALIKE.split()])
    with CONTENDERS[contender](config) as step:
        seconds = [timed(step) for _ in range(WARM_UP + steps)][WARM_UP:]
    return {
        "median": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "tokens": config.train.micro_batch_size * config.data.sequence_length,
        "flops": model_flops_per_token(config.model, config.data.sequence_length),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "product_flops": product_rate(precision),
    }


def timed(step: Step) -> float:
    """Seconds."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def product_rate(precision: str) -> float:
    """FLOP/s of the fastest of some products."""
    import torch

    matrix = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * MATRIX**3 / min(timed(lambda: matrix @ matrix) for _ in range(10))


@contextmanager
def ours(config: Any) -> Iterator[Step]:
    """Our training step."""
    from megatron_moe.config.validate import validate
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train.loop import next_batches, set_up
    from megatron_moe.train.step import train_step

    validate(config, 1)
    with distributed(config.parallel) as context:
        run = set_up(config, context)
        batches = next_batches(run)
        yield lambda: train_step(run.pipeline, run.optimizer, batches, 1)


@contextmanager
def plain_megatron_core(config: Any) -> Iterator[Step]:
    """The same with megatron-core's own local layers and loss, AdamW as it makes it, and nothing done in place."""
    import torch
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_moe.distributed import in_place
    from megatron_moe.model import build, layer_spec
    from megatron_moe.optim import optimizer

    def prepare(part: Any, prepare: Callable[[Any], None] = optimizer._prepare) -> None:
        prepare(part)
        for group in part.optimizer.param_groups:
            group["fused"] = None

    def their_loss(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
        return vocab_parallel_cross_entropy(logits, labels.contiguous())

    def causal_mask(length: int) -> torch.Tensor:
        return torch.ones(length, length).triu(1).bool()

    with ExitStack() as stack:
        for target, name, value in (
            (in_place, "install", lambda: None),
            (layer_spec, "_replace_local_modules", lambda spec: None),
            (build, "vocab_parallel_cross_entropy", their_loss),
            (optimizer, "_prepare", prepare),
            (fused_softmax, "get_default_causal_mask", functools.cache(causal_mask)),  # theirs is on a GPU
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield stack.enter_context(ours(config))


def transformers_with(experts: str, *, compiled: bool = False) -> Callable[[Any], Any]:
    """DeepSeekMoE in transformers, with one of its implementations of experts and torch's attention."""

    @contextmanager
    def contender(config: Any) -> Iterator[Step]:
        import torch
        from transformers import DeepseekOcr2TextConfig, DeepseekOcr2TextModel

        model = config.model
        dense = model.num_dense_layers
        fields = DeepseekOcr2TextConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            moe_intermediate_size=model.expert_ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            mlp_layer_types=["dense"] * dense + ["sparse"] * (model.num_layers - dense),
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_attention_heads,
            n_routed_experts=model.num_experts,
            n_shared_experts=model.num_shared_experts,
            num_experts_per_tok=model.router_topk,
            norm_topk_prob=False,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            experts_implementation=experts,
        )
        bf16 = config.precision.dtype.value == "bf16"
        layers = DeepseekOcr2TextModel(fields)
        head = torch.nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        parameters = [*layers.parameters(), *head.parameters()]
        adamw = config.optimizer
        betas = (adamw.adam_beta1, adamw.adam_beta2)
        optimizer = torch.optim.AdamW(
            parameters, lr=adamw.lr, betas=betas, eps=adamw.adam_eps, weight_decay=adamw.weight_decay, fused=True
        )

        def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = head(layers(tokens, use_cache=False).last_hidden_state)
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

        compute = torch.compile(loss) if compiled else loss
        generator = torch.Generator().manual_seed(1)

        def step() -> None:
            shape = (config.train.micro_batch_size, config.data.sequence_length + 1)
            tokens = torch.randint(0, model.vocab_size, shape, generator=generator)
            compute(tokens[:, :-1], tokens[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, adamw.clip_grad)
            optimizer.step()
            optimizer.zero_grad()

        yield step

    return contender


CONTENDERS: dict[str, Callable[[Any], Any]] = {
    CONTENDER: ours,
    "megatron-core": plain_megatron_core,
    "transformers, eager": transformers_with("eager"),
    "transformers, grouped_mm": transformers_with("grouped_mm"),
    "transformers, eager, compiled": transformers_with("eager", compiled=True),
    "transformers, grouped_mm, compiled": transformers_with("grouped_mm", compiled=True),
}


def compare(size: str, measured: dict[tuple[str, str], dict[str, float]]) -> list[dict[str, Any]]:
    """Rows of a table: each contender's step, and how many times ours it takes in the same precision."""
    rows = []
    for (contender, precision), found in measured.items():
        speed = found["tokens"] / found["median"]
        share = speed * found["flops"] / found["product_flops"]
        spread = f"{found['fastest']:.3g} to {found['slowest']:.3g}"
        row = {"what": f"step of {size}, {precision}, {contender}", "figure": found["median"], "unit": "s"}
        row["beside"] = f"{spread}; {speed:,.0f} tokens/s; {found['gib']:.2f} GiB; {share:.0%} of a product"
        if beside := measured.get((CONTENDER, precision)):  # else it was killed
            row["ratio"] = found["median"] / beside["median"]
        rows.append({**row, **found})
    return rows
