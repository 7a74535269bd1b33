"""Whether a checkpoint's index holds all of a model: every value of every tensor once, every expert of every layer.

Looks at the index alone and reads no values.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import ModelConfig
from megatron_moe.model.names import other_name, our_tensors

MAIN, FIRST, SECOND = (f"optimizer.state.{state}." for state in ("param", "exp_avg", "exp_avg_sq"))
OPTIMIZER = (MAIN, FIRST, SECOND)
Box = tuple[tuple[int, int], ...]  # of each axis the first place and the one after the last


@dataclass(frozen=True)
class Layout:
    """A tensor of an index: its shape, and the boxes that it was saved in."""

    shape: tuple[int, ...]
    chunks: tuple[Box, ...]


Layouts = Mapping[str, Layout]


@contextmanager
def _well_formed() -> Iterator[None]:
    """An index is data of unknown origin: its classes are those expected, what they hold may be anything."""
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ConfigError(f"the index is malformed: {error}") from None


@_well_formed()
def layouts_of(index: Metadata) -> dict[str, Layout]:
    """The tensors of an index, by name.

    Raises:
        ConfigError: the index is malformed.
    """
    return {
        str(key): Layout(_integers(entry.size), tuple(map(_box, entry.chunks)))
        for key, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _box(chunk: ChunkStorageMetadata) -> Box:
    pairs = zip(_integers(chunk.offsets), _integers(chunk.sizes), strict=True)
    return tuple((offset, offset + size) for offset, size in pairs)


def _integers(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(map(operator.index, values))


def problems_of_coverage(tensors: Layouts, model: ModelConfig, *, with_optimizer: bool = True) -> list[str]:
    """What of a model is missing, has another shape, or was saved twice; a line each, layers and experts from 0.

    Args:
        tensors: all that were saved; those that are not of the model must be whole too.
        model: whose parameters must be there.
        with_optimizer: the main parameters and moments of each must be there too.
    """
    problems = []
    for prefix in ("", *OPTIMIZER) if with_optimizer else ("",):
        for name, tensor in our_tensors(model).items():
            found = saved_name(tensors, prefix + name)
            if found is None:
                problems.append(f"{prefix}{name}: {_where(name, (0, tensor.stack or 0))}was not saved")
            elif tensors[found].shape != tensor.shape:
                problems.append(f"{found}: shape {tensors[found].shape}, the model's is {tensor.shape}")
    return problems + problems_of_chunks(tensors)


def problems_of_chunks(tensors: Layouts) -> list[str]:
    """Values of tensors, of whatever model, that were not saved, or saved twice; a line each."""
    return [problem for name, layout in tensors.items() for problem in _problems_of_chunks(name, layout)]


def saved_name(tensors: Iterable[str], name: str) -> str | None:
    """The name under which a tensor was saved, with or without Transformer Engine, if it was."""
    return next((key for key in (name, other_name(name)) if key in tensors), None)


@_well_formed()
def problems_of_places(index: Metadata, sizes: Mapping[str, int]) -> list[str]:
    """What an index refers to that is not there; a line each.

    Args:
        index: of a checkpoint.
        sizes: bytes of the files that it may refer to, by name; a path to elsewhere is none of them.

    Raises:
        ConfigError: the index is malformed.
    """
    places = {(key.fqn, key.offset and _integers(key.offset)): place for key, place in index.storage_data.items()}
    problems = [problem for (name, _), place in places.items() if (problem := _problem_of_place(name, place, sizes))]
    layouts = layouts_of(index)
    for name, layout in layouts.items():
        itemsize = index.state_dict_metadata[name].properties.dtype.itemsize
        for chunk in layout.chunks:
            place = places.get((name, tuple(start for start, _ in chunk)))
            if place is None:
                problems.append(f"{name}: chunk {_shown(chunk)} is in no file")
            elif place.length < _volume(chunk) * itemsize:
                problems.append(f"{name}: chunk {_shown(chunk)} does not fit into {place.length:,} bytes")
    objects = index.state_dict_metadata.keys() - layouts.keys()
    return problems + [f"{name}: is in no file" for name in sorted(objects) if (name, None) not in places]


def _problem_of_place(name: str, place: Any, sizes: Mapping[str, int]) -> str | None:
    file = place.relative_path
    if file not in sizes:
        return f"{name}: is said to be in {file!r}, which is no file of the checkpoint"
    if not all(isinstance(number, int) and number >= 0 for number in (place.offset, place.length)):
        return f"{name}: is said to be at byte {place.offset!r} of {file}, {place.length!r} bytes long"
    if place.offset + place.length > sizes[file]:
        return f"{name}: is said to end at byte {place.offset + place.length:,} of {file}, which has {sizes[file]:,}"
    return None


def _problems_of_chunks(name: str, layout: Layout) -> Iterator[str]:
    """Of one tensor."""
    shape = layout.shape
    inside = [
        len(box) == len(shape) and all(0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True))
        for box in layout.chunks
    ]
    if not all(inside):
        yield f"{name}: chunk {_shown(layout.chunks[inside.index(False)])} is not within its shape {shape}"
        return
    values: dict[tuple[tuple[int, int], bool], int] = defaultdict(int)
    for box, count in _uneven(shape, layout.chunks):
        values[(box[0] if box else (0, 1)), count > 1] += _volume(box)
    for (rows, is_double), number in values.items():
        what = "were saved more than once" if is_double else "were not saved"
        yield f"{name}: {_where(name, rows)}{number:,} of {math.prod(shape):,} values {what}"


def _uneven(shape: tuple[int, ...], chunks: Sequence[Box], axis: int = 0) -> Iterator[tuple[Box, int]]:
    """The boxes of a tensor that not exactly one chunk covers, and how many do."""
    if axis == len(shape):
        if len(chunks) != 1:
            yield (), len(chunks)
        return
    starting = defaultdict(list)
    for chunk in chunks:
        starting[chunk[axis][0]].append(chunk)
    edges = sorted({0, shape[axis], *(edge for chunk in chunks for edge in chunk[axis])})
    covering: list[Box] = []
    for start, stop in itertools.pairwise(edges):
        covering = [chunk for chunk in covering + starting[start] if chunk[axis][1] > start]
        for box, count in _uneven(shape, covering, axis + 1):
            yield ((start, stop), *box), count


def _where(name: str, rows: tuple[int, int]) -> str:
    """The layer of a tensor, and of stacked ones which experts or layers lie in some rows of the first axis."""
    layer = re.search(r"\bdecoder\.layers\.(\d+)\.", name)
    if layer is None:
        return f"{_numbers('layer', rows)}: " if ".layers." in f".{name}" else ""
    experts = f", {_numbers('expert', rows)}" if ".experts.experts." in name else ""
    return f"layer {layer[1]}{experts}: "


def _numbers(what: str, rows: tuple[int, int]) -> str:
    first, last = rows[0], rows[1] - 1
    return f"{what} {first}" if first == last else f"{what}s {first} to {last}"


def _shown(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
