"""Arrays that take a while to make: made once, by one process, and mapped by all."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.lib.format import open_memmap

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class ArrayCache:
    """Plain .npy files in one folder for each set of arrays; what is found there is never unpickled.

    A folder gets its name when it is whole. Where it cannot be written (a full disk), the arrays stay in memory.

    Attributes:
        folder: seen by all processes.
        local_folder: on a disk of this machine, for a copy that its processes map instead.
    """

    folder: Path
    local_folder: Path | None = None

    def get(self, kind: str, key: dict[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays that `build` makes, which must follow from `key`; not empty, and read-only."""
        name = f"{kind}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"

        def shared() -> Arrays:
            return _load(self.folder / name) or _make(self.folder / name, build)

        if self.local_folder is None:
            return shared()
        return _load(self.local_folder / name) or _make(self.local_folder / name, shared)


def _load(folder: Path, *, warn: bool = False) -> Arrays | None:
    """None where nothing is, or nothing that can be trusted."""
    if not folder.is_dir():
        return None
    try:
        shapes = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
        arrays = {name: open_memmap(folder / f"{name}.npy", mode="r") for name in shapes}
        if {name: _shape(array) for name, array in arrays.items()} != shapes or not shapes:
            raise ValueError("shapes.json describes other arrays")
    except Exception as error:  # numpy's reader has no common one for what it may find
        if warn:
            warnings.warn(f"{folder}: is damaged and made anew ({error})", stacklevel=2)
        return None
    return arrays


def _shape(array: np.ndarray) -> list[Any]:
    return [*array.shape, str(array.dtype)]


def _make(folder: Path, build: Callable[[], Arrays]) -> Arrays:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (arrays := _load(folder, warn=True)) is not None:
                return arrays  # made while this process waited
            arrays = build()
            _save(folder, arrays)
    except OSError as error:
        warnings.warn(f"{folder}: cannot be written ({error}); its arrays are held in memory", stacklevel=2)
        return build()
    return _load(folder) or arrays


def _save(folder: Path, arrays: Arrays) -> None:
    partial = new_folder_beside(folder)
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array, allow_pickle=False)
        shapes = {name: _shape(array) for name, array in arrays.items()}
        (partial / "shapes.json").write_text(json.dumps(shapes), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or it would have been loaded
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def new_folder_beside(folder: Path) -> Path:
    """A folder that no other process has, to be renamed to `folder`; readable for all that may read here."""
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    return partial
