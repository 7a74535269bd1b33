"""Numbers that follow from the options. Functions, so that none is stored and can disagree. Pure; imports no torch."""

from __future__ import annotations

from megatron_moe.config.schema import Config, ModelConfig, ParallelConfig


def num_chunks(parallel: ParallelConfig) -> int:
    """Model chunks of the pipeline: stages times virtual stages."""
    return parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the dense parameters: ranks over tensor x pipeline x context."""
    return world_size // model_parallel_size(parallel)


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that hold one replica of the dense parameters (and share its sequences)."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def expert_tensor_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that share one routed expert.

    Without expert parallelism megatron-core 0.16.1 reduces the experts' gradients as those of any other layer, over the
    data-parallel ranks only (tensor_parallel/layers.py:902), so the experts must be cut like any other layer.
    """
    if parallel.expert_tensor_parallel_size is not None:
        return parallel.expert_tensor_parallel_size
    return parallel.tensor_model_parallel_size if parallel.expert_model_parallel_size == 1 else 1


def required_world_size(parallel: ParallelConfig) -> int:
    """The ranks a configuration asks for: given by `data_parallel_size`, else the fewest that hold all experts."""
    if parallel.data_parallel_size is not None:
        return model_parallel_size(parallel) * parallel.data_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * expert_tensor_parallel_size(parallel)
    per_stage = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    replicas = -(-expert_ranks // per_stage)
    while (replicas * per_stage) % expert_ranks:
        replicas += 1
    return model_parallel_size(parallel) * replicas


def num_micro_batches(config: Config, world_size: int) -> int:
    """Micro batches a rank runs per step."""
    sequences_at_once = config.train.micro_batch_size * data_parallel_size(config.parallel, world_size)
    return config.train.global_batch_size // sequences_at_once


def num_device_groups(model: ModelConfig, parallel: ParallelConfig) -> int:
    """D of the device-level balance loss: as configured, else the expert-parallel ranks."""
    return model.num_device_groups or parallel.expert_model_parallel_size


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    """Whether layer `layer` (from 0) has experts."""
    return layer >= model.num_dense_layers
