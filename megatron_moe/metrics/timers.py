"""How long the parts of a training step take on this rank, and what its all-to-all sends."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


class Timers:
    """Seconds by part of the step since the last report.

    On a GPU a part lasts from when the stream gets to it until the stream is through with it, waiting included, as
    events on the stream tell afterwards: nothing waits for them but `report`. On a CPU the clock tells.

    Attributes:
        sent_bytes: to other ranks by the all-to-all of the last step.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._mark: Callable[[], Any] = _event if on_gpu else time.perf_counter
        self._between = _between_events if on_gpu else _between_times
        self._open: deque[tuple[str, Any, Any]] = deque()
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0
        self.sent_bytes = 0

    def begin_step(self) -> None:
        """Count a step."""
        self._steps += 1
        self.sent_bytes = 0
        self._collect(wait=False)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count what happens meanwhile as a part of the step; parts may lie in each other."""
        begin = self._mark()
        yield
        self._open.append((part, begin, self._mark()))

    def waiting_for(self, items: Iterator[Item], part: str) -> Iterator[Item]:
        """The same items, of which there is no end; waiting for the next is a part of the step."""
        while True:
            with self.measure(part):
                item = next(items)
            yield item

    def _collect(self, *, wait: bool) -> None:
        """Add up the parts that are over."""
        while self._open:
            part, begin, end = self._open[0]
            seconds = self._between(begin, end, wait=wait)
            if seconds is None:
                return
            self._seconds[part] += seconds
            self._open.popleft()

    def report(self) -> dict[str, float]:
        """Seconds a step of each part since the last report, which this one resets."""
        self._collect(wait=True)
        means = {part: seconds / self._steps for part, seconds in self._seconds.items()}
        self._seconds.clear()
        self._steps = 0
        return means


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_events(begin: torch.cuda.Event, end: torch.cuda.Event, *, wait: bool) -> float | None:
    if wait:
        end.synchronize()
    elif not end.query():
        return None
    return begin.elapsed_time(end) / 1000


def _between_times(begin: float, end: float, *, wait: bool) -> float:  # noqa: ARG001 the clock keeps no one waiting
    return end - begin


@contextmanager
def all_to_all_measured(timers: Timers) -> Iterator[None]:
    """Measure each `torch.distributed.all_to_all_single` meanwhile, and count the bytes that it sends to other ranks.

    megatron-core's dispatcher calls it for dispatch and combine, in the forward and in the backward pass
    (0.16.1, tensor_parallel/mappings.py:444).
    """
    original = dist.all_to_all_single

    def all_to_all_single(output: Tensor, input: Tensor, *args: Any, **options: Any) -> Any:
        with timers.measure("all_to_all"):
            work = original(output, input, *args, **options)
        if "group" in options:
            timers.sent_bytes += _bytes_to_others(input, options.get("input_split_sizes"), options["group"])
        return work

    dist.all_to_all_single = all_to_all_single
    try:
        yield
    finally:
        dist.all_to_all_single = original


def _bytes_to_others(input: Tensor, rows_to_ranks: Any, group: dist.ProcessGroup) -> int:
    """Of the rows for all ranks of the group but this one; no sizes: the same for each."""
    own = len(input) // group.size() if rows_to_ranks is None else int(rows_to_ranks[group.rank()])
    return (len(input) - own) * input.shape[1:].numel() * input.element_size()
