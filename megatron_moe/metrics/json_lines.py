"""A file of JSON objects, one a line, that a full disk, a crash or a restart leaves readable."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from megatron_moe.files import write_whole


class JsonLines:
    """Appends; what cannot be written is told once, kept, and written with the next that can be."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._end = self._file.tell()
        self._waiting = b""

    def write(self, value: dict[str, Any]) -> None:
        """Append an object; numbers that are not finite are refused."""
        told = bool(self._waiting)
        self._waiting += json.dumps(value, allow_nan=False).encode() + b"\n"
        self._flush(told=told)

    def _flush(self, *, told: bool) -> None:
        try:
            if self._file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)  # no half a line
            if not told:
                sys.stderr.write(f"warning: {self._file.name}: {error.strerror}; it goes on when it can be written\n")
        else:
            self._end += len(self._waiting)
            self._waiting = b""

    def close(self) -> None:
        """Give the file back, after a last try."""
        if self._waiting:
            self._flush(told=True)
        if self._waiting:
            sys.stderr.write(f"warning: {self._file.name}: the last {self._waiting.count(10)} lines are lost\n")
        self._file.close()


def drop_after(path: Path, step: int) -> int:
    """Forget steps that were logged after the checkpoint that the run goes on from, and lines that were cut off.

    Returns:
        The last step that was there, 0 if there was none.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    kept = [line for line, logged in zip(lines, steps, strict=True) if line.endswith(b"\n") and logged <= step]
    if len(kept) < len(lines):
        write_whole(path, b"".join(kept))
    return int(max(filter(math.isfinite, steps), default=0))


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
