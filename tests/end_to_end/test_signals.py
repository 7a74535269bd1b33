"""Runs that are asked to stop, killed and suspended, as on a cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import ROOT, metrics_of, processes_mentioning, run_cli, user_environment
from tests.helpers.runs import UNEQUAL
from tests.helpers.training import TINY

STEPS = 60
RUN = [
    *(option for option in TINY if not option.startswith("train.train_steps")),
    f"train.train_steps={STEPS}",
    "evaluation.interval=1000",
    "evaluation.num_samples=8",
    "logger.log_interval=1",
    "checkpoint.save_interval=1000",
]
TIMEOUT_MINUTES = 0.25


class Command:
    """A pretrain.py that runs."""

    def __init__(self, name: str, cwd: Path, *arguments: str) -> None:
        self.mark = f"run.name={name}"
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "pretrain.py"), *RUN, *arguments, self.mark],
            cwd=cwd,
            env=user_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        for line in self.process.stdout:
            if line.startswith("step") and int(line.split()[1].split("/")[0]) >= step:
                return
        raise AssertionError(self.process.stderr.read())

    def rank(self, number: int) -> int:
        """The process of a rank, as soon as it is there."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for pid in processes_mentioning(self.mark):
                with contextlib.suppress(OSError):
                    if f"\0RANK={number}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                        return pid
        raise AssertionError(f"rank {number} was not started")

    def end(self, timeout: float = 90) -> tuple[int, str]:
        """Exit code and standard error; nothing of it runs any more."""
        _, errors = self.process.communicate(timeout=timeout)
        assert processes_mentioning(self.mark) == []
        return self.process.returncode, errors


@contextlib.contextmanager
def started(name: str, cwd: Path, *arguments: str) -> Iterator[Command]:
    command = Command(name, cwd, *arguments)
    try:
        yield command
    finally:
        command.process.kill()  # its ranks end with it
        command.process.wait()


def computed(run: Path) -> list[dict[str, Any]]:
    """The logged steps without what the clock and the memory say."""
    return [{name: value for name, value in line.items() if not name.startswith(UNEQUAL)} for line in metrics_of(run)]


def newest_step(run: Path) -> int:
    return max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


@pytest.mark.soak("asked to stop")
@pytest.mark.parametrize("readers", [0, 1])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bitwise(readers: int, tmp_path: Path) -> None:
    """Asked while it starts, then at the command, then at one rank; with a reader's process, all of them at once."""
    layout = ["parallel=ep2", f"data.num_workers={readers}"]
    whole = run_cli("pretrain.py", *RUN, *layout, "run.name=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "runs" / "cut"

    last = 0
    everyone = [("everyone", signal.SIGTERM)]
    alone = [("start", signal.SIGTERM), ("command", signal.SIGUSR1), ("rank", signal.SIGTERM), ("rank", signal.SIGUSR1)]
    for target, number in everyone if readers else alone:
        with started("cut", tmp_path, *layout) as command:
            if target == "start":
                command.rank(1)
            else:
                command.wait_for_step(last + 3)
            receivers = {
                "start": [command.process.pid],
                "command": [command.process.pid],
                "rank": [command.rank(1)],
                "everyone": processes_mentioning(command.mark),
            }[target]
            assert len(receivers) == (5 if target == "everyone" else 1)
            for pid in receivers:
                os.kill(pid, number)
            code, errors = command.end()
        assert code == 75, errors
        step = newest_step(run)
        assert last < step < STEPS
        (line,) = [line for line in errors.splitlines() if "stopped by" in line]
        who = f"stopped by {number.name}" if target != "rank" else "stopped by a signal to another rank"
        assert line == f"{who} at step {step}, saved; the same command goes on"
        assert "Traceback" not in errors
        last = step

    finished = run_cli("pretrain.py", *RUN, *layout, "run.name=cut", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert computed(run) == computed(tmp_path / "runs" / "whole")


def test_one_process_alone_saves_too(tmp_path: Path) -> None:
    with started("alone", tmp_path) as command:
        command.wait_for_step(2)
        command.process.send_signal(signal.SIGTERM)
        code, errors = command.end()
    assert code == 75, errors
    step = newest_step(tmp_path / "runs" / "alone")
    assert f"stopped by SIGTERM at step {step}, saved; the same command goes on" in errors


def test_a_suspended_rank_is_found_and_nothing_is_left(tmp_path: Path) -> None:
    layout = ["parallel=ep2", f"parallel.timeout_minutes={TIMEOUT_MINUTES}", "train.train_steps=100000"]
    with started("suspended", tmp_path, *layout) as command:
        command.wait_for_step(3)
        os.kill(command.rank(1), signal.SIGSTOP)
        start = time.monotonic()
        code, errors = command.end()
    assert time.monotonic() - start < TIMEOUT_MINUTES * 60 * 1.1 + 10  # the launcher's grace, and the ends of processes
    assert code == 1
    assert "rank 0 ended with exit code 1; all ranks were ended" in errors
    assert "rank 1 did not end (it was suspended); it was in:\n  File" in errors


@pytest.mark.soak("SIGKILL of random ranks, restarted automatically")
@pytest.mark.parametrize("layout", ["parallel=single", "parallel=ep2"])
def test_a_killed_run_is_started_again_and_goes_on_bitwise(layout: str, tmp_path: Path) -> None:
    whole = run_cli("pretrain.py", *RUN, layout, "run.name=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    saving = ["checkpoint.save_interval=10", "--auto-restart", "2"]
    with started("killed", tmp_path, layout, *saving) as command:
        command.wait_for_step(14)
        rank = 0 if layout == "parallel=single" else 1
        os.kill(command.rank(rank), signal.SIGKILL)
        code, errors = command.end()
    assert code == 0, errors
    assert f"restart 1 of 2 from step 10: rank {rank} was killed by SIGKILL" in errors
    assert computed(tmp_path / "runs" / "killed") == computed(tmp_path / "runs" / "whole")
