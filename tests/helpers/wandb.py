"""Runs of wandb that lie in a folder, read by wandb's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def segments(run: Path) -> list[Path]:
    """Of the run's starts, in their order."""
    return sorted((run / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)


def records(segment: Path) -> list[Record]:
    """All that was written by one start."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def of_type(found: list[Record], kind: str) -> list[Record]:
    """The records of a type, without their envelope."""
    return [record[kind] for record in found if record["type"] == kind]


def history(found: list[Record]) -> list[Record]:
    """The logged steps, by name of metric; a file's name ends in `._type` and the like."""
    return [row["item"] for row in of_type(found, "history")]
