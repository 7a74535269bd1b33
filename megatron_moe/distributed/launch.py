"""Who starts the ranks: torchrun, srun, or this process on this host. Imports no torch."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.distributed import signals
from megatron_moe.distributed.failures import (
    INTERRUPTED,
    PARENT,
    PREEMPTED,
    TRAINING_ERROR,
    USER_ERROR,
    Hang,
    files,
    first_of,
    read_failure,
    read_stack,
    report,
)

INIT_METHOD = "MEGATRON_MOE_INIT_METHOD"
FINAL = (0, USER_ERROR, TRAINING_ERROR, PREEMPTED, INTERRUPTED)  # exit codes after which a restart would not help
POLL_S = 0.05
GRACE_S = 3.0  # for the other ranks' own errors, which tell who was first
ABORT_S = 5.0  # for the stacks of those that hang
GONE_S = 2.0  # for the kernel to end what was killed
RESTART_PAUSE_S = 2.0  # for devices and ports to become free
MOST_IDLE = 3  # attempts in a row without a new checkpoint


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
    environment.setdefault("MASTER_PORT", str(20000 + job % 10000))


def first_host(nodelist: str) -> str:
    """First name of a Slurm node list: 'n[007-12,20],m1' gives 'n007'."""
    prefix, bracket, rest = re.match(r"([^,\[]*)(\[?)(.*)", nodelist).groups()
    return prefix + re.match(r"\d+", rest).group() if bracket else prefix


def launched_world_size(environment: Mapping[str, str]) -> int | None:
    """Ranks that a launcher has started, or None where there is no launcher."""
    return int(environment["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= environment.keys() else None


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: its exit code, and after a failure why, in a few words."""

    exit_code: int
    reason: str = ""


def run_workers(command: Sequence[str], world_size: int) -> int:
    """Run `command` once per rank on this host and wait.

    The cores are divided among the ranks. One that fails ends all, and its traceback is shown; SIGINT ends all; workers
    end by themselves if this process is killed. SIGTERM and SIGUSR1 are passed on to the workers, which take the time
    they need, and end with `PREEMPTED` when they have saved.

    Returns:
        0, `PREEMPTED`, `INTERRUPTED` after SIGINT, or the exit code of the rank that failed first (1 if a signal
        killed it).
    """
    with _caught_signals() as received:
        return _attempt(command, world_size, received).exit_code


def run_workers_again(command: Sequence[str], world_size: int, *, restarts: int, newest_step: Callable[[], int]) -> int:
    """As `run_workers`, but start all again after a failure that may not come back.

    Args:
        command: of a worker.
        world_size: number of workers.
        restarts: at most so many; fewer where three attempts in a row end without a new checkpoint.
        newest_step: of the newest checkpoint, 0 if there is none.

    Returns:
        As `run_workers`, of the last attempt; `PREEMPTED` if a signal came between two.
    """
    with _caught_signals() as received:
        used = idle = 0
        while True:
            before = newest_step()
            ending = _attempt(command, world_size, received)
            step = newest_step()
            idle = idle + 1 if step == before else 0
            if ending.exit_code in FINAL or received:
                return ending.exit_code
            if used == restarts or idle == MOST_IDLE:
                limit = f"no new checkpoint in {idle} attempts" if idle == MOST_IDLE else f"{restarts} restarts used"
                print(f"not started again, {limit}: {ending.reason}", file=sys.stderr)
                return ending.exit_code
            used += 1
            print(f"restart {used} of {restarts} from step {step:,}: {ending.reason}", file=sys.stderr, flush=True)
            _pause(received)
            if received:
                print("stopped before it; the same command goes on", file=sys.stderr)
                return INTERRUPTED if signal.SIGINT in received else PREEMPTED


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
        **files(folder, rank),
    }
    return subprocess.Popen(command, env=environment, start_new_session=True)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """The signals that this process gets, which do nothing else meanwhile."""
    received: list[int] = []
    numbers = (signal.SIGINT, *signals.STOP_SIGNALS)
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _attempt(command: Sequence[str], world_size: int, received: list[int]) -> Ending:
    """Start the workers and see them end; none is left, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="megatron_moe-") as name:
        folder = Path(name)
        workers: list[subprocess.Popen] = []
        hung: dict[int, bool] = {}
        try:
            with signals.held_back():  # in the workers too, until they can note them
                workers += (_start(command, rank, world_size, folder) for rank in range(world_size))
            ended = _wait(workers, received)
            if signal.SIGINT not in received:
                hung = _abort(workers)
        finally:
            _kill(workers)
        if signal.SIGINT in received:
            return Ending(INTERRUPTED)
        codes = {rank: workers[rank].returncode for rank in ended}
        bad = [rank for rank, code in codes.items() if code not in (0, PREEMPTED)]
        if not bad:
            return Ending(PREEMPTED if PREEMPTED in codes.values() else 0)
        failures = [read_failure(folder, rank, codes[rank], ended[rank]) for rank in bad]
        hangs = [Hang(rank, was_suspended, read_stack(folder, rank)[1]) for rank, was_suspended in hung.items()]
        print(report(failures, hangs), file=sys.stderr, flush=True)
        first = first_of(failures)
        return Ending(max(first.exit_code, 1), first.reason)


def _wait(workers: Sequence[subprocess.Popen], received: list[int]) -> dict[int, float]:
    """Until all have ended well, or one badly and the others had time to say why, or this process is interrupted.

    Returns:
        The ranks that have ended, and when: seconds since the epoch.
    """
    ended: dict[int, float] = {}
    deadline = math.inf
    passed_on = 0
    while signal.SIGINT not in received:
        for number in received[passed_on:]:
            passed_on += 1
            for worker in workers:
                worker.send_signal(number)
        for rank, worker in enumerate(workers):
            if rank not in ended and worker.poll() is not None:
                ended[rank] = time.time()
                if worker.returncode not in (0, PREEMPTED):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if len(ended) == len(workers) or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return ended


def _abort(workers: Sequence[subprocess.Popen]) -> dict[int, bool]:
    """Have those that still run leave their stacks: their ranks, and whether they were suspended, as by SIGSTOP."""
    running = {rank: worker for rank, worker in enumerate(workers) if worker.poll() is None}
    suspended = {rank: _is_suspended(worker.pid) for rank, worker in running.items()}
    for worker in running.values():
        worker.send_signal(signal.SIGABRT)
        worker.send_signal(signal.SIGCONT)  # a suspended one takes the other signal first
    deadline = time.monotonic() + ABORT_S
    while time.monotonic() < deadline and any(worker.poll() is None for worker in running.values()):
        time.sleep(POLL_S)
    return suspended


def _is_suspended(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # macOS
        return False
    return status.rpartition(")")[2].split()[0] == "T"


def _kill(workers: Sequence[subprocess.Popen]) -> None:
    """End each worker's process group, the worker and those that read data for it, and wait until none is left."""
    for worker in workers:
        _signal_group(worker.pid, signal.SIGKILL)
        worker.wait()
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline and any(_signal_group(worker.pid, 0) for worker in workers):
        time.sleep(POLL_S)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal, 0 for none, to a process group; returns whether there is one."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # the latter on macOS, of zombies
        return False
    return True


def _pause(received: list[int]) -> None:
    """Before a restart, unless a signal comes."""
    deadline = time.monotonic() + RESTART_PAUSE_S
    while time.monotonic() < deadline and not received:
        time.sleep(POLL_S)
