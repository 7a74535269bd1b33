"""One process at a time trains a run: two would write over each other's checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_moe.config.errors import ConfigError, unreadable
from megatron_moe.distributed.context import from_main

LOCK = "run.lock"
HERE_S = 10.0  # for a process that is ending
ELSEWHERE_S = 120.0  # an NFS server gives the locks of a client that has died free after a lease, 90 s by default
POLL_S = 0.2
HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, on rank 0; on all ranks.

    A lock of `fcntl.lockf` ends with its process, however that ends. NFS and Lustre servers know of it, and processes
    that read data do not inherit it.

    Raises:
        ConfigError: on all ranks, if another process holds it and goes on.
        OSError: on all ranks, if that is one of the same Slurm job, started before this one.
    """
    with contextlib.ExitStack() as stack:
        from_main(lambda: _hold(folder, stack))
        yield


def _hold(folder: Path, stack: contextlib.ExitStack) -> None:
    try:
        file = stack.enter_context((folder / LOCK).open("a+", encoding="utf-8"))
    except OSError as error:
        raise unreadable(folder / LOCK, error) from None
    start = time.monotonic()
    while not _try(file):
        holder = _read(file)
        patience = HERE_S if holder.get("host") == socket.gethostname() else ELSEWHERE_S
        if time.monotonic() - start > patience:
            raise _refusal(folder, holder)
        time.sleep(POLL_S)
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "process": os.getpid(), "job": _job()}, file)
    file.flush()


def _try(file: TextIO) -> bool:
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


def _read(file: TextIO) -> dict[str, str | int]:
    file.seek(0)
    with contextlib.suppress(ValueError):
        return json.loads(file.read())
    return {}  # it has just been taken


def _refusal(folder: Path, holder: dict[str, str | int]) -> ConfigError | OSError:
    who = f"process {holder.get('process', '?')} on {holder.get('host', '?')}"
    if holder.get("job") and holder["job"] == _job():
        return OSError(errno.EBUSY, f"{who}, of this job's attempt before, has not ended", str(folder / LOCK))
    return ConfigError(
        f"run.dir={folder}: {who} trains this run; wait until it ends, or start another run with run.name=NEW"
    )


def _job() -> str:
    """What Slurm starts again, if it has started this: a chain or a job."""
    return os.environ.get("CHAIN") or os.environ.get("SLURM_JOB_ID", "")
