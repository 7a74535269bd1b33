"""Memory of a rank in closed form. Pure; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.derived import (
    data_parallel_size,
    expert_tensor_parallel_size,
    num_micro_batches,
)
from megatron_moe.config.schema import Config, Dtype, PrecisionConfig
from megatron_moe.plan.activations import activation_bytes
from megatron_moe.plan.params import RankParams, rank_params
from megatron_moe.plan.pipeline import Layers, chunks_by_stage
from megatron_moe.plan.schedule import micro_batches_in_flight


@dataclass(frozen=True)
class StateBytes:
    """Bytes a parameter: of the weight, of its gradient, and of the optimizer's state, which is shared out."""

    weight: int
    gradient: int
    optimizer: int


def state_bytes(precision: PrecisionConfig) -> StateBytes:
    """Of a precision. Weights and moments of the optimizer are fp32, beside those of the model or as these."""
    if precision.dtype is Dtype.fp32:
        return StateBytes(4, 4, 8)
    return StateBytes(2, 4 if precision.grad_reduce_in_fp32 else 2, 12)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the fullest rank of a pipeline stage.

    Attributes:
        weights: of the parameters on the rank.
        gradients: of all of them.
        optimizer: of the rank's share of the state.
        activations: kept for the backward passes of the micro batches in flight, and what one computes again.
        logits: and what their loss keeps.
        dispatch: buffers of one MoE layer's all-to-all and their gradients.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    dispatch: float

    @property
    def static(self) -> float:
        """What is there between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All."""
        return self.static + self.activations + self.logits + self.dispatch


def memory_by_stage(config: Config, world_size: int, *, imbalance: float = 1.0) -> list[StageMemory]:
    """What the fullest rank of each pipeline stage needs, without fragmentation and what libraries take.

    Args:
        config: with a layout that fits `world_size` ranks.
        world_size: of all ranks.
        imbalance: tokens of the rank with the most over their mean over expert-parallel ranks.
    """
    model, parallel = config.model, config.parallel
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    micro_batches = most_micro_batches(config, world_size)
    scale = tokens_of_rank(config) * (2 if config.precision.dtype is Dtype.fp32 else 1)
    chunks_on = chunks_by_stage(model, parallel)
    layers_on = [sum(chunks, Layers(0, 0)) for chunks in chunks_on]
    static = {layers: static_bytes(config, world_size, layers) for layers in set(layers_on)}
    memory = []
    for stage, layers in enumerate(layers_on):
        in_flight = micro_batches_in_flight(stages, stage, virtual, micro_batches)
        kept = activation_bytes(model, config.recompute, chunks_on[stage], in_flight, imbalance=imbalance)
        memory.append(
            StageMemory(
                *static[layers],
                activations=scale * kept,
                logits=scale * layers.head * 6 * model.vocab_size,
                dispatch=scale * bool(layers.moe) * imbalance * 8 * model.router_topk * model.hidden_size,
            )
        )
    return memory


def most_micro_batches(config: Config, world_size: int) -> int:
    """Micro batches a rank runs in a step with the whole batch."""
    return num_micro_batches(config, world_size, config.train.global_batch_size * config.train.train_steps)


def static_bytes(config: Config, world_size: int, layers: Layers) -> tuple[float, float, float]:
    """Bytes of the weights, gradients and share of the optimizer state of a rank with these layers.

    The state is spread over the ranks that hold the same parameters: data- and context-parallel ones, and of routed
    experts those of the same experts.
    """
    state = state_bytes(config.precision)
    params = rank_params(config.model, config.parallel, layers)
    return (
        state.weight * params.total,
        state.gradient * params.total,
        state.optimizer * optimizer_share(config, world_size, params),
    )


def optimizer_share(config: Config, world_size: int, params: RankParams) -> float:
    """Parameters that a rank updates."""
    parallel = config.parallel
    replicas = data_parallel_size(parallel, world_size) * parallel.context_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * expert_tensor_parallel_size(parallel)
    expert_replicas = world_size // parallel.pipeline_model_parallel_size // expert_ranks
    return params.dense / replicas + params.experts / expert_replicas


def tokens_of_rank(config: Config) -> float:
    """Of a micro batch, a tensor- or context-parallel rank's share."""
    parallel = config.parallel
    cut = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return config.train.micro_batch_size * config.data.sequence_length / cut
