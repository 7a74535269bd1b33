"""What a rank leaves behind that failed or hung, and how its launcher shows it. Imports no torch."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.distributed.watchdog import STACK_FILE

PARENT = "MEGATRON_MOE_PARENT_PID"  # set in workers of ours
EXIT_CODES = "MEGATRON_MOE_EXIT_CODES"  # a folder, named where the launcher is torchrun in a Slurm job
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun reads it too
USER_ERROR, TRAINING_ERROR, PREEMPTED, INTERRUPTED = 2, 3, 75, 130  # exit codes, see pretrain.py
EXPLAINED = (USER_ERROR, TRAINING_ERROR)  # those whose message says it all
FRAMES = 20  # of a stack are shown
CALLS_OF_MODULES = "torch/nn/modules/module.py"  # every second frame, which says nothing
TIMEOUT = "Timeout ("  # begins what faulthandler writes for the watchdog


@dataclass(frozen=True)
class Failure:
    """How a worker ended that should not have.

    Attributes:
        rank: of the worker.
        exit_code: minus the signal's number if one killed it.
        timestamp: when it wrote its error or, without one, ended; seconds since the epoch.
        text: the traceback or message it left, else its stack, else nothing.
    """

    rank: int
    exit_code: int
    timestamp: float
    text: str

    @property
    def is_cause(self) -> bool:
        """Whether it died of something that no other rank's end can have brought about."""
        return -self.exit_code in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)

    @property
    def reason(self) -> str:
        """Who and what, in a few words."""
        return f"rank {self.rank} {self.cause}"

    @property
    def summary(self) -> str:
        """A line for one that was not the first; all of the stack where several hung."""
        return self.text if self.text.startswith(TIMEOUT) else self.text.strip().rsplit("\n", 1)[-1][:200]

    @property
    def cause(self) -> str:
        """What ended it, in a few words."""
        if self.exit_code < 0:
            return f"was killed by {signal.Signals(-self.exit_code).name}"
        if self.text.startswith(TIMEOUT):
            return "ended itself, as it got no further for 1.1 times parallel.timeout_minutes"
        return f"ended with exit code {self.exit_code}"


@dataclass(frozen=True)
class Hang:
    """A worker that had to be ended after another one failed.

    Attributes:
        rank: of the worker.
        was_stopped: whether it was suspended, as by SIGSTOP.
        stack: where it was, the most recent frame first; empty if it did not say.
    """

    rank: int
    was_stopped: bool
    stack: str

    @property
    def report(self) -> str:
        """For a terminal."""
        begin = f"rank {self.rank} did not end{' (it was suspended)' if self.was_stopped else ''}"
        return f"{begin}; it was in:\n{self.stack}" if self.stack else f"{begin}, and left no stack"


def files(folder: Path, rank: int) -> dict[str, str]:
    """The variables that tell a worker where to leave what its launcher reads."""
    return {ERROR_FILE: str(folder / f"error_{rank}.json"), STACK_FILE: str(folder / f"stack_{rank}.txt")}


def record_failure(message: str, text: str, environment: Mapping[str, str]) -> bool:
    """Leave what ended this rank, a traceback or lines for the user, where its launcher (torchrun or ours) looks.

    Returns:
        Whether our launcher will show it.
    """
    if ERROR_FILE in environment:
        info = {"py_callstack": text, "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": message, "extraInfo": info}})
        Path(environment[ERROR_FILE]).write_text(content, encoding="utf-8")
    return PARENT in environment


def record_exit_code(code: int, environment: Mapping[str, str]) -> None:
    """Leave an empty file named as the exit code, where asked for: torchrun ends with 1 whatever its ranks end with."""
    if EXIT_CODES in environment:
        Path(environment[EXIT_CODES], str(code)).touch()


def read_failure(folder: Path, rank: int, exit_code: int, ended: float) -> Failure:
    """Of a worker that ended at a time, in seconds since the epoch."""
    file = Path(files(folder, rank)[ERROR_FILE])
    try:
        text = json.loads(file.read_text(encoding="utf-8"))["message"]["extraInfo"]["py_callstack"]
        return Failure(rank, exit_code, file.stat().st_mtime, text)
    except (OSError, ValueError):
        return Failure(rank, exit_code, ended, "\n".join(read_stack(folder, rank)).strip())


def read_stack(folder: Path, rank: int) -> tuple[str, str]:
    """What made `faulthandler` write the stacks of a worker, and the latest frames of its main thread, the last listed.

    Empty if it has not.
    """
    file = Path(files(folder, rank)[STACK_FILE])
    content = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    cause, *threads = re.split(r"^(?:Current thread|Thread) 0x.*\n", content, flags=re.MULTILINE)
    lines = threads[-1].splitlines() if threads else []
    frames = [line for line in lines if line.startswith("  File ") and CALLS_OF_MODULES not in line]
    more = [f"  ... {len(frames) - FRAMES} more"] if len(frames) > FRAMES else []
    return cause.strip(), "\n".join([*frames[:FRAMES], *more])


def first_of(failures: Sequence[Failure]) -> Failure:
    """The one that brought about the others."""
    return min(failures, key=lambda failure: (not failure.is_cause, failure.timestamp))


def report(failures: Sequence[Failure], hangs: Sequence[Hang]) -> str:
    """The first failure, which is the cause; what the others ended with; and where the rest was."""
    first = first_of(failures)
    if first.exit_code in EXPLAINED:
        return first.text
    later = sorted((failure for failure in failures if failure is not first), key=lambda failure: failure.timestamp)
    lines = [
        f"\n{first.reason}; all ranks were ended",
        first.text,
        *(f"{failure.reason} afterwards: {failure.summary}" for failure in later),
        *(hang.report for hang in hangs),
    ]
    return "\n".join(line for line in lines if line)
