"""Ends a rank that hangs, and leaves the stacks of one that hangs or is aborted. Imports no torch."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

STACK_FILE = "MEGATRON_MOE_STACK_FILE"
MARGIN = 1.1  # a collective that times out says more, so it comes first


class _Watch:
    """Of this process: where stacks go, after how many seconds without a sign of life, and when the last one was."""

    file: TextIO | None = None
    timeout_s: float | None = None
    alive_at: float | None = None


def start(timeout_s: float, environment: Mapping[str, str] = os.environ) -> None:
    """Write the stacks of all threads when this process crashes or is aborted, and, once it has called `alive`, hangs.

    What comes before the first `alive`, such as preparing data, may take longer than any step.

    Args:
        timeout_s: of the collectives; without a sign of life for 1.1 times as long, the process ends with exit code 1.
        environment: may name a file for the stacks in `STACK_FILE`; else they go to standard error.
    """
    path = environment.get(STACK_FILE)
    _Watch.file = Path(path).open("w", encoding="utf-8") if path else sys.stderr  # noqa: SIM115 for the handlers
    _Watch.timeout_s = MARGIN * timeout_s
    faulthandler.enable(file=_Watch.file)


def alive() -> None:
    """Call it wherever the training gets on, in its own thread: each micro batch, and as a save begins and ends."""
    if _Watch.timeout_s is not None:
        faulthandler.dump_traceback_later(_Watch.timeout_s, exit=True, file=_Watch.file)
        _Watch.alive_at = time.monotonic()


def share_of_timeout() -> float:
    """How much of the time that this process may go without a sign of life is over; at 1 it ends. 0 if not watched."""
    timeout_s, alive_at = _Watch.timeout_s, _Watch.alive_at
    return 0.0 if timeout_s is None or alive_at is None else (time.monotonic() - alive_at) / timeout_s


def stop() -> None:
    """Watch no longer; crashes still leave their stacks."""
    faulthandler.cancel_dump_traceback_later()
    _Watch.timeout_s = _Watch.alive_at = None
