"""Writes checkpoints in torch's distributed format, as megatron-core has it; threads of this process write the files.

megatron-core 0.16.1 forks a process for each file and starts one more that collects the results
(strategies/filesystem_async.py), which takes seconds, is unsafe beside the threads of gloo and NCCL, and waits for ever
for a process that was killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch import Tensor
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

from megatron_moe.checkpoint.chunks import as_chunk
from megatron_moe.checkpoint.manifest import FileEntry, Files
from megatron_moe.distributed.context import from_main

MAX_FILES = 4  # of a rank, each written by a thread
CPU = torch.device("cpu")
Entries = dict[str, TensorStorageMetadata | BytesStorageMetadata]


@dataclass(frozen=True)
class Item:
    """What a rank writes of a tensor, or an object.

    Attributes:
        index: its name and its place in the whole tensor.
        entry: what the checkpoint's index says of it.
        data: a tensor, or the bytes of an object.
    """

    index: MetadataIndex
    entry: TensorStorageMetadata | BytesStorageMetadata
    data: Tensor | bytes

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.data.nbytes if isinstance(self.data, Tensor) else len(self.data)


@dataclass(frozen=True)
class SavePlan:
    """What a rank writes: in every save of a run the same tensors, with other values.

    Attributes:
        files: by name.
        entries: of all ranks; on rank 0.
        is_fixed: whether no module, of any rank, has a state beside its tensors, whose bytes would be this save's.
    """

    files: dict[str, list[Item]]
    entries: Entries
    is_fixed: bool


@dataclass(frozen=True)
class Written:
    """What a rank has written: where each item lies, and the files."""

    places: dict[MetadataIndex, _StorageInfo]
    files: Files


def plan_save(state: ShardedStateDict) -> SavePlan:
    """Agree which rank writes what; on all ranks. Nothing is written yet.

    Args:
        state: this rank's tensors with their places in the whole model.
    """
    sharded, _ = save_preprocess(state, True)
    mine = [place for place in nested_values(sharded) if is_main_replica(place.replica_id)]
    items = [_item(place) for place in mine]
    entries: list[Any] = [None] * dist.get_world_size()
    is_fixed = all(_is_nothing(place.data) for place in mine if isinstance(place, ShardedObject))
    found = [(item.index.fqn, item.entry) for item in items], is_fixed
    dist.gather_object(found, entries if dist.get_rank() == 0 else None)
    is_main = dist.get_rank() == 0
    merged = _merged(entry for rank, _ in entries for entry in rank) if is_main else {}
    return SavePlan(_dealt(items), merged, is_fixed=from_main(lambda: all(is_fixed for _, is_fixed in entries)))


def _is_nothing(data: Any) -> bool:
    """Whether a module has no state beside its tensors; Transformer Engine's then give an empty tensor."""
    return data is None or (isinstance(data, Tensor) and data.numel() == 0)


def _item(place: ShardedTensor | ShardedObject) -> Item:
    if isinstance(place, ShardedObject):
        buffer = io.BytesIO()
        torch.save([place.data], buffer)
        return Item(MetadataIndex(place.unique_key), BytesStorageMetadata(), buffer.getvalue())
    chunk = as_chunk(place)
    offset, size = torch.Size(chunk.global_offset), torch.Size(chunk.local_shape)
    properties = TensorProperties.create_from_tensor(chunk.data)
    entry = TensorStorageMetadata(properties, torch.Size(chunk.global_shape), [ChunkStorageMetadata(offset, size)])
    return Item(MetadataIndex(chunk.key, offset), entry, chunk.data)


def _merged(entries: Iterable[tuple[str, TensorStorageMetadata | BytesStorageMetadata]]) -> Entries:
    merged: Entries = {}
    for name, entry in entries:
        if isinstance(entry, TensorStorageMetadata) and name in merged:
            merged[name].chunks.extend(entry.chunks)
        else:
            merged[name] = entry
    return merged


def _dealt(items: list[Item]) -> dict[str, list[Item]]:
    """To files of about the same size."""
    count = min(MAX_FILES, max(2, torch.get_num_threads()))
    files: dict[str, list[Item]] = {f"__{dist.get_rank()}_{i}.distcp": [] for i in range(count)}
    sizes = dict.fromkeys(files, 0)
    for item in sorted(items, key=lambda item: item.nbytes, reverse=True):
        smallest = min(sizes, key=sizes.__getitem__)
        files[smallest].append(item)
        sizes[smallest] += item.nbytes
    return {name: content for name, content in files.items() if content}


class Staging:
    """Host memory that tensors are copied to before they are written, taken once."""

    def __init__(self) -> None:
        self._memory: dict[MetadataIndex, Tensor] = {}

    def copy(self, plan: SavePlan) -> SavePlan:
        """The same with tensors that the training does not change."""
        tensors = [item.data for items in plan.files.values() for item in items if isinstance(item.data, Tensor)]
        with _beside_the_training(next((t.device for t in tensors if t.is_cuda), CPU)):
            files = {name: [self._copied(item) for item in items] for name, items in plan.files.items()}
        return dataclasses.replace(plan, files=files)

    def _copied(self, item: Item) -> Item:
        if not isinstance(item.data, Tensor):
            return item
        if item.index not in self._memory:
            self._memory[item.index] = torch.empty_like(item.data, device="cpu", pin_memory=item.data.is_cuda)
        return dataclasses.replace(item, data=self._memory[item.index].copy_(item.data, non_blocking=True))


@contextmanager
def _beside_the_training(device: torch.device) -> Iterator[None]:
    """On a GPU: copies on a stream of their own, after what is under way; all are done in the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def write(plan: SavePlan, folder: Path) -> Written:
    """Write this rank's files; they are on disk when this returns.

    Raises:
        OSError: the disk is full, say.
    """
    with ThreadPoolExecutor(len(plan.files)) as pool:
        parts = list(pool.map(lambda name: _write_file(folder / name, plan.files[name]), plan.files))
    return Written(
        {index: place for places, _ in parts for index, place in places.items()},
        {name: entry for name, (_, entry) in zip(plan.files, parts, strict=True)},
    )


def _write_file(path: Path, items: list[Item]) -> tuple[dict[MetadataIndex, _StorageInfo], FileEntry]:
    places = {}
    with path.open("wb") as file:
        stream = _DigestingStream(file)
        for item in items:
            start = stream.tell()
            if isinstance(item.data, Tensor):
                _save(_whole(item.data), stream)
            else:
                stream.write(item.data)
            places[item.index] = _StorageInfo(path.name, start, stream.tell() - start)
        file.flush()
        os.fsync(file.fileno())
    return places, FileEntry(stream.tell(), stream.digest.hexdigest())


def _save(data: Tensor, stream: _DigestingStream) -> None:
    try:
        torch.save(data, stream)
    except RuntimeError as error:  # of the archive, which cannot be closed where it could not be written
        raise error.__context__ or error from None


def index_of(plan: SavePlan, written: Iterable[Written]) -> Metadata:
    """Of all ranks' files, on rank 0. Nothing in it differs between two saves of the same."""
    places = {index: place for rank in written for index, place in rank.places.items()}
    return Metadata(plan.entries, storage_data=places, storage_meta=StorageMeta())


class _DigestingStream:
    """A file that is written once from its beginning to its end, and its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        count = self._file.write(data)
        self._position += count
        return count

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        self._file.flush()


def _whole(data: Tensor) -> Tensor:
    """On the CPU, and alone in its storage: torch saves all of a storage that a tensor is a part of."""
    data = data.cpu()
    return data.clone() if data.untyped_storage().nbytes() != data.nbytes else data
