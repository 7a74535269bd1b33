"""Which steps of a run are looked at closely: in every run one for its time line, and those that are profiled."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch.profiler import ProfilerActivity, record_function

from megatron_moe.config.schema import Config
from megatron_moe.distributed.context import DistributedContext
from megatron_moe.files import write_whole
from megatron_moe.train.step import Batches, Pipeline
from megatron_moe.train.timeline import Timeline, recorded

WARM_UP_STEPS = 2  # the first of a process are slower
MAX_RANKS = 16  # in a time line, the same number of each pipeline stage


class Recorder:
    """Writes `timeline.json` and the profiler's traces into the run's folder. Every method is for all ranks.

    All other steps are left alone. What cannot be written is told, and the training goes on.

    Args:
        config: of the run.
        context: of this rank.
        pipeline: of this rank.
        optimizer: of this rank.
        steps: that this process trains, numbered as they are logged.
    """

    def __init__(
        self,
        config: Config,
        context: DistributedContext,
        pipeline: Pipeline,
        optimizer: ChainedOptimizer,
        steps: range,
    ) -> None:
        self._folder = Path(config.run.dir)
        self._profile = config.profile
        self._context = context
        self._pipeline = pipeline
        self._optimizer = optimizer
        undisturbed = (step for step in steps[WARM_UP_STEPS:] if step not in config.profile.steps)
        self._timeline_step = next(undisturbed, steps[-1] if steps else None)
        if config.profile.steps and not set(config.profile.steps) & set(steps):
            context.say(f"profile.steps={config.profile.steps}: none of them is left to train")

    @contextmanager
    def step(self, number: int, batches: list[Batches], num_micro_batches: int) -> Iterator[list[Batches]]:
        """Yields the micro batches for a step, which is recorded if it is one of those.

        Args:
            number: of the step.
            batches: one iterator for each model chunk.
            num_micro_batches: of the step.
        """
        is_profiled = number in self._profile.steps and self._context.rank in self._profile.ranks
        if number != self._timeline_step and not is_profiled:
            yield batches
            return
        with ExitStack() as stack:
            if is_profiled:
                stack.enter_context(self._profiled(number))
            if number == self._timeline_step:
                dist.all_reduce(torch.zeros(1, device=self._context.device))  # ranks count their time from here
            timeline = Timeline(self._pipeline, num_micro_batches, self._context.device)
            stack.enter_context(recorded(timeline, self._pipeline, self._optimizer))
            yield [timeline.reading(part) for part in batches]
        if number == self._timeline_step:
            self._gather(timeline, number)

    @contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        on_gpu = self._context.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with torch.profiler.profile(activities=activities) as profiler, record_function(f"step {step}"):
            yield
            if on_gpu:
                torch.cuda.synchronize(self._context.device)
        path = self._folder / "profile" / f"step_{step:08}_rank_{self._context.rank:05}.json.gz"
        _tolerant(lambda: _export(profiler, path))

    def _gather(self, timeline: Timeline, step: int) -> None:
        stages = self._pipeline.pg_collection.pp.size()
        ranks_per_stage = self._context.world_size // stages
        is_shown = self._context.rank % ranks_per_stage < max(1, MAX_RANKS // stages)
        here = {"rank": self._context.rank, "ranges": timeline.ranges()} if is_shown else None
        everywhere: list[Any] | None = [None] * self._context.world_size if self._context.is_main else None
        dist.gather_object(here, everywhere)
        if everywhere is not None:
            found = {"step": step, "ranks": [rank for rank in everywhere if rank is not None]}
            _tolerant(lambda: write_whole(self._folder / "timeline.json", json.dumps(found).encode()))


def _export(profiler: torch.profiler.profile, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"partial_{path.name}")  # .gz at the end: it is compressed
    profiler.export_chrome_trace(str(partial))
    partial.replace(path)


def _tolerant(action: Callable[[], None]) -> None:
    try:
        action()
    except (OSError, RuntimeError) as error:  # of files, of the profiler
        sys.stderr.write(f"warning: not written: {error}\n")
