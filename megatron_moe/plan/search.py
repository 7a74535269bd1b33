"""Layouts that fit a cluster, the fastest first. Pure; imports no torch."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.derived import num_chunks
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.model_rules import model_problems
from megatron_moe.config.rules import wrong_signs
from megatron_moe.config.schema import ParallelConfig, PlanConfig
from megatron_moe.config.validate import validate
from megatron_moe.plan.estimate import memory_limit
from megatron_moe.plan.memory import memory_by_stage
from megatron_moe.plan.pipeline import Layers, even_layout
from megatron_moe.plan.step_time import StepModel, imbalance

MICRO_BATCH = "train.micro_batch_size"
MICRO_BATCHES = [1, 2, 4, 8]
VIRTUAL = [1, 2, 4]
PLACED = 20  # of the fastest, whose layers are also placed by time
WORTHWHILE = 1.02  # times as fast: what a layout by hand must bring
NEEDS_RECOMPUTE = "would fit with full recomputation, which megatron_moe does not have"
DOES_NOT_FIT = "does not fit, with full recomputation neither"


@dataclass(frozen=True)
class Found:
    """A layout that fits.

    Attributes:
        config: with it.
        memory: bytes of the fullest rank.
        step_s: seconds of a step, in closed form.
        tokens_per_second_per_gpu: mean.
    """

    config: PlanConfig
    memory: float
    step_s: float
    tokens_per_second_per_gpu: float


@dataclass(frozen=True)
class Search:
    """What was found, the fastest first, and why the other layouts are not among it, with how many."""

    found: list[Found]
    refused: Counter[str]

    @property
    def tried(self) -> int:
        """All."""
        return len(self.found) + self.refused.total()


def search(config: PlanConfig, num_gpus: int, pinned: set[str]) -> Search:
    """Try layouts and micro batches; of the fastest also layers placed by the time that the head takes.

    Args:
        config: checked; its layout and micro batch count only where `pinned`.
        num_gpus: of the cluster.
        pinned: options that stay as they are, as group.option.

    Raises:
        ConfigError: the model is wrong, which no layout can help.
    """
    if problems := [*wrong_signs(config)] or [*model_problems(config)]:
        raise ConfigError(*(problem if isinstance(problem, str) else problem[1] for problem in problems))
    found: list[Found] = []
    refused: Counter[str] = Counter()
    for smallest in _group_sizes(config, num_gpus, pinned):
        outcome = _try(smallest, num_gpus)
        others = () if isinstance(outcome, str) else _larger(smallest, pinned)
        for one in itertools.chain([outcome], (_try(candidate, num_gpus) for candidate in others)):
            if isinstance(one, str):
                refused[one] += 1
            else:
                found.append(one)
    found.sort(key=_order)
    if "parallel.pipeline_layout" not in pinned:
        found[:PLACED] = sorted((_placed_by_time(one, num_gpus) for one in found[:PLACED]), key=_order)
    return Search(found, refused)


def _order(found: Found) -> tuple[float, int, int]:
    """Fastest first; of those with the same four digits the smallest groups, then the largest micro batches."""
    parallel = found.config.parallel
    sizes = [
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
    ]
    speed = float(f"{found.tokens_per_second_per_gpu:.4g}")
    return -speed, sum(sizes), -found.config.train.micro_batch_size


def _group_sizes(config: PlanConfig, num_gpus: int, pinned: set[str]) -> Iterator[PlanConfig]:
    """Sizes of the groups; with micro batches of 1 and one virtual stage, which need the least memory."""
    model, in_node = config.model, _divisors(config.cluster.gpus_per_node)
    choices: dict[str, list[Any]] = {
        "tensor_model_parallel_size": in_node,
        "context_parallel_size": in_node,
        "pipeline_model_parallel_size": [size for size in _divisors(num_gpus) if size <= model.num_layers],
        "expert_model_parallel_size": [size for size in _divisors(model.num_experts or 1) if size <= num_gpus],
        "expert_tensor_parallel_size": [None, *in_node[1:]] if model.num_experts else [None],
        "virtual_pipeline_model_parallel_size": [1],
        "pipeline_layout": [None],
    }
    for name in choices:
        if f"parallel.{name}" in pinned:
            choices[name] = [getattr(config.parallel, name)]
    micro_batch = config.train.micro_batch_size if MICRO_BATCH in pinned else 1
    for values in itertools.product(*choices.values()):
        sizes = dict(zip(choices, values, strict=True))
        if sizes["expert_tensor_parallel_size"] in (None, sizes["tensor_model_parallel_size"]):
            yield _with(config, dataclasses.replace(config.parallel, **sizes), micro_batch)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _larger(smallest: PlanConfig, pinned: set[str]) -> Iterator[PlanConfig]:
    """The same groups with more virtual stages and larger micro batches."""
    parallel = smallest.parallel
    first = (parallel.virtual_pipeline_model_parallel_size, smallest.train.micro_batch_size)
    most = smallest.model.num_layers // parallel.pipeline_model_parallel_size
    fixed = parallel.pipeline_model_parallel_size == 1 or pinned & {
        "parallel.virtual_pipeline_model_parallel_size",
        "parallel.pipeline_layout",
    }
    virtual = [first[0]] if fixed else [size for size in VIRTUAL if size <= most]
    micro_batches = [first[1]] if MICRO_BATCH in pinned else MICRO_BATCHES
    for sizes in itertools.product(virtual, micro_batches):
        if sizes != first:
            yield _with(
                smallest, dataclasses.replace(parallel, virtual_pipeline_model_parallel_size=sizes[0]), sizes[1]
            )


def _with(config: PlanConfig, parallel: ParallelConfig, micro_batch_size: int) -> PlanConfig:
    changed = copy.copy(config)
    changed.parallel = parallel
    changed.train = dataclasses.replace(config.train, micro_batch_size=micro_batch_size)
    return changed


def _try(config: PlanConfig, num_gpus: int) -> Found | str:
    """The layout's times, or why it cannot be."""
    try:
        validate(config, num_gpus)
    except ConfigError as error:
        return _rule(error.problems[0])
    limit, memory = memory_limit(config.cluster), _most(config, num_gpus)
    if memory > limit:
        return NEEDS_RECOMPUTE if _most(config, num_gpus, recompute=True) <= limit else DOES_NOT_FIT
    times = StepModel(config, num_gpus)
    step_s = times.step(times.pipeline_s()).total
    tokens = config.train.global_batch_size * config.data.sequence_length
    return Found(config, memory, step_s, tokens / step_s / num_gpus)


def _most(config: PlanConfig, num_gpus: int, *, recompute: bool = False) -> float:
    memory = memory_by_stage(config, num_gpus, imbalance=imbalance(config), recompute=recompute)
    return max(stage.total for stage in memory)


def _rule(problem: str) -> str:
    """A problem without its numbers, so that those of many layouts can be counted together."""
    rule = re.sub(r"=[^\s:;,)]+", "", re.split("; (?:possible|nearest)", problem)[0])
    return re.sub(r"\b\d[\d,.]*\b", "N", rule)


def _placed_by_time(found: Found, num_gpus: int) -> Found:
    """With the head counted as the layers that take as long, if that is worthwhile."""
    config, chunks = found.config, num_chunks(found.config.parallel)
    if chunks == 1:
        return found
    times = StepModel(config, num_gpus)
    layer, head = (
        times.pass_time(layers, backward=True).total
        for layers in (Layers(0, 1) if config.model.num_experts else Layers(1, 0), Layers(0, 0, head=True))
    )
    layout = even_layout(config.model.num_layers, chunks, first=0, last=head / layer)
    parallel = dataclasses.replace(config.parallel, pipeline_layout=layout)
    placed = _try(_with(config, parallel, config.train.micro_batch_size), num_gpus)
    is_better = isinstance(placed, Found) and found.step_s > WORTHWHILE * placed.step_s
    return placed if is_better else found
