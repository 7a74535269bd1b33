"""One process at a time trains a run: two would write over each other's checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_moe.config.errors import ConfigError
from megatron_moe.distributed.context import from_main
from megatron_moe.files import may_pass

LOCK = "run.lock"
HERE_S = 10.0  # for a process that is ending
ELSEWHERE_S = 120.0  # an NFS server gives the locks of a client that has died free after a lease, 90 s by default
POLL_S = 0.2
HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
Holder = dict[str, str | int]
HELD_TO_THE_END: list[contextlib.ExitStack] = []


@contextmanager
def locked(folder: Path, patience_s: float = math.inf) -> Iterator[None]:
    """Hold a run's folder, on rank 0; on all ranks.

    A lock of `fcntl.lockf` ends with its process, however that ends. NFS and Lustre servers know of it, and processes
    that read data do not inherit it.

    Args:
        folder: of the run.
        patience_s: what it waits for another process's end at most; less than other ranks wait for this one.

    Raises:
        ConfigError: on all ranks, if another process holds it and goes on.
        OSError: on all ranks, if that is one of the same Slurm job, started before this one.
    """
    with contextlib.ExitStack() as stack:
        from_main(lambda: _hold(folder, stack, patience_s))
        try:
            yield
        except BaseException:
            HELD_TO_THE_END.append(stack.pop_all())  # threads of this process may still write
            raise


def _hold(folder: Path, stack: contextlib.ExitStack, patience_s: float) -> None:
    try:
        file = stack.enter_context((folder / LOCK).open("ab+", buffering=0))
        _wait(file, folder, patience_s)
        file.truncate(0)
        file.write(json.dumps(_ourselves()).encode())
        os.fsync(file.fileno())  # for those on other nodes
    except OSError as error:
        if may_pass(error):
            raise
        raise ConfigError(f"run.dir={folder}: cannot be written: {error.strerror}") from error


def _wait(file: BinaryIO, folder: Path, patience_s: float) -> None:
    start = time.monotonic()
    is_told = False
    while not _try(file):
        holder = _read(file)
        patience = min(patience_s, HERE_S if holder.get("host") == socket.gethostname() else ELSEWHERE_S)
        if time.monotonic() - start > patience:
            raise _refusal(folder, holder)
        if not is_told:
            sys.stderr.write(f"{folder}: {_name(holder)} works on it; waiting up to {patience:.0f} s for its end\n")
            is_told = True
        time.sleep(POLL_S)


def _try(file: BinaryIO) -> bool:
    """Whether it is held now, or cannot be."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in NO_LOCKS:
            raise
        sys.stderr.write(f"warning: {file.name}: {error.strerror}; nothing stops a second start of this run\n")
    return True


def _ourselves() -> Holder:
    """`job`: what Slurm starts again, a chain or a job, if it has started this; `attempt`: of it."""
    number = os.environ.get("SLURM_JOB_ID", "")
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "job": os.environ.get("CHAIN") or number,
        "attempt": f"{number}.{os.environ.get('SLURM_RESTART_COUNT', '0')}",
    }


def _read(file: BinaryIO) -> Holder:
    file.seek(0)
    with contextlib.suppress(ValueError):
        return json.loads(file.read())
    return {}  # it has just been taken


def _name(holder: Holder) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('host', '?')}"


def _refusal(folder: Path, holder: Holder) -> ConfigError | OSError:
    here = _ourselves()
    if here["job"] and holder.get("job") == here["job"] and holder.get("attempt") != here["attempt"]:
        text = f"{_name(holder)}, of this job's attempt before, has not ended"
        return OSError(errno.EBUSY, text, str(folder / LOCK))
    return ConfigError(
        f"run.dir={folder}: {_name(holder)} trains this run; wait until it ends, or start another run with run.name=NEW"
    )
