"""Layouts that fit a cluster, the fastest first. Pure; imports no torch."""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_moe.config.cluster import PlanConfig
from megatron_moe.config.derived import num_chunks
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import recompute_choice
from megatron_moe.config.model_rules import model_problems
from megatron_moe.config.rules import wrong_signs
from megatron_moe.config.schema import RecomputeConfig
from megatron_moe.config.validate import validate
from megatron_moe.plan.estimate import memory_limit
from megatron_moe.plan.memory import memory_by_stage
from megatron_moe.plan.pipeline import Layers, even_layout
from megatron_moe.plan.step_time import StepModel, imbalance

Options = TypeVar("Options")

MICRO_BATCH = "train.micro_batch_size"
MICRO_BATCHES = [1, 2, 4, 8]
VIRTUAL = [1, 2, 4]
PLACED = 20  # of the fastest, whose layers are also placed by time
WORTHWHILE = 1.02  # times as fast: what a layout by hand must bring
# Each is slower and needs less memory than the one before.
RECOMPUTE = {name: recompute_choice(name) for name in ("none", "selective", "full")}
DOES_NOT_FIT = "does not fit, with what may be recomputed neither"


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

    Of each, the first of `RECOMPUTE` that fits.

    Args:
        config: checked; its layout, micro batch and `recompute` count only where `pinned`.
        num_gpus: of the cluster.
        pinned: options that stay as they are, as group.option.

    Raises:
        ConfigError: the model is wrong, which no layout can help.
    """
    if problems := [*wrong_signs(config)] or [*model_problems(config)]:
        raise ConfigError(*(problem if isinstance(problem, str) else problem[1] for problem in problems))
    is_pinned = any(option.split(".")[0] == "recompute" for option in pinned)
    recompute = [config.recompute] if is_pinned else [*RECOMPUTE.values()]
    found: list[Found] = []
    refused: Counter[str] = Counter()
    for smallest in _group_sizes(config, num_gpus, pinned):
        outcome = _try(smallest, num_gpus, recompute)
        others = () if outcome == DOES_NOT_FIT else _larger(smallest, pinned)
        for one in itertools.chain([outcome], (_try(candidate, num_gpus, recompute) for candidate in others)):
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
            parallel = _with(config.parallel, **sizes)
            yield _with(config, parallel=parallel, train=_with(config.train, micro_batch_size=micro_batch))


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
                smallest,
                parallel=_with(parallel, virtual_pipeline_model_parallel_size=sizes[0]),
                train=_with(smallest.train, micro_batch_size=sizes[1]),
            )


def _with(options: Options, **changes: Any) -> Options:
    changed = copy.copy(options)
    vars(changed).update(changes)
    return changed


def _try(config: PlanConfig, num_gpus: int, recompute: Sequence[RecomputeConfig]) -> Found | str:
    """The layout's times with the first of `recompute` that fits, or why it cannot be."""
    refused = ""
    for choice in recompute:
        tried = _with(config, recompute=choice)
        try:
            validate(tried, num_gpus)
        except ConfigError as error:
            return refused or _rule(error.problems[0])
        memory = max(stage.total for stage in memory_by_stage(tried, num_gpus, imbalance=imbalance(tried)))
        if memory <= memory_limit(tried.cluster):
            return _timed(tried, num_gpus, memory)
        refused = DOES_NOT_FIT
    return refused


def _timed(config: PlanConfig, num_gpus: int, memory: float) -> Found:
    times = StepModel(config, num_gpus)
    step_s = times.step(times.pipeline_s()).total
    tokens = config.train.global_batch_size * config.data.sequence_length
    return Found(config, memory, step_s, tokens / step_s / num_gpus)


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
    by_time = _with(config, parallel=_with(config.parallel, pipeline_layout=layout))
    placed = _try(by_time, num_gpus, [config.recompute])
    is_better = isinstance(placed, Found) and found.step_s > WORTHWHILE * placed.step_s
    return placed if is_better else found
