"""SIGTERM and SIGUSR1: stop after this step and save. Imports no torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_received: list[signal.Signals] = []


def install() -> None:
    """Note these signals from here on, for the next step boundary, in place of ending at once; in the main thread.

    Those that came while they were held back count too.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOP_SIGNALS:
        signal.signal(number, _note)
        signal.siginterrupt(number, False)  # reads and writes of libraries go on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def ignore() -> None:
    """Nothing is left to stop: a process that ends must not be killed for it, nor its work be called unfinished."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """These signals wait until the end, and in processes that are started meanwhile until they call `install`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_requested() -> bool:
    """Whether this process got one of the signals. Only this process: the ranks have to agree."""
    return bool(_received)


def received_name() -> str:
    """The first of them, for people; another rank may have got it."""
    return _received[0].name if _received else "a signal to another rank"


def leave_to_parent() -> None:
    """In a process that reads data for a rank: go on until the rank ends it, as it needs data to finish its step.

    Slurm sends its signals to every process of a job.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    parent = os.getppid()

    def watch() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _note(number: int, _: object) -> None:
    _received.append(signal.Signals(number))
