"""Speed and time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Throughput:
    """Tokens per second between two reports."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0
        self._tokens = 0
        self._steps = 0

    def count(self, tokens: int) -> None:
        """Count one step."""
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out time spent on evaluating and saving."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def report(self) -> tuple[float, float]:
        """Tokens per second and seconds per step since the last report, which this one resets."""
        elapsed = max(time.perf_counter() - self._start - self._paused, 1e-9)
        rates = self._tokens / elapsed, elapsed / max(self._steps, 1)
        self._reset()
        return rates


def format_duration(seconds: float) -> str:
    """'1d02h', '3h05m', '4m09s' or '7s'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    return f"{minute}m{second:02}s" if minutes else f"{second}s"
