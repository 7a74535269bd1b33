"""The bar below the lines of a run that prints to a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from megatron_moe.metrics.throughput import format_duration

REDRAW_S = 0.2  # not more often
SHORTEST_BAR = 8  # columns


class TerminalBar:
    """Step, loss, speed and time left below all that is printed meanwhile; where the terminal is narrow, less of it.

    It is drawn when a step is done and never by a thread, which could hold a lock while the process forks.
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._total_steps = total_steps
        self._live = Live(self, console=console or _Console(), auto_refresh=False, transient=True)
        self._drawn_at = 0.0
        self._step = 0
        self._loss = 0.0
        self._metrics: dict[str, Any] = {}

    def start(self) -> None:
        """Take the last line of the terminal."""
        self._live.start()

    def stop(self) -> None:
        """Give it back."""
        self._live.stop()

    def take(self, metrics: dict[str, Any]) -> None:
        """Of a logged step, to show its speed."""
        self._metrics = metrics

    def show(self, step: int, loss: float) -> None:
        """That a step is done."""
        self._step, self._loss = step, loss
        if time.monotonic() - self._drawn_at > REDRAW_S:
            self._live.refresh()
            self._drawn_at = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        texts = self._texts()
        while sum(len(text) + 1 for text in texts) > options.max_width and len(texts) > 1:
            texts.pop()
        columns = options.max_width - sum(len(text) + 1 for text in texts)
        row = Table.grid(padding=(0, 1, 0, 0))
        bar = [ProgressBar(self._total_steps, self._step, width=columns)] * (columns >= SHORTEST_BAR)
        row.add_row(texts[0], *bar, *texts[1:])
        yield row

    def _texts(self) -> list[str]:
        """What there is to say, the less important last."""
        texts = [f"{self._step:,}/{self._total_steps:,}", f"loss {self._loss:.4f}"]
        if "speed/step_time_s" in self._metrics:
            left = (self._total_steps - self._step) * self._metrics["speed/step_time_s"]
            texts += [f"{format_duration(left)} left", f"{self._metrics['speed/tokens_per_second']:,.0f} tokens/s"]
        return texts


def is_terminal() -> bool:
    """Whether a bar can be drawn where this process prints."""
    console = Console()
    is_one = sys.stdout is not None and sys.stdout.isatty()  # rich also takes a pipe for one where FORCE_COLOR is set
    return is_one and console.is_terminal and not console.is_dumb_terminal


class _Console(Console):
    """Leaves the cursor as it is: a rank that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False
