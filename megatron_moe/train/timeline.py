"""When a rank computes, communicates and waits within a step, as megatron-core tells its timers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.utils import get_model_config
from torch.profiler import record_function

from megatron_moe.train.step import Batches, Pipeline

Moment = float | torch.cuda.Event


class Timeline:
    """Takes the place of megatron-core's timers for one step.

    Each range is named after its kind, as the profiler sees it too: `forward 3` and `backward 3` are passes of micro
    batch 3 (`3.1`: through the second of several model chunks), `data`, `pipeline ...`, `gradients ...` and
    `optimizer ...` what comes between. On a GPU the times are those of the kernels, not of the Python that launches
    them.

    Args:
        pipeline: of this rank.
        num_micro_batches: of the step.
        device: of this rank.
    """

    def __init__(self, pipeline: Pipeline, num_micro_batches: int, device: torch.device) -> None:
        num_chunks = len(pipeline.model)
        group_size = get_model_config(pipeline.model[0]).microbatch_group_size_per_vp_stage
        passes = get_schedule_table(num_micro_batches, num_chunks, group_size)
        self._labels = {
            "forward": iter([_label(number, chunk, num_chunks) for number, chunk in passes]),
            "backward": iter([_label(number, num_chunks - 1 - chunk, num_chunks) for number, chunk in passes]),
        }
        self._device = device
        self._begin = self._now()
        self._started: dict[str, tuple[record_function, Moment]] = {}
        self._ranges: list[tuple[str, Moment, Moment]] = []

    def __call__(self, name: str, log_level: int | None = None) -> Timer:
        """A timer of megatron-core's."""
        return Timer(self, name)

    def start(self, name: str) -> None:
        """Begin a range, but for those that only enclose others."""
        kind = _kind(name)
        if kind is not None:
            label = next(self._labels[kind], "?") if kind in self._labels else name.removeprefix(f"{kind}-")
            annotation = record_function(f"{kind} {label}")
            annotation.__enter__()
            self._started[name] = annotation, self._now()

    def stop(self, name: str) -> None:
        """End a range."""
        if name in self._started:
            annotation, start = self._started.pop(name)
            annotation.__exit__(None, None, None)
            self._ranges.append((annotation.name, start, self._now()))

    def reading(self, batches: Batches) -> Batches:
        """The same micro batches; a range for each that is waited for."""
        while True:
            self.start("data-next")
            batch = next(batches)
            self.stop("data-next")
            yield batch

    def ranges(self) -> list[dict[str, Any]]:
        """Name, and begin and end in seconds since this was made, in the order in which they ended."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [{"name": name, "start_s": self._s(start), "end_s": self._s(end)} for name, start, end in self._ranges]

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _s(self, moment: Moment) -> float:
        seconds = moment - self._begin if isinstance(moment, float) else self._begin.elapsed_time(moment) / 1e3
        return round(seconds, 6)


@dataclass(frozen=True)
class Timer:
    """With the interface of megatron-core's `Timer`."""

    timeline: Timeline
    name: str

    def start(self, barrier: bool = False) -> None:
        """Begin. Without the barrier, which would change what is measured."""
        self.timeline.start(self.name)

    def stop(self) -> None:
        """End."""
        self.timeline.stop(self.name)


@contextmanager
def recorded(timeline: Timeline, pipeline: Pipeline, optimizer: ChainedOptimizer) -> Iterator[None]:
    """Have megatron-core tell a time line what it does."""
    model_configs = [get_model_config(chunk) for chunk in pipeline.model]
    configs = [*model_configs, *(part.config for part in optimizer.chained_optimizers)]
    before = [config.timers for config in configs]
    for config in configs:
        config.timers = timeline
    try:
        yield
    finally:
        for config, timers in zip(configs, before, strict=True):
            config.timers = timers


def _label(micro_batch: int, chunk: int, num_chunks: int) -> str:
    return f"{micro_batch}.{chunk}" if num_chunks > 1 else str(micro_batch)


def _kind(timer: str) -> str | None:
    """What a timer of megatron-core 0.16.1 (schedules, p2p_communication, finalize_model_grads, optimizer) times."""
    if timer in ("forward-compute", "backward-compute", "data-next"):
        return timer.split("-", maxsplit=1)[0]
    if timer.startswith("optimizer") or timer == "params-all-gather":
        return "optimizer"
    if "send" in timer or "recv" in timer:
        return "pipeline"
    return "gradients" if "grads" in timer else None
