"""Writes checkpoints: megatron-core plans which rank writes what, threads of this process write it.

megatron-core 0.16.1 forks a process for each file and starts one more that collects the results
(strategies/filesystem_async.py), which takes seconds, is unsafe beside the threads of gloo and NCCL, and waits for ever
for a process that was killed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    SerializationFormat,
    _split_by_size_and_type,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_moe.checkpoint.manifest import FileEntry, Files

FILES_A_RANK = 2  # each written by a thread
FORMAT = SerializationFormat.TORCH_SAVE


@dataclass
class SavePlans:
    """What the first save of a run found out, and the others use: tensors change, their names and places do not.

    Attributes:
        central: what this rank writes.
        local: what it asked to write.
        metadata: the index, but for the places; on rank 0.
        staging: host memory that tensors are copied to, so that it is taken once.
    """

    central: SavePlan | None = None
    local: SavePlan | None = None
    metadata: Metadata | None = None
    staging: dict[MetadataIndex, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What a rank has written: where each tensor lies, and the files."""

    results: list[WriteResult]
    files: Files


def plan_save(state: ShardedStateDict, folder: Path, plans: SavePlans, *, staged: bool) -> Writer:
    """Agree which rank writes what; on all ranks. Nothing is written yet.

    Args:
        state: this rank's tensors with their places in the whole model.
        folder: that the files go to.
        plans: of this run; filled by its first save, which also checks that all of each tensor is saved once.
        staged: copy everything before it is written, so that training can go on meanwhile.
    """
    known = plans.central is not None
    sharded, _ = save_preprocess(state, not known)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    writer = Writer(folder, plans.staging if staged else None)
    planned = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(by_key, False),
        writer,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        cached_ckpt_structure=(plans.central, plans.local, known),
    )
    (_, metadata, _), plans.central, plans.local, _, _ = planned
    if not known and metadata is not None:
        del metadata.all_local_plans  # only for a cache of megatron-core's that is not used here
        plans.metadata = metadata
    return writer


class Writer(FileSystemWriterAsync):
    """One rank's part of a save.

    Source: megatron-core 0.16.1, strategies/filesystem_async.py, whose format this is.
    """

    def __init__(self, folder: Path, staging: dict[MetadataIndex, Tensor] | None) -> None:
        super().__init__(str(folder), thread_count=FILES_A_RANK)
        self._folder = folder
        self._staging = staging
        self._contents: dict[str, list[tuple[WriteItem, Any]]] = {}
        self.is_copied = threading.Event()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is: rank 0 makes the folder, and says so where it cannot."""
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Deal the tensors out to files."""
        prefix = plan.storage_data.prefix
        parts = [part for part in _split_by_size_and_type(self.thread_count, plan.items) if part]
        for number, part in enumerate(parts):
            contents = [(item, planner.resolve_data(item)) for item in part]
            self._contents[f"{prefix}{number}{DEFAULT_SUFFIX}"] = contents

    def write(self) -> Written:
        """Copy what must be, then write this rank's files, until they are on disk.

        Raises:
            OSError: the disk is full, say.
        """
        self._stage()
        self.is_copied.set()
        with ThreadPoolExecutor(FILES_A_RANK) as pool:
            parts = list(pool.map(self._write_file, self._contents))
        names = list(self._contents)
        self._contents.clear()
        return Written(
            [result for results, _ in parts for result in results],
            {name: entry for name, (_, entry) in zip(names, parts, strict=True)},
        )

    def storage_meta(self) -> StorageMeta:
        """Nothing that would differ between two saves of the same."""
        return StorageMeta()

    def _stage(self) -> None:
        if self._staging is not None:
            for name, contents in self._contents.items():
                self._contents[name] = [(item, self._copy(item, data)) for item, data in contents]

    def _copy(self, item: WriteItem, data: Any) -> Any:
        if not isinstance(data, Tensor):
            return data
        if item.index not in self._staging:
            self._staging[item.index] = torch.empty_like(data, device="cpu", memory_format=torch.contiguous_format)
        return self._staging[item.index].copy_(data.detach())

    def _write_file(self, name: str) -> tuple[list[WriteResult], FileEntry]:
        with (self._folder / name).open("wb") as file:
            stream = _DigestingStream(file)
            results = [
                _write_item(_StorageWriterTransforms(), stream, _whole(data), item, name, FORMAT)
                for item, data in self._contents[name]
            ]
            file.flush()
            os.fsync(file.fileno())
        return results, FileEntry(stream.tell(), stream.digest.hexdigest())


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

    def close(self) -> None:
        """Of a single tensor: the file goes on."""


def _whole(data: Any) -> Any:
    """On the CPU, and alone in its storage: torch saves all of a storage that a tensor is a part of."""
    if not isinstance(data, Tensor):
        return data
    data = data.detach().cpu()
    return data.clone() if data.untyped_storage().nbytes() != data.nbytes else data
