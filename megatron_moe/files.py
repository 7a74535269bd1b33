"""Files that are there as a whole or not at all, also after a power cut; and what is wrong with those that are not.

Needs nothing else of the project.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

# The same at the next try. Others, such as EIO, ESTALE and ETIMEDOUT, are the file system's for now.
LASTING = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


def may_pass(error: OSError) -> bool:
    """Whether an error tells of the file system at this moment, and nothing of the file."""
    return error.errno is not None and error.errno not in LASTING


def naming(error: OSError, path: Path) -> OSError:
    """The same error with the file's name, which errors of reading lack."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, or leave the one that is there as it is."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    sync(partial)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """As `write_whole`, for people to read."""
    write_whole(path, f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode())


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
