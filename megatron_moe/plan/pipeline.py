"""Which layers lie on which pipeline stage. Pure; imports no torch."""

from __future__ import annotations

from megatron_moe.config.schema import Config, ModelConfig, ParallelConfig


def num_chunks(parallel: ParallelConfig) -> int:
    """Model chunks of the pipeline: stages times virtual stages."""
    return parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size


def even_layout(num_layers: int, chunks: int) -> list[int]:
    """Layers of each chunk, in pipeline order, as even as whole layers allow.

    The embedding counts as a layer of the first chunk and the head as one of the last; spare work goes to the middle,
    where no embedding or head adds to it. Every chunk gets at least one layer.

    Args:
        num_layers: decoder layers, at least `chunks`.
        chunks: stages times virtual stages.
    """
    if chunks == 1:
        return [num_layers]
    extra = [1] + [0] * (chunks - 2) + [1]
    layers = [1] * chunks
    middle_first = sorted(range(chunks), key=lambda chunk: (extra[chunk], chunk))
    for _ in range(num_layers - chunks):
        lightest = min(middle_first, key=lambda chunk: layers[chunk] + extra[chunk])
        layers[lightest] += 1
    return layers


def layers_per_chunk(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """The explicit `parallel.pipeline_layout`, or the even one."""
    if parallel.pipeline_layout is not None:
        return list(parallel.pipeline_layout)
    return even_layout(model.num_layers, num_chunks(parallel))


def layers_of_stage(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[list[int]]:
    """Layer numbers (from 0) of a pipeline rank, one list per virtual stage."""
    counts = layers_per_chunk(model, parallel)
    starts = [sum(counts[:chunk]) for chunk in range(len(counts))]
    mine = range(stage, len(counts), parallel.pipeline_model_parallel_size)
    return [list(range(starts[chunk], starts[chunk] + counts[chunk])) for chunk in mine]


def mcore_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]]:
    """The same as megatron-core's `pipeline_model_parallel_layout`: one list of layer types per chunk."""
    chunks = [["decoder"] * count for count in layers_per_chunk(model, parallel)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


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
