"""Which layers lie on which pipeline stage. Pure; imports no torch."""

from __future__ import annotations

from megatron_moe.config.derived import num_chunks
from megatron_moe.config.schema import ModelConfig, ParallelConfig


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
