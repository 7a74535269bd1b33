"""What a model's experts are worth, and what they take: section 4.5 of the DeepSeekMoE paper on a trained run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_moe.config.derived import experts_within_reach
from megatron_moe.config.schema import Routing
from megatron_moe.data.dataset import SequenceDataset
from megatron_moe.plan.params import activated_params, total_params
from megatron_moe.train.evaluate import held_out_loss
from megatron_moe.train.restore import RestoredRun
from megatron_moe.train.step import Pipeline

MASKED_SIXTEENTHS = range(5)  # arXiv:2401.06066, figure 4: 0 to 4/16 of the routed experts


@contextmanager
def altered(
    pipeline: Pipeline, *, num_masked: int = 0, topk: int | None = None, without_shared: bool = False
) -> Iterator[None]:
    """Route differently for a while. Gates are not renormalized.

    Args:
        pipeline: with learned routers.
        num_masked: experts of the highest affinity that each token is kept from.
        topk: routed experts per token; None: as trained.
        without_shared: leave out the shared experts.
    """
    layers = [module for chunk in pipeline.model for module in chunk.modules() if isinstance(module, MoELayer)]
    before = [(layer.router.topk, layer.use_shared_expert) for layer in layers]
    for layer, (trained_topk, has_shared) in zip(layers, before, strict=True):
        _set(layer, num_masked, topk or trained_topk, has_shared and not without_shared)
    try:
        yield
    finally:
        for layer, (trained_topk, has_shared) in zip(layers, before, strict=True):
            _set(layer, 0, trained_topk, has_shared)


def _set(layer: MoELayer, num_masked: int, topk: int, use_shared_expert: bool) -> None:
    layer.router.selection.num_masked = num_masked
    layer.router.topk = layer.config.moe_router_topk = topk  # the dispatcher reads the latter
    layer.use_shared_expert = use_shared_expert


@contextmanager
def recorded(pipeline: Pipeline) -> Iterator[list[Tensor]]:
    """Yields, for each MoE layer, how many tokens select both of two experts, [num_experts, num_experts] float64.

    The diagonal is the load of each expert.
    """
    counts = [torch.zeros((), dtype=torch.float64) for _ in pipeline.routers]

    def count(layer: int, _router: torch.nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
        selected = output[1].float()  # [t, e]
        counts[layer] = counts[layer] + (selected.T @ selected).double().cpu()

    hooks = [router.register_forward_hook(partial(count, layer)) for layer, router in enumerate(pipeline.routers)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def analyze(run: RestoredRun, sources: Mapping[str, SequenceDataset], num_samples: int) -> dict[str, Any]:
    """Everything `tools/analyze_experts.py` reports of one run, as JSON values.

    Args:
        run: restored.
        sources: held-out sequences by name.
        num_samples: sequences of each source; rounded up to whole micro batches.
    """
    model = run.config.model
    num_samples += -num_samples % run.pipeline.micro_batch_size
    report: dict[str, Any] = {
        "run": str(run.folder),
        "model": model.name,
        "checkpoint": run.checkpoint.name,
        "parameters": total_params(model),
        "activated_parameters": activated_params(model),
        "num_samples": num_samples,
        "moe_layers": list(range(model.num_dense_layers, model.num_layers)),
        "sources": {name: _of_source(run, data, num_samples) for name, data in sources.items()},
    }
    report["loss"] = _mean(source["loss"] for source in report["sources"].values())
    if model.num_experts and model.routing is Routing.topk:
        report |= _interventions(run, sources, num_samples)
    return report


def _of_source(run: RestoredRun, data: SequenceDataset, num_samples: int) -> dict[str, Any]:
    """Loss, digest of the tokens; for each MoE layer the load over the mean and P(column selected | row selected)."""
    with recorded(run.pipeline) as counts:
        loss = _loss(run, data, num_samples)
    digest = hashlib.sha256()
    for index in range(num_samples):
        digest.update(data[index].tobytes())
    return {
        "loss": loss,
        "digest": digest.hexdigest(),
        "expert_load": [_rounded(c.diagonal() / c.diagonal().mean()) for c in counts],
        "co_activation": [_rounded(c / c.diagonal()[:, None].clamp(min=1)) for c in counts],
    }


def _interventions(run: RestoredRun, sources: Mapping[str, SequenceDataset], num_samples: int) -> dict[str, Any]:
    model = run.config.model
    within_reach = experts_within_reach(model)

    def loss(**changes: Any) -> float:
        with altered(run.pipeline, **changes):
            return _mean(_loss(run, data, num_samples) for data in sources.values())

    masked = {f"{i}/16": round(i / 16 * model.num_experts) for i in MASKED_SIXTEENTHS}
    possible = {name: count for name, count in masked.items() if within_reach - count >= model.router_topk}
    result: dict[str, Any] = {
        "masked_experts": possible,
        "loss_by_masked_fraction": {name: loss(num_masked=count) for name, count in possible.items()},
        "loss_by_topk": {str(k): loss(topk=k) for k in range(max(1, model.router_topk // 2), model.router_topk + 1)},
    }
    replaced = model.router_topk + model.num_shared_experts
    if model.num_shared_experts and replaced <= within_reach:
        result["loss_with_routed_for_shared"] = loss(without_shared=True, topk=replaced)
    return result


def _loss(run: RestoredRun, data: SequenceDataset, num_samples: int) -> float:
    return held_out_loss(run.pipeline, data, num_samples, run.config.data, run.device)


def _mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _rounded(values: Tensor) -> Any:
    return values.double().round(decimals=4).tolist()
