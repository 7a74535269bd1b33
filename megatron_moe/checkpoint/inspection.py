"""What a checkpoint holds, whether it is whole, and how two differ; reads it as data, in one process."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.compatibility import differences
from megatron_moe.checkpoint.coverage import (
    FIRST,
    MAIN,
    SECOND,
    layouts_of,
    problems_of_chunks,
    problems_of_coverage,
    saved_name,
)
from megatron_moe.checkpoint.dcp import Rows, SavedTensors, pieces, read_index
from megatron_moe.checkpoint.manifest import ALWAYS_READ, MANIFEST, problems_of, read_manifest
from megatron_moe.checkpoint.run_folder import read_json, saved_config, saved_steps
from megatron_moe.config.derived import data_parallel_size
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Config, ModelConfig
from megatron_moe.model.names import other_name, our_tensors

CHECKPOINT = re.compile(r"step_\d{8}(\.partial|\.damaged)?")
MEANINGS = {
    "whole": "a finished save",
    "no manifest": f"it has no {MANIFEST}, so that nothing tells whether its files are whole",
    "partial": "a save that has not ended or was interrupted; no run loads it, and a restart of its run removes it",
    "damaged": "it was found damaged and passed over; no run loads it, and it is kept only to be looked at",
}
WEIGHTS, OTHER = "model weights", "other"
OPTIMIZER_KINDS = {MAIN: "main parameters", FIRST: "first moments", SECOND: "second moments"}


@dataclass(frozen=True)
class Entry:
    """A checkpoint of a run. `state`: a key of `MEANINGS`; `saved_at`: the time of its last file."""

    name: str
    state: str
    saved_at: str
    files: int
    nbytes: int


@dataclass(frozen=True)
class TensorEntry:
    """A saved tensor; `nbytes` of its values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    chunks: int


@dataclass
class Size:
    """Of the tensors of one kind."""

    tensors: int = 0
    values: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Description:
    """A checkpoint.

    Attributes:
        layout: number of ranks by kind of parallelism; empty for an imported model.
        parameters: of the model, by its saved tensors.
        sizes: by kind of tensor.
        data: fingerprints of the training data, by source.
    """

    step: int
    consumed_samples: int
    consumed_tokens: int
    skipped_steps: int
    weights_only: bool
    world_size: int
    layout: dict[str, int]
    precision: str
    model: str
    parameters: int
    sizes: dict[str, Size]
    data: dict[str, str]


@dataclass(frozen=True)
class Differences:
    """Between two checkpoints, a line each. `values` is None where they were not compared."""

    options: list[str]
    tensors: list[str]
    values: list[str] | None


def find(path: Path) -> tuple[Path, list[Entry]]:
    """The checkpoint that a path means, and all of its run where the path is one's.

    Args:
        path: a run or its `checkpoints` (their newest whole checkpoint), or one checkpoint.

    Raises:
        ConfigError: there is none.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    entries = [entry(child) for child in sorted(folder.glob("step_*")) if CHECKPOINT.fullmatch(child.name)]
    if whole := saved_steps(folder):
        return whole[-1], entries
    if entries:
        raise ConfigError(f"{folder}: no whole checkpoint in it, only {', '.join(e.name for e in entries)}; name one")
    if path.is_dir() and (CHECKPOINT.fullmatch(path.resolve().name) or (path / ".metadata").is_file()):
        return path, []
    raise ConfigError(f"{path}: neither a run, nor its checkpoints, nor a checkpoint (a folder with .metadata)")


def entry(checkpoint: Path) -> Entry:
    """A checkpoint without looking into its files."""
    suffix = checkpoint.resolve().suffix.removeprefix(".")
    whole = "whole" if (checkpoint / MANIFEST).is_file() else "no manifest"
    stats = [path.lstat() for path in checkpoint.iterdir()]
    last = max([stat.st_mtime for stat in stats], default=checkpoint.stat().st_mtime)
    return Entry(
        name=checkpoint.name,
        state=suffix if suffix in MEANINGS else whole,
        saved_at=datetime.fromtimestamp(last).astimezone().isoformat(" ", "seconds"),
        files=len(stats),
        nbytes=sum(stat.st_size for stat in stats),
    )


def describe(checkpoint: Path) -> Description:
    """What a checkpoint holds.

    Raises:
        ConfigError: its description or its index is missing or damaged, or of another version.
    """
    state, config = read_json(checkpoint / "state.json"), saved_config(checkpoint)
    sizes = _sizes(tensors_of(checkpoint), config.model)
    numbers = {name: _number(checkpoint, state, name) for name in ("step", "consumed_samples", "skipped_steps")}
    world_size = _number(checkpoint, state, "world_size")
    data = state.get("data")
    return Description(
        **numbers,
        consumed_tokens=numbers["consumed_samples"] * config.data.sequence_length,
        weights_only=bool(state.get("weights_only")),
        world_size=world_size,
        layout=_layout(config, world_size) if world_size else {},
        precision=config.precision.dtype.value,
        model=config.model.name,
        parameters=sizes[WEIGHTS].values,
        sizes=sizes,
        data={str(name): str(digest) for name, digest in data.items()} if isinstance(data, dict) else {},
    )


def tensors_of(checkpoint: Path) -> list[TensorEntry]:
    """The tensors of a checkpoint, by name.

    Raises:
        ConfigError: its index is missing or damaged.
    """
    index = read_index(checkpoint)
    found = []
    for name, layout in sorted(layouts_of(index).items()):
        dtype = index.state_dict_metadata[name].properties.dtype
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"{checkpoint / '.metadata'}: {name}: {dtype!r} is no type of a tensor")
        nbytes = math.prod(layout.shape) * dtype.itemsize
        text = str(dtype).removeprefix("torch.")
        found.append(TensorEntry(name, layout.shape, text, nbytes, len(layout.chunks)))
    return found


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each: its files, its index, and what the index lacks of the model."""
    problems: list[str] = []
    try:
        files = read_manifest(checkpoint)
        problems = problems_of(checkpoint, files)
        if any(name not in files for name in ALWAYS_READ) or problems_of(checkpoint, files, ALWAYS_READ):
            return problems
        return problems + [f"{checkpoint / '.metadata'}: {line}" for line in _verify_index(checkpoint)]
    except ConfigError as error:
        return problems or list(error.problems)  # an index of files that are damaged does not fit them


def compare(before: Path, after: Path, *, values: bool = False) -> Differences:
    """How one checkpoint differs from another.

    Args:
        before: a checkpoint.
        after: another.
        values: compare the values of the tensors that both have, bit for bit.

    Raises:
        ConfigError: a description or an index is missing or damaged.
    """
    configs = (read_json(folder / "state.json").get("config") for folder in (before, after))
    options = [f"{name}: {json.dumps(old)} -> {json.dumps(new)}" for name, old, new in differences(*configs)]
    tensors, common = _tensor_differences(before, after)
    return Differences(options, tensors, list(_value_differences(before, after, common)) if values else None)


def _verify_index(checkpoint: Path) -> list[str]:
    index = read_index(checkpoint)
    weights_only = bool(read_json(checkpoint / "state.json").get("weights_only"))
    model = saved_config(checkpoint).model
    return problems_of_coverage(layouts_of(index), model, with_optimizer=not weights_only)


def _number(checkpoint: Path, state: dict[str, Any], name: str) -> int:
    value = state.get(name, 0)
    if type(value) is not int:
        raise ConfigError(f"{checkpoint / 'state.json'}: {name}={value!r}: must be a whole number")
    return value


def _layout(config: Config, world_size: int) -> dict[str, int]:
    parallel = config.parallel
    return {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual pipeline": parallel.virtual_pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "data": data_parallel_size(parallel, world_size),
    }


def _sizes(tensors: list[TensorEntry], model: ModelConfig) -> dict[str, Size]:
    """By kind. A norm that an imported model has under two names counts once."""
    sizes = {kind: Size() for kind in (WEIGHTS, *OPTIMIZER_KINDS.values(), OTHER)}
    ours, counted = our_tensors(model), set()
    for tensor in tensors:
        kind = next((kind for prefix, kind in OPTIMIZER_KINDS.items() if tensor.name.startswith(prefix)), OTHER)
        if tensor.name in ours or other_name(tensor.name) in ours:
            kind = WEIGHTS
        if other_name(tensor.name) not in counted:
            size = sizes[kind]
            size.tensors += 1
            size.values += math.prod(tensor.shape)
            size.nbytes += tensor.nbytes
        counted.add(tensor.name)
    return sizes


def _tensor_differences(before: Path, after: Path) -> tuple[list[str], list[tuple[TensorEntry, TensorEntry]]]:
    """A line for each tensor that only one has or that differs in shape or type, and the pairs that could be equal."""
    old, new = ({tensor.name: tensor for tensor in tensors_of(folder)} for folder in (before, after))
    lines, common = [], []
    for tensor in old.values():
        name = saved_name(new, tensor.name)
        if name is None:
            lines.append(f"{tensor.name}: only in {before}")
        elif (tensor.shape, tensor.dtype) != (new[name].shape, new[name].dtype):
            other = new[name]
            lines.append(f"{tensor.name}: {list(tensor.shape)} {tensor.dtype} -> {list(other.shape)} {other.dtype}")
        else:
            common.append((tensor, new[name]))
    lines += [f"{name}: only in {after}" for name in new if saved_name(old, name) is None]
    return lines, common


def _value_differences(before: Path, after: Path, pairs: list[tuple[TensorEntry, TensorEntry]]) -> Iterator[str]:
    saved = [_readable(folder) for folder in (before, after)]
    for old, new in pairs:
        if not _equal(saved[0], old, saved[1], new):
            yield f"{old.name}: other values"


def _readable(checkpoint: Path) -> SavedTensors:
    """The tensors, after a look at whether the index has each of their values once.

    Raises:
        ConfigError: it has not.
    """
    if problems := problems_of_chunks(layouts_of(read_index(checkpoint))):
        raise ConfigError(*(f"{checkpoint / '.metadata'}: {problem}" for problem in problems[:3]))
    return SavedTensors(checkpoint)


def _equal(first: SavedTensors, old: TensorEntry, second: SavedTensors, new: TensorEntry) -> bool:
    """Whether two tensors of one shape and type have the same bits, a piece at a time."""
    rows, *columns = old.shape or (0,)
    row_bytes = max(1, math.prod(columns) * first.dtype(old.name).itemsize)
    return all(
        torch.equal(first.read(old.name, part).view(torch.uint8), second.read(new.name, part).view(torch.uint8))
        for part in pieces(Rows(None, 0, rows), row_bytes)
    )
