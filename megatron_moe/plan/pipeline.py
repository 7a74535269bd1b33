"""Which layers lie on which pipeline stage. Pure; imports no torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_moe.config.derived import num_chunks
from megatron_moe.config.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class Layers:
    """What of a model lies somewhere, by kind.

    Attributes:
        dense: layers without experts.
        moe: layers with experts.
        embedding: whether the input embedding is there.
        head: whether the last norm and the head are there.
    """

    dense: int
    moe: int
    embedding: bool = False
    head: bool = False

    def __add__(self, other: Layers) -> Layers:
        return Layers(
            self.dense + other.dense,
            self.moe + other.moe,
            self.embedding or other.embedding,
            self.head or other.head,
        )


def all_layers(model: ModelConfig) -> Layers:
    """The whole model."""
    return Layers(model.num_dense_layers, model.num_layers - model.num_dense_layers, embedding=True, head=True)


def even_layout(num_layers: int, chunks: int, *, first: float = 1, last: float = 1) -> list[int]:
    """Layers of each chunk, in pipeline order, as even as whole layers allow.

    Spare work goes to the middle, where no embedding or head adds to it. Every chunk gets at least one layer.

    Args:
        num_layers: decoder layers, at least `chunks`.
        chunks: stages times virtual stages.
        first: layers as which the embedding counts.
        last: layers as which the head counts.
    """
    return list(_even_layout(num_layers, chunks, first, last))


@functools.cache
def _even_layout(num_layers: int, chunks: int, first: float, last: float) -> tuple[int, ...]:
    if chunks == 1:
        return (num_layers,)
    extra = [first] + [0] * (chunks - 2) + [last]
    layers = [1] * chunks
    middle_first = sorted(range(chunks), key=lambda chunk: (extra[chunk], chunk))
    for _ in range(num_layers - chunks):
        lightest = min(middle_first, key=lambda chunk: layers[chunk] + extra[chunk])
        layers[lightest] += 1
    return tuple(layers)


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


def chunks_by_stage(model: ModelConfig, parallel: ParallelConfig) -> list[list[Layers]]:
    """What lies on each pipeline rank, one entry per virtual stage."""
    chunks, dense_left, last = [], model.num_dense_layers, num_chunks(parallel) - 1
    for place, layers in enumerate(layers_per_chunk(model, parallel)):
        dense = min(layers, dense_left)
        dense_left -= dense
        chunks.append(Layers(dense, layers - dense, embedding=place == 0, head=place == last))
    stages = parallel.pipeline_model_parallel_size
    return [chunks[stage::stages] for stage in range(stages)]


def layers_by_stage(model: ModelConfig, parallel: ParallelConfig) -> list[Layers]:
    """What lies on each pipeline rank, its virtual stages together."""
    return [sum(chunks, Layers(0, 0)) for chunks in chunks_by_stage(model, parallel)]


def mcore_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]]:
    """The same as megatron-core's `pipeline_model_parallel_layout`: one list of layer types per chunk."""
    chunks = [["decoder"] * count for count in layers_per_chunk(model, parallel)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks
