"""Parts of tensors in a checkpoint, each a box in the whole tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # first place, and size, of each axis


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes of a tensor that make up the values `start` to `stop` of it flattened, in order. Pure.

    A matrix has at most three: the rest of a row, whole rows, the beginning of a row.
    """
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, inside = divmod(start, row)
        if inside == 0 and stop - start >= row:
            count = (stop - start) // row
            yield (index, *(0 for _ in shape[1:])), (count, *shape[1:])
            start += count * row
        else:
            end = min(stop, (index + 1) * row)
            for offset, size in boxes(shape[1:], inside, inside + end - start):
                yield (index, *offset), (1, *size)
            start = end


def as_chunk(place: ShardedTensor, **changes: Any) -> ShardedTensor:
    """The same, but for `changes`, as a box of its own: with all axes, and in no grid with the other ranks' parts.

    Of a grid megatron-core 0.16.1 lists all parts on each rank (strategies/torch.py,
    `sharded_tensor_to_torch_sharded_tensor`).
    """
    data = changes.pop("data", place.data)
    shape = (1,) * place.prepend_axis_num + tuple(changes.pop("local_shape", place.local_shape))
    return dataclasses.replace(
        place,
        data=data.detach().view(shape),
        dtype=data.dtype,
        local_shape=shape,
        prepend_axis_num=0,
        axis_fragmentations=None,
        **changes,
    )
