"""Which layers and experts lie on which rank. Pure; equal to megatron-core's groups (tests/distributed)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.derived import expert_tensor_parallel_size, is_moe_layer
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
