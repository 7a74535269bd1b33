"""Who starts the ranks: torchrun, srun, or this process on this host. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PARENT = "MEGATRON_MOE_PARENT_PID"
INIT_METHOD = "MEGATRON_MOE_INIT_METHOD"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun reads it too
USER_ERROR = 2  # exit code
POLL_S = 0.05
GRACE_S = 3.0  # for the other ranks' own errors, which tell who was first
TERMINATE_S = 5.0  # between SIGTERM and SIGKILL


def adopt_slurm_step(environment: dict[str, str]) -> None:
    """Give the tasks of an `srun` step the variables that torchrun would give them.

    The rendezvous is on the first node of the step, at a port that follows from the job's number.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    if "SLURM_PROCID" not in environment:
        return
    job = int(environment["SLURM_JOB_ID"])
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    tasks = environment["SLURM_STEP_TASKS_PER_NODE"].split(",")[0]  # "4(x2)"
    environment["LOCAL_WORLD_SIZE"] = re.match(r"\d+", tasks).group()
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(20000 + job % 20000))


def first_host(nodelist: str) -> str:
    """First name of a Slurm node list: 'n[007-12,20],m1' gives 'n007'."""
    prefix, bracket, rest = re.match(r"([^,\[]*)(\[?)(.*)", nodelist).groups()
    return prefix + re.match(r"\d+", rest).group() if bracket else prefix


def launched_world_size(environment: Mapping[str, str]) -> int | None:
    """Ranks that a launcher has started, or None where there is no launcher."""
    return int(environment["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= environment.keys() else None


@dataclass(frozen=True)
class Failure:
    """How a worker ended that should not have."""

    rank: int
    exit_code: int
    timestamp: float
    traceback: str

    @property
    def is_cause(self) -> bool:
        """Whether it died of something that no other rank's end can have brought about."""
        return -self.exit_code in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)

    @property
    def cause(self) -> str:
        """What ended it, in a few words."""
        if self.exit_code < 0:
            return f"was killed by {signal.Signals(-self.exit_code).name}"
        return f"ended with exit code {self.exit_code}"


def run_workers(command: Sequence[str], world_size: int) -> int:
    """Run `command` once per rank on this host and wait.

    The cores are divided among the ranks. One that fails ends all, and its traceback is shown; SIGINT and SIGTERM end
    all; workers end by themselves if this process is killed.

    Returns:
        0, the exit code of the rank that failed first (1 if a signal killed it), or 128 plus the number of the signal
        that ended this process (130 after SIGINT).
    """
    with tempfile.TemporaryDirectory(prefix="megatron_moe-") as folder:
        received: list[int] = []
        previous = {s: signal.signal(s, lambda n, _: received.append(n)) for s in (signal.SIGINT, signal.SIGTERM)}
        workers = []
        try:
            workers += [_start(command, rank, world_size, Path(folder)) for rank in range(world_size)]
            failures = _wait(workers, Path(folder), received)
        finally:
            _end(workers)
            for number, handler in previous.items():
                signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return _report(failures) if failures else 0


def end_with_parent(environment: Mapping[str, str]) -> None:
    """In a worker: end at once when the process that started it is gone."""
    if PARENT not in environment:
        return
    parent = int(environment[PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start(command: Sequence[str], rank: int, world_size: int, folder: Path) -> subprocess.Popen:
    threads = max(1, available_cores() // world_size)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        PARENT: str(os.getpid()),
        INIT_METHOD: f"file://{folder}/rendezvous",
        ERROR_FILE: str(_error_file(folder, rank)),
    }
    return subprocess.Popen(command, env=environment, start_new_session=True)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait(workers: Sequence[subprocess.Popen], folder: Path, received: list[int]) -> list[Failure]:
    """Until all have ended well, or one badly and the others had time to say why."""
    deadline = None
    ended: dict[int, float] = {}
    while not received:
        codes = [worker.poll() for worker in workers]
        for rank, code in enumerate(codes):
            if code is not None:
                ended.setdefault(rank, time.time())
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if None not in codes or (deadline is not None and time.monotonic() > deadline):
            return [_failure(rank, codes[rank], ended[rank], folder) for rank in failed]
        time.sleep(POLL_S)
    return []


def _failure(rank: int, exit_code: int, ended: float, folder: Path) -> Failure:
    file = _error_file(folder, rank)
    try:
        info = json.loads(file.read_text(encoding="utf-8"))["message"]["extraInfo"]
        return Failure(rank, exit_code, file.stat().st_mtime, info["py_callstack"])
    except (OSError, ValueError):
        return Failure(rank, exit_code, ended, "")


def record_failure(message: str, traceback: str, environment: Mapping[str, str]) -> bool:
    """Leave what ended this rank where its launcher (torchrun's agent or ours) looks for it.

    Returns:
        Whether our launcher will show it.
    """
    if ERROR_FILE in environment:
        info = {"py_callstack": traceback, "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": message, "extraInfo": info}})
        Path(environment[ERROR_FILE]).write_text(content, encoding="utf-8")
    return PARENT in environment


def _error_file(folder: Path, rank: int) -> Path:
    return folder / f"error_{rank}.json"


def _report(failures: list[Failure]) -> int:
    """Show the first failure, which is the cause, and name the others; returns the exit code."""
    first, *others = sorted(failures, key=lambda failure: (not failure.is_cause, failure.timestamp))
    if first.exit_code == USER_ERROR:
        print(first.traceback, file=sys.stderr)
        return USER_ERROR
    print(f"\nrank {first.rank} {first.cause}; all ranks were ended", file=sys.stderr)
    if first.traceback:
        print(first.traceback, file=sys.stderr)
    for other in others:
        last_line = other.traceback.strip().rsplit("\n", 1)[-1]
        print(f"rank {other.rank} {other.cause} afterwards: {last_line[:200]}", file=sys.stderr)
    return first.exit_code if first.exit_code > 0 else 1


def _end(workers: Sequence[subprocess.Popen]) -> None:
    """SIGTERM, then SIGKILL, to each worker's process group."""
    _signal(workers, signal.SIGTERM)
    deadline = time.monotonic() + TERMINATE_S
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        time.sleep(POLL_S)
    _signal(workers, signal.SIGKILL)
    for worker in workers:
        worker.wait()


def _signal(workers: Sequence[subprocess.Popen], number: signal.Signals) -> None:
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, number)
