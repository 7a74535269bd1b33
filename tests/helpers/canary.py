"""What must not happen to a file of unknown origin: to be run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)
