"""Safetensors files a few rows at a time: the package's own reader maps a whole file, its writer wants all tensors.

Format: 8 bytes of header length, the header (JSON), the tensors' bytes without holes.
Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_moe.checkpoint.dcp import read_into
from megatron_moe.config.errors import ConfigError

ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type by the format's name, its shape, and where its bytes begin."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read_rows(self, first: int, out: torch.Tensor) -> None:
        """Fill `out`, [rows, ...], with the rows from `first` on."""
        row_bytes = math.prod(self.shape[1:]) * ITEM_SIZES[self.dtype]
        read_into(self.path, self.offset + first * row_bytes, out)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a file, by name.

    Raises:
        ConfigError: it is damaged, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ConfigError(f"{path}: not a safetensors file, or cut off: its header would not fit in {size:,} bytes")
        header = _parse(path, file.read(length))
    header.pop("__metadata__", None)
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end:
            raise ConfigError(f"{path}: {name}: begins at byte {start:,} of the data, the one before ends at {end:,}")
        end = stop
    if end != size - 8 - length:
        raise ConfigError(f"{path}: its tensors take {end:,} bytes, the file holds {size - 8 - length:,}")
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + spans[name][0])
        for name, entry in header.items()
    }


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: header: {error}") from None
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: header: a JSON object is needed")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor in the file's data, checked against its type and shape."""
    if not isinstance(entry, dict) or entry.get("dtype") not in ITEM_SIZES:
        raise ConfigError(f"{path}: {name}: no tensor of a known type: {entry}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ConfigError(f"{path}: {name}: shape and data_offsets must be lists of integers from 0: {entry}")
    size = math.prod(shape) * ITEM_SIZES[entry["dtype"]]
    if offsets[1] - offsets[0] != size:
        raise ConfigError(
            f"{path}: {name}: {entry['dtype']} of shape {shape} takes {size:,} bytes, its place "
            f"{offsets[0]:,} to {offsets[1]:,} another number"
        )
    return offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face folder: of one file, or of the files that its index names.

    Raises:
        ConfigError: there are none, they are damaged, or they are pickles, which could run code.
    """
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    pickles = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending))
    if pickles:
        raise ConfigError(f"{folder}: {', '.join(pickles[:3])}: pickles can run code; only safetensors files are read")
    raise ConfigError(f"{folder}: neither {SINGLE} nor {INDEX}")


def _open_shards(folder: Path) -> dict[str, StoredTensor]:
    places = _weight_map(folder / INDEX)
    headers = {file: read_header(folder / file) for file in sorted(set(places.values()))}
    stored = {name: tensor for header in headers.values() for name, tensor in header.items()}
    indexed = {(name, file) for name, file in places.items()}
    held = {(name, file) for file, header in headers.items() for name in header}
    if indexed != held:
        name, file = sorted(indexed ^ held)[0]
        where = "the index" if (name, file) in indexed else "the file"
        raise ConfigError(
            f"{folder / INDEX}: disagrees with its files on {len(indexed ^ held)} tensors; {name} of {file} is only in "
            f"{where}"
        )
    return stored


def _weight_map(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = set(places.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: no index with a weight_map ({error})") from None
    for file in files:
        # A bare name: nothing outside the folder is read. Links are the user's own (the hub's cache is made of them).
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(f"{path}: {file!r}: must be the name of a .safetensors file in the folder")
        if not (path.parent / file).is_file():
            raise ConfigError(f"{path.parent / file}: no such file; {path.name} names it")
    return places


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor before its values are known."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


Pieces = Callable[[TensorToWrite], Iterable[torch.Tensor]]


def write_folder(folder: Path, tensors: list[TensorToWrite], pieces: Pieces, max_shard_bytes: int) -> int:
    """Write `model.safetensors`, or numbered files and their index if one would exceed `max_shard_bytes`.

    Args:
        folder: existing.
        tensors: in the order of the files.
        pieces: a tensor's values, in consecutive parts; called for one tensor after the other.
        max_shard_bytes: of a file's tensors; a larger tensor has a file of its own.

    Returns:
        The number of files.
    """
    shards = list(split_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0], pieces)
        return 1
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard, pieces)
        places |= dict.fromkeys((tensor.name for tensor in shard), name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return len(shards)


def split_shards(tensors: Iterable[TensorToWrite], max_bytes: int) -> Iterator[list[TensorToWrite]]:
    """Consecutive tensors of at most `max_bytes` together, each at least one."""
    shard: list[TensorToWrite] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _write_file(path: Path, tensors: list[TensorToWrite], pieces: Pieces) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[tensor.name], offset = entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_tensor(file, tensor, pieces(tensor))


def _write_tensor(file: BinaryIO, tensor: TensorToWrite, pieces: Iterable[torch.Tensor]) -> None:
    start = file.tell()
    for piece in pieces:
        file.write(memoryview(piece.contiguous().view(torch.uint8).numpy()).cast("B"))
    assert file.tell() - start == tensor.nbytes, tensor.name
