"""Run pretrain.py and the tools as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_cli(*command: str, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python script of the project with arguments, in a folder; output captured."""
    script = str(ROOT / command[0])
    return subprocess.run(
        [sys.executable, script, *command[1:]],
        cwd=cwd,
        env=user_environment() | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_shell(command: str, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """A line of the README in a shell, with the environment that runs the tests; output captured."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=user_environment() | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def user_environment() -> dict[str, str]:
    """The environment without what the test runner set."""
    hidden = ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {key: value for key, value in os.environ.items() if key not in hidden}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def processes_mentioning(text: str) -> list[int]:
    """Living processes whose command line holds a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has just ended
    return [pid for pid in found if pid != os.getpid()]
