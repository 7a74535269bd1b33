"""Which layers and experts lie on which rank. Pure; equal to megatron-core's groups (tests/distributed)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.derived import data_parallel_size, expert_tensor_parallel_size, is_moe_layer
from megatron_moe.config.schema import ModelConfig, ParallelConfig
from megatron_moe.plan.pipeline import layers_of_stage


@dataclass(frozen=True)
class Placement:
    """Ranks that hold the same layers and the same routed experts of them.

    Attributes:
        ranks: global ranks.
        stage: pipeline rank.
        layers: layer numbers from 0, one list per virtual stage.
        experts: routed experts of each MoE layer; None where the stage has no MoE layer.
    """

    ranks: list[int]
    stage: int
    layers: list[list[int]]
    experts: range | None

    def describe(self, model: ModelConfig) -> tuple[str, str, str]:
        """Ranks, layers and experts as text: layers as 'dense 0, MoE 1-5', virtual stages separated by '|'."""
        experts = "none" if self.experts is None else _span(self.experts[0], self.experts[-1])
        layers = " | ".join(_layer_text(model, chunk) for chunk in self.layers)
        return ", ".join(_spans(self.ranks)), layers, experts


def describe_layout(parallel: ParallelConfig, world_size: int) -> str:
    """Ranks and the sizes of their groups as text."""
    return (
        f"{world_size} ranks: tensor {parallel.tensor_model_parallel_size}, pipeline "
        f"{parallel.pipeline_model_parallel_size} x {parallel.virtual_pipeline_model_parallel_size} virtual, "
        f"context {parallel.context_parallel_size}, data {data_parallel_size(parallel, world_size)}, expert "
        f"{parallel.expert_model_parallel_size} x {expert_tensor_parallel_size(parallel)} tensor"
    )


def placements(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> list[Placement]:
    """One entry per pipeline stage and expert-parallel rank.

    Source of the rank order (tensor, expert, data, pipeline; fastest first): mcore 0.16.1, parallel_state.py,
    initialize_model_parallel, order "tp-cp-ep-dp-pp".
    """
    stages, expert_ranks = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    ranks_per_stage = world_size // stages
    experts_per_rank = model.num_experts // expert_ranks
    result = []
    for stage in range(stages):
        layers = layers_of_stage(model, parallel, stage)
        has_experts = any(is_moe_layer(model, layer) for chunk in layers for layer in chunk)
        for expert_rank in range(expert_ranks):
            first = expert_rank * experts_per_rank
            result.append(
                Placement(
                    ranks=[
                        stage * ranks_per_stage + rank
                        for rank in range(ranks_per_stage)
                        if rank // expert_tensor_parallel_size(parallel) % expert_ranks == expert_rank
                    ],
                    stage=stage,
                    layers=layers,
                    experts=range(first, first + experts_per_rank) if has_experts else None,
                )
            )
    return result


def _layer_text(model: ModelConfig, layers: list[int]) -> str:
    moe = [layer for layer in layers if is_moe_layer(model, layer)]
    dense = [layer for layer in layers if layer not in moe]
    parts = [f"{kind} {_span(some[0], some[-1])}" for kind, some in (("dense", dense), ("MoE", moe)) if some]
    return ", ".join(parts)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _spans(numbers: list[int]) -> list[str]:
    """[0, 1, 2, 5] as '0-2' and '5'."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return [_span(first, last) for first, last in spans]
