"""Checkpoints of megatron-core (torch's distributed format), a few rows at a time in one process without groups.

megatron-core's own way loads and saves a whole model. A checkpoint is a pickled index, `.metadata`, of the tensors'
chunks, each a `torch.save` archive within a `.distcp` file.
"""

from __future__ import annotations

import functools
import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe.checkpoint.coverage import problems_of_places
from megatron_moe.config.errors import ConfigError, unreadable

PIECE_BYTES = 8 * 2**20  # held at a time
DATA_FILE = "__0_0.distcp"
# What megatron-core 0.16.1 leaves beside the index (dist_checkpointing/core.py).
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# The classes of an index. Any other, which could run code, is refused.
INDEX_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}
# What comes of bytes that are no pickle, or whose classes were given other values than their own.
UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
)
Window = tuple[slice, ...]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a matrix (or vector) of ours: of that with number `index` where a tensor stacks several."""

    index: int | None
    first: int
    count: int

    def window(self, columns: tuple[int, ...]) -> Window:
        """Their place in the whole tensor, whose last dimensions are `columns`."""
        leading = () if self.index is None else (slice(self.index, self.index + 1),)
        return (*leading, slice(self.first, self.first + self.count), *(slice(0, size) for size in columns))


def pieces(rows: Rows, row_bytes: int) -> Iterator[Rows]:
    """The same rows in parts of at most `PIECE_BYTES`, each at least one row."""
    at_once = max(1, PIECE_BYTES // row_bytes)
    for first in range(0, rows.count, at_once):
        yield Rows(rows.index, rows.first + first, min(at_once, rows.count - first))


class SavedTensors:
    """The tensors of a checkpoint, whatever ranks saved them: a window may lie in several chunks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_index(folder)
        self.tensors = {
            key: entry for key, entry in index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._places = index.storage_data

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """As saved."""
        return self.tensors[key].properties.dtype

    def read(self, key: str, rows: Rows) -> torch.Tensor:
        """Rows of a tensor, [rows, ...].

        Raises:
            ConfigError: the checkpoint lacks some of them, or is damaged.
        """
        window = rows.window(self.shape(key)[1 if rows.index is None else 2 :])
        out = torch.empty([part.stop - part.start for part in window], dtype=self.dtype(key))
        missing = out.numel()
        for chunk in self.tensors[key].chunks:
            missing -= self._copy_chunk(key, chunk, window, out)
        if missing:
            raise ConfigError(f"{self.folder}: {key}: {missing:,} values of rows {rows} were never saved")
        return out if rows.index is None else out[0]

    def _copy_chunk(self, key: str, chunk: ChunkStorageMetadata, window: Window, out: torch.Tensor) -> int:
        """Copy what a chunk has of a window; returns how many values."""
        starts = [max(o, w.start) for o, w in zip(chunk.offsets, window, strict=True)]
        stops = [min(o + n, w.stop) for o, n, w in zip(chunk.offsets, chunk.sizes, window, strict=True)]
        if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
            return 0
        place = self._places[MetadataIndex(key, chunk.offsets)]
        # A window has whole columns and at most one matrix of a stack, so what a chunk has of it is contiguous there.
        inside = [start - offset for start, offset in zip(starts, chunk.offsets, strict=True)]
        skipped = sum(i * math.prod(chunk.sizes[axis + 1 :]) for axis, i in enumerate(inside))
        target = out[tuple(slice(a - w.start, b - w.start) for a, b, w in zip(starts, stops, window, strict=True))]
        part = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        path = self.folder / place.relative_path
        if place.transform_descriptors:
            raise ConfigError(f"{path}: {key}: saved with {place.transform_descriptors}, which is not read")
        start = _data_offset(path, place.offset, place.length, math.prod(chunk.sizes) * out.itemsize)
        read_into(path, start + skipped * out.itemsize, part)
        if part is not target:
            target.copy_(part)
        return part.numel()


def read_into(path: Path, offset: int, out: torch.Tensor) -> None:
    """Fill a contiguous tensor with a file's bytes from `offset` on.

    Raises:
        ConfigError: the file ends before.
    """
    buffer = memoryview(out.view(torch.uint8).numpy()).cast("B")
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise ConfigError(f"{path}: ends within a tensor")
            buffer = buffer[count:]


def read_index(folder: Path, names: Collection[str] | None = None) -> Metadata:
    """The index of a checkpoint, `.metadata`; runs no code that it may hold.

    Args:
        folder: of the checkpoint.
        names: the files that tensors may be in; all of the folder by default.

    Raises:
        ConfigError: it is no index, or places a tensor elsewhere than within a file of the folder.
        OSError: it cannot be read for now.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"holds {type(index).__name__}")
        files = [file for file in folder.iterdir() if file.is_file() and not file.is_symlink()]
        sizes = {file.name: file.stat().st_size for file in files if names is None or file.name in names}
    except OSError as error:
        raise unreadable(path, error) from None
    except UNREADABLE as error:
        raise ConfigError(f"{path}: no index of a checkpoint of this version: {str(error)[:200]}") from None
    try:
        problems = problems_of_places(index, sizes)
    except ConfigError as error:
        problems = list(error.problems)
    if problems:
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not of an index")


@functools.lru_cache(maxsize=64)
def _data_offset(path: Path, offset: int, length: int, nbytes: int) -> int:
    """Where in a file the `nbytes` of a chunk begin, whose `torch.save` archive is at `offset`.

    Raises:
        ConfigError: no such archive is there.
    """
    try:
        with path.open("rb") as file:
            archive = zipfile.ZipFile(_Section(file, offset, length))
            files = {name.split("/", 1)[-1]: name for name in archive.namelist()}
            values = archive.getinfo(files["data/0"])
            _check_contiguous(archive.read(files["data.pkl"]))
            if values.file_size != nbytes or values.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(f"{values.file_size:,} bytes, not {nbytes:,}")
            if archive.read(files["byteorder"]) != b"little":
                raise pickle.UnpicklingError("not little-endian")
            # A local header: 26 bytes, the lengths of the name and of the extra field, then these two and the data.
            file.seek(offset + values.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
    except (zipfile.BadZipFile, KeyError, pickle.UnpicklingError, struct.error, EOFError) as error:
        raise ConfigError(f"{path}: byte {offset:,}: not a tensor as torch saves it: {error}") from None
    return offset + values.header_offset + 30 + name_length + extra_length


class _Section(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


def _check_contiguous(pickled: bytes) -> None:
    """Raise UnpicklingError unless an archive describes one contiguous tensor that fills its storage."""
    size, stride, offset = _TensorUnpickler(io.BytesIO(pickled)).load()
    contiguous = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
    if offset or any(n > 1 and s != c for n, s, c in zip(size, stride, contiguous, strict=True)):
        raise pickle.UnpicklingError(f"shape {size} with strides {stride} from {offset} is not contiguous")


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of a tensor, and makes none."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (size, stride, offset)
        if (module, name) == ("collections", "OrderedDict") or (module == "torch" and name.endswith("Storage")):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} is not of a tensor")

    def persistent_load(self, pid: Any) -> None:
        """The storage."""


@dataclass(frozen=True)
class NewTensor:
    """A tensor of a checkpoint to be written.

    Attributes:
        stacked: whether the first dimension counts matrices (or vectors).
        aliases: other names of the same values.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stacked: bool = False
    aliases: tuple[str, ...] = ()

    def chunks(self) -> Iterator[Rows]:
        """The parts it is written in: of one matrix, and of at most `PIECE_BYTES`."""
        rows, *columns = self.shape[1:] if self.stacked else self.shape
        for index in range(self.shape[0]) if self.stacked else (None,):
            yield from pieces(Rows(index, 0, rows), math.prod(columns) * self.dtype.itemsize)


def write_checkpoint(
    folder: Path, tensors: list[NewTensor], objects: list[str], read: Callable[[str, Rows], torch.Tensor]
) -> None:
    """Write a checkpoint that megatron-core loads in any layout.

    Args:
        folder: existing.
        tensors: what it holds.
        objects: names of the modules' extra states, which are all empty.
        read: values of a tensor's rows; called once for each chunk.
    """
    index = Metadata({}, storage_data={}, storage_meta=StorageMeta())
    with (folder / DATA_FILE).open("wb") as file:
        place = _append(file, [None])
        for name in objects:
            index.state_dict_metadata[name] = BytesStorageMetadata()
            index.storage_data[MetadataIndex(name)] = place
        for tensor in tensors:
            _write_tensor(file, tensor, index, read)
    write_index(folder, index)


def write_index(folder: Path, index: Metadata) -> None:
    """Write what a checkpoint has beside its tensors: the index, megatron-core's version and its file of what is whole.

    Raises:
        OSError: the disk is full, say. (torch, given a path, raises a RuntimeError.)
    """
    nothing_whole = io.BytesIO()
    torch.save({}, nothing_whole)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    (folder / "common.pt").write_bytes(nothing_whole.getvalue())
    (folder / "metadata.json").write_text(json.dumps(BACKEND), encoding="utf-8")


def _write_tensor(
    file: BinaryIO, tensor: NewTensor, index: Metadata, read: Callable[[str, Rows], torch.Tensor]
) -> None:
    chunks = []
    names = (tensor.key, *tensor.aliases)
    for rows in tensor.chunks():
        window = rows.window(tensor.shape[1 if rows.index is None else 2 :])
        offsets = torch.Size(part.start for part in window)
        sizes = torch.Size(part.stop - part.start for part in window)
        place = _append(file, read(tensor.key, rows).view(sizes))
        chunks.append(ChunkStorageMetadata(offsets, sizes))
        index.storage_data |= {MetadataIndex(name, offsets): place for name in names}
    entry = TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)
    index.state_dict_metadata |= dict.fromkeys(names, entry)


def _append(file: BinaryIO, value: Any) -> _StorageInfo:
    start = file.tell()
    torch.save(value, file)
    return _StorageInfo(DATA_FILE, start, file.tell() - start)
