"""Numbers that follow from the options. Functions, so that none is stored and can disagree. Pure; imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_moe.config.schema import Config, DataSource, ModelConfig, ParallelConfig


def last_step(config: Config) -> int:
    """The step after which a start of the run stops."""
    return config.train.exit_step or config.train.train_steps


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


def batch_size(config: Config, consumed_samples: int) -> int:
    """Sequences of the step after `consumed_samples`: `global_batch_size`, or less while the batch ramps up."""
    train, ramp = config.train, config.train.batch_ramp
    if ramp.start is None:
        return train.global_batch_size
    increments = (train.global_batch_size - ramp.start) // ramp.increment
    done = increments * consumed_samples * config.data.sequence_length // int(ramp.tokens)
    return ramp.start + min(done, increments) * ramp.increment


def samples_before(config: Config, step: int) -> int:
    """Sequences of the first `step` steps."""
    train, ramp = config.train, config.train.batch_ramp
    samples = 0
    while step and (size := batch_size(config, samples)) < train.global_batch_size:
        next_size = (size - ramp.start) // ramp.increment + 1
        per_token = (train.global_batch_size - ramp.start) // ramp.increment * config.data.sequence_length
        reached_at = _divide_up(next_size * int(ramp.tokens), per_token)
        steps = min(step, _divide_up(reached_at - samples, size))
        samples, step = samples + steps * size, step - steps
    return samples + step * train.global_batch_size


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def num_micro_batches(config: Config, world_size: int, consumed_samples: int) -> int:
    """Micro batches a rank runs in the step after `consumed_samples`."""
    sequences_at_once = config.train.micro_batch_size * data_parallel_size(config.parallel, world_size)
    return batch_size(config, consumed_samples) // sequences_at_once


def num_device_groups(model: ModelConfig, parallel: ParallelConfig) -> int:
    """D of the device-level balance loss: as configured, else the expert-parallel ranks."""
    return model.num_device_groups or parallel.expert_model_parallel_size


def experts_within_reach(model: ModelConfig) -> int:
    """Routed experts that a token can select among: those of its devices where these are limited."""
    if model.device_limit is None:
        return model.num_experts
    return model.num_experts * model.device_limit // model.num_device_groups


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    """Whether layer `layer` (from 0) has experts."""
    return layer >= model.num_dense_layers


def source_name(source: DataSource) -> str:
    """What metrics call a source of data."""
    return source.name or Path(source.path).name
