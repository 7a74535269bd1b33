"""Reads checkpoints: checked against their manifest before a byte is used, and never as code."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import (
    _create_chunk_list,
    _create_read_item_for_tensor,
    _create_read_items,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_moe.checkpoint.chunks import as_chunk
from megatron_moe.checkpoint.dcp import read_index
from megatron_moe.checkpoint.manifest import problems_of, read_manifest, shares
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Verify
from megatron_moe.files import may_pass, naming


def damage(folder: Path, verify: Verify) -> list[str]:
    """What differs from a checkpoint's manifest; on all ranks, which share the work and all get all.

    Returns:
        A line for each file, beginning with it; none where the checkpoint is whole.

    Raises:
        OSError: on all ranks, if any could not read for now; it tells nothing of the checkpoint.
    """

    def differences() -> list[str]:
        files = read_manifest(folder)
        mine = shares(files, _world_size())[_rank()]
        return problems_of(folder, files, mine, contents=verify is Verify.full)

    return _problems_of_all(differences)


def refuse_damaged(folder: Path, verify: Verify) -> None:
    """Refuse a damaged checkpoint; on all ranks.

    Raises:
        ConfigError: with a line for each file that differs from the manifest.
    """
    if problems := damage(folder, verify):
        raise ConfigError(*problems)


def load(request: ShardedStateDict, folder: Path) -> None:
    """Fill this rank's tensors from a checkpoint of any layout, in place; on all ranks. `refuse_damaged` comes before.

    Source: megatron-core 0.16.1, dist_checkpointing/serialization.py and strategies/torch.py, `load`, which read
    `.metadata`, `common.pt` and objects with pickle.

    Raises:
        ConfigError: the checkpoint lacks a tensor, has it in another shape, or is of another version.
        OSError: on all ranks, if any could not read for now.
    """
    reader = _agreed_reader(folder)
    sharded, _ = extract_sharded_base(load_preprocess(request)[0])
    dict_list_map_inplace(_as_chunk, sharded)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded)
    to_validate = [place for place in nested_values(sharded) if isinstance(place, ShardedTensor)]
    planner = _Planner(shapes_validation_sharded_tensors=to_validate)
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            tensors = mcore_to_pyt_state_dict(by_key, True)
            _load_state_dict(tensors, reader, planner=planner, no_dist=_world_size() == 1)
    except (CheckpointException, CheckpointingException, KeyError, pickle.UnpicklingError) as error:
        raise _explained(error, folder) from error


def _agreed_reader(folder: Path) -> _Reader:
    """One on all ranks, or what is wrong, on all ranks."""
    readers: list[_Reader] = []

    def read() -> list[str]:
        readers.append(_Reader(folder))
        return []

    if problems := _problems_of_all(read):
        raise ConfigError(*problems)
    return readers[0]


class _NamingFileSystem(FileSystem):
    """torch's access to files, whose errors name the file, also those of reading."""

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[BinaryIO]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except OSError as error:
            raise naming(error, path) from error


class _Reader(FileSystemReader):
    """torch's reader, with an index that can run no code and names nothing outside of the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.fs = _NamingFileSystem()
        # Here: of errors in `read_metadata` torch prints a traceback, and looks for another index.
        self._index = read_index(folder, read_manifest(folder))

    def read_metadata(self) -> Metadata:
        """The index, of the whole checkpoint only."""
        return self._index

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """In the order of the files. More threads are slower where tensors are small: `torch.load` holds the GIL."""
        return dataclasses.replace(plan, items=sorted(plan.items, key=self._place))

    def _place(self, item: ReadItem) -> tuple[str, int]:
        info = self.storage_data[item.storage_index]
        return info.relative_path, info.offset


class _Planner(MCoreLoadPlanner):
    """megatron-core's planner, with objects that can run no code."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(flatten_state_dict=False, **kwargs)

    def create_local_plan(self) -> LoadPlan:
        """What to read; without torch's search for overlaps where the layout is the one that saved."""
        if missing := sorted(name for name in self.state_dict if name not in self.metadata.state_dict_metadata):
            raise CheckpointingException(f"has no {', '.join(missing[:3])}{', ...' if missing[3:] else ''}")
        self._validate_global_shapes(self.metadata, self.shapes_validation_sharded_tensors)
        return LoadPlan([read for name, value in self.state_dict.items() for read in self._reads(name, value)])

    def _reads(self, name: str, value: Any) -> list[ReadItem]:
        entry = self.metadata.state_dict_metadata[name]
        if isinstance(entry, TensorStorageMetadata):
            saved = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks}
            wanted = _create_chunk_list(value)
            if all((tuple(chunk.offsets), tuple(chunk.sizes)) in saved for chunk in wanted):
                return [_read_of_all(MetadataIndex(name, c.offsets, i), c.sizes) for i, c in enumerate(wanted)]
        return _create_read_items(name, entry, value)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """An object of a module: nothing but plain values and tensors."""
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _as_chunk(place: ShardedBase) -> ShardedBase:
    return as_chunk(place) if isinstance(place, ShardedTensor) else place


def _read_of_all(chunk: MetadataIndex, sizes: torch.Size) -> ReadItem:
    start = (0,) * len(sizes)
    return _create_read_item_for_tensor(chunk, start, chunk, start, sizes)


def _explained(error: Exception, folder: Path) -> ConfigError | OSError:
    """What the ranks raised, where torch has wrapped it."""
    causes = [error]
    if isinstance(error, CheckpointException) and error.failures:
        causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if not isinstance(cause, Exception):
            raise cause  # KeyboardInterrupt, say
        if isinstance(cause, OSError) and may_pass(cause):
            return cause
    return ConfigError(f"{folder}: {causes[0]}")


def _problems_of_all(find: Callable[[], list[str]]) -> list[str]:
    """What any rank finds or raises as a `ConfigError`, on all ranks.

    Raises:
        OSError: on all ranks, if any could not read for now.
    """
    mine: list[str] | OSError
    try:
        mine = find()
    except ConfigError as error:
        mine = list(error.problems)
    except OSError as error:
        mine = error
    everyone: list[list[str] | OSError] = [mine]
    if _world_size() > 1:
        everyone *= _world_size()
        dist.all_gather_object(everyone, mine)
    if errors := [each for each in everyone if isinstance(each, OSError)]:
        raise errors[0]
    return sorted(set().union(*everyone))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
