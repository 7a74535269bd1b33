"""The manifest of a checkpoint: its files with their sizes and SHA-256 digests. Needs no torch.

A folder without one was never finished. What a manifest does not name is not read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_moe.config.errors import ConfigError, unreadable
from megatron_moe.files import may_pass, naming, sync

MANIFEST = "manifest.json"
SMALL_BYTES = 64 * 2**20  # larger files are only measured where contents are not asked for
THREADS = 4
ALWAYS_READ = (".metadata", "state.json")


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint.

    Attributes:
        nbytes: its size.
        sha256: of its bytes, in hexadecimal.
    """

    nbytes: int
    sha256: str


Files = dict[str, FileEntry]


def entry_of(path: Path) -> FileEntry:
    """Size and digest of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(os.fstat(file.fileno()).st_size, digest.hexdigest())


def write_manifest(folder: Path, written: Files | None = None) -> None:
    """Name all files of a checkpoint; they, and the manifest, are on disk when this returns.

    Args:
        folder: of the checkpoint.
        written: files that are on disk already, with their digests; the others are read.
    """
    files = dict(written or {})
    for path in folder.iterdir():
        if path.name not in files and path.name != MANIFEST:
            files[path.name] = entry_of(path)
            sync(path)
    (folder / MANIFEST).write_text(_text(files), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> Files:
    """The files of a checkpoint.

    Raises:
        ConfigError: there is no manifest, or one that was not written so.
        OSError: the file system cannot be read for now.
    """
    path = folder / MANIFEST
    if path.is_symlink():
        raise ConfigError(f"{path}: is a link")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        if text != _text(files):
            raise ValueError("its digest differs")
        if not all(type(entry.nbytes) is int and entry.nbytes >= 0 for entry in files.values()):
            raise ValueError("a size is no number of bytes")
    except OSError as error:
        raise unreadable(path, error, "; the checkpoint is not whole") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: is damaged: {error}") from None
    outside = [name for name in files if Path(name).name != name or name in ("", ".", "..", MANIFEST)]
    if outside:
        raise ConfigError(f"{path}: names {outside[0]!r}, which is not a file of {folder}")
    return files


def problems_of(folder: Path, files: Files, names: Iterable[str] | None = None, *, contents: bool = True) -> list[str]:
    """What differs from the manifest, or is read of any checkpoint and not named by it; a line each, the file first.

    Args:
        folder: of the checkpoint.
        files: what it should hold, as `read_manifest` returns it.
        names: the files to compare; all by default.
        contents: compare the bytes of large files too, not only their sizes.

    Raises:
        OSError: the file system cannot be read for now.
    """
    unnamed = [f"{folder / name}: the manifest does not name it" for name in ALWAYS_READ if name not in files]
    names = files if names is None else names
    with ThreadPoolExecutor(THREADS) as pool:
        checked = pool.map(lambda name: _problem(folder / name, files[name], contents), names)
        return unnamed + [problem for problem in checked if problem is not None]


def check_whole(folder: Path) -> None:
    """Refuse a damaged checkpoint.

    Raises:
        ConfigError: with a line for each file that differs from the manifest.
    """
    if problems := problems_of(folder, read_manifest(folder)):
        raise ConfigError(*problems)


def shares(files: Files, count: int) -> list[list[str]]:
    """The files dealt out to `count` ranks, so that each has about as many bytes to compare."""
    parts: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for name in sorted(files, key=lambda name: (-files[name].nbytes, name)):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(name)
        sizes[smallest] += files[name].nbytes
    return parts


def rename_for_good(folder: Path, name: Path) -> None:
    """Give a folder its name, which lasts through a power cut."""
    folder.rename(name)
    sync(name.parent)


def _text(files: Files) -> str:
    entries = {name: asdict(files[name]) for name in sorted(files)}
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return json.dumps({"files": entries, "sha256": digest}, indent=1) + "\n"


def _problem(path: Path, expected: FileEntry, contents: bool) -> str | None:
    try:
        if path.is_symlink():
            return f"{path}: is a link"
        if not stat.S_ISREG((found := path.stat()).st_mode):
            return f"{path}: is no file"
        nbytes = found.st_size
        if nbytes != expected.nbytes:
            return f"{path}: is damaged: {nbytes:,} bytes instead of {expected.nbytes:,}"
        if (contents or nbytes <= SMALL_BYTES) and entry_of(path) != expected:
            return f"{path}: is damaged: its SHA-256 is not the manifest's"
    except OSError as error:
        if may_pass(error):
            raise naming(error, path) from error
        return f"{path}: {'is missing' if error.errno == errno.ENOENT else f'cannot be read: {error.strerror}'}"
    return None
