"""Where a rank's optimizer state lies in the whole model's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_moe.checkpoint.chunks import as_chunk, boxes

STATES = ("param", "exp_avg", "exp_avg_sq")


def sharded_state(part: DistributedOptimizer, model_state: ShardedStateDict) -> list[ShardedTensor]:
    """Main parameters and moments of an optimizer: what of them this rank has, under their parameters' names.

    The tensors are the optimizer's own, or views of them. How many optimizers and groups there are depends on the
    layout, so neither is named. megatron-core 0.16.1 gathers all of it on one data-parallel rank instead
    (distrib_optimizer.py, `get_parameter_state_dp_zero`).
    """
    places = {place.data: place for place in nested_values(model_state) if isinstance(place, ShardedBase)}
    return [
        chunk for param, start, stop in _shares(part) for chunk in _of_param(part, param, places[param], start, stop)
    ]


def _shares(part: DistributedOptimizer) -> Iterator[tuple[Parameter, int, int]]:
    """Each parameter that this rank updates, and which of its flattened values, from and to."""
    for types in part.gbuf_ranges:
        for buckets in types.values():
            for bucket in buckets:
                for param, ranges in bucket["param_map"].items():
                    yield param, ranges["param"].start, ranges["param"].end


def _of_param(
    part: DistributedOptimizer, param: Parameter, place: ShardedBase, start: int, stop: int
) -> Iterator[ShardedTensor]:
    states = part._get_main_param_and_optimizer_states(param)
    for piece in _pieces(place):
        begin, shape = piece.data.storage_offset(), piece.local_shape
        first, last = max(start, begin), min(stop, begin + piece.data.numel())
        if first < last:
            for state in STATES:
                values = states[state].view(-1)[first - start : last - start]
                yield from _chunks(piece, state, values, boxes(shape, first - begin, last - begin))


def _pieces(place: ShardedBase) -> list[ShardedTensor]:
    """What a parameter is saved as, such as gate and up for themselves; without values, but at their offset in it."""
    empty = dataclasses.replace(
        place, data=torch.empty_like(place.data, device="meta", memory_format=torch.contiguous_format)
    )
    pieces = list(nested_values(empty.build())) if isinstance(empty, ShardedTensorFactory) else [empty]
    assert all(piece.data.is_contiguous() for piece in pieces)
    return pieces


def _chunks(piece: ShardedTensor, state: str, values: Tensor, parts: Iterator) -> Iterator[ShardedTensor]:
    position = 0
    leading = piece.prepend_axis_num
    for offset, size in parts:
        count = torch.Size(size).numel()
        within = (*(0 for _ in range(leading)), *offset)
        yield as_chunk(
            piece,
            key=f"optimizer.state.{state}.{piece.key}",
            data=values[position : position + count],
            local_shape=size,
            global_offset=tuple(a + b for a, b in zip(piece.global_offset, within, strict=True)),
            replica_id=(*piece.replica_id[:2], 0),  # of the data-parallel ranks only this one has it
        )
        position += count
