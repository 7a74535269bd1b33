"""Which layers lie on which pipeline stage. Pure; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.derived import is_moe_layer, num_chunks
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


def chunks_of_stage(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[Layers]:
    """What lies on a pipeline rank, one entry per virtual stage."""
    stages = parallel.pipeline_model_parallel_size
    chunks = []
    for virtual, layers in enumerate(layers_of_stage(model, parallel, stage)):
        moe = sum(is_moe_layer(model, layer) for layer in layers)
        place, last = virtual * stages + stage, num_chunks(parallel) - 1
        chunks.append(Layers(len(layers) - moe, moe, embedding=place == 0, head=place == last))
    return chunks


def layers_on_stage(model: ModelConfig, parallel: ParallelConfig, stage: int) -> Layers:
    """What lies on a pipeline rank, its virtual stages together."""
    return sum(chunks_of_stage(model, parallel, stage), Layers(0, 0))


def mcore_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]]:
    """The same as megatron-core's `pipeline_model_parallel_layout`: one list of layer types per chunk."""
    chunks = [["decoder"] * count for count in layers_per_chunk(model, parallel)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks
