"""Files that are there as a whole or not at all, also after a power cut. Needs nothing else of the project."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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
