"""Pipeline schedules: which rank does what when. An event simulation; pure, imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """A pass over one micro batch.

    `backward` gives the gradient of the input, and that of the weights too unless there are passes of kind `weight`.
    """

    forward = "forward"
    backward = "backward"
    weight = "weight"


@dataclass(frozen=True)
class Pass:
    """One pass of a pipeline rank.

    Attributes:
        kind: of it.
        chunk: virtual stage on the rank, from 0.
        micro_batch: from 0.
    """

    kind: Kind
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Slot:
    """A pass in time, in seconds from the beginning of the step."""

    task: Pass
    start: float
    stop: float


Orders = list[list[Pass]]  # of each stage, in time
Timeline = list[list[Slot]]  # of each stage, in time
Seconds = Callable[[int, Pass], float]  # of a stage's pass


def one_forward_one_backward(stages: int, virtual: int, micro_batches: int) -> Orders:
    """1F1B, and with several virtual stages its interleaved form, in megatron-core's order.

    Source: arXiv:2104.04473, 2.2; megatron-core 0.16.1, pipeline_parallel/schedules.py, `get_pp_rank_microbatches` and
    `get_schedule_table`.
    """
    return [_order(stages, stage, virtual, micro_batches) for stage in range(stages)]


def _order(stages: int, stage: int, virtual: int, micro_batches: int) -> list[Pass]:
    table = list(_table(stages, virtual, micro_batches))
    ahead = stages - stage - 1 if virtual == 1 else 2 * (stages - stage - 1) + (virtual - 1) * stages
    ahead = min(ahead, len(table))
    forward = [Pass(Kind.forward, chunk, micro_batch) for chunk, micro_batch in table]
    backward = [Pass(Kind.backward, virtual - 1 - chunk, micro_batch) for chunk, micro_batch in table]
    steady = [task for pair in zip(forward[ahead:], backward, strict=False) for task in pair]
    return [*forward[:ahead], *steady, *backward[len(table) - ahead :]]


def _table(stages: int, virtual: int, micro_batches: int) -> Iterator[tuple[int, int]]:
    """Chunk and micro batch of each forward pass: in groups of as many micro batches as there are stages."""
    for first in range(0, micro_batches, stages):
        for chunk in range(virtual):
            for micro_batch in range(first, min(first + stages, micro_batches)):
                yield chunk, micro_batch


def simulate(orders: Orders, seconds: Seconds, *, transfer_s: float = 0.0) -> Timeline:
    """When each pass begins and ends, if it begins as soon as its rank is free and what it needs has arrived.

    Args:
        orders: of each stage.
        seconds: of a stage's pass.
        transfer_s: from one stage to another.

    Raises:
        ValueError: the orders wait for each other.
    """
    stages, virtual = len(orders), 1 + max(task.chunk for order in orders for task in order)
    timeline: Timeline = [[] for _ in orders]
    done: dict[tuple[int, Pass], float] = {}
    left = sum(map(len, orders))
    while left:
        before = left
        for stage, order in enumerate(orders):
            while len(timeline[stage]) < len(order):
                task = order[len(timeline[stage])]
                ready = _ready(done, stages, virtual, stage, task, transfer_s)
                if ready is None:
                    break
                start = max(ready, timeline[stage][-1].stop if timeline[stage] else 0.0)
                done[stage, task] = start + seconds(stage, task)
                timeline[stage].append(Slot(task, start, done[stage, task]))
                left -= 1
        if left == before:
            raise ValueError("the stages wait for each other")
    return timeline


def _ready(
    done: dict[tuple[int, Pass], float], stages: int, virtual: int, stage: int, task: Pass, transfer_s: float
) -> float | None:
    """When what a pass needs is there; None: not yet known."""
    needed = _needed(stages, virtual, stage, task)
    if needed is None:
        return 0.0
    if needed not in done:
        return None
    return done[needed] + (transfer_s if needed[0] != stage else 0.0)


def _needed(stages: int, virtual: int, stage: int, task: Pass) -> tuple[int, Pass] | None:
    """The pass, and its stage, whose result a pass works on."""
    place, last = task.chunk * stages + stage, stages * virtual - 1
    if task.kind is Kind.weight:
        return stage, Pass(Kind.backward, task.chunk, task.micro_batch)
    if task.kind is Kind.forward:
        return _pass_at(stages, place - 1, Kind.forward, task.micro_batch) if place else None
    if place == last:
        return stage, Pass(Kind.forward, task.chunk, task.micro_batch)
    return _pass_at(stages, place + 1, Kind.backward, task.micro_batch)


def _pass_at(stages: int, place: int, kind: Kind, micro_batch: int) -> tuple[int, Pass]:
    return place % stages, Pass(kind, place // stages, micro_batch)


def zero_bubble(stages: int, micro_batches: int) -> Orders:
    """1F1B with the gradients of weights apart, a stage's number of micro batches after those of its input.

    Its bubble is a third of that of 1F1B if all passes take the same time; every stage keeps what the first does there.

    Source: ZB-H1 of arXiv:2401.10241, 2.1.
    """
    return [
        list(_delayed_weights(order, stage))
        for stage, order in enumerate(one_forward_one_backward(stages, 1, micro_batches))
    ]


def _delayed_weights(order: list[Pass], delay: int) -> Iterator[Pass]:
    backward = [task.micro_batch for task in order if task.kind is Kind.backward]
    for task in order:
        yield task
        if task.kind is Kind.backward and task.micro_batch >= delay:
            yield Pass(Kind.weight, 0, task.micro_batch - delay)
    for micro_batch in backward[-delay:] if delay else []:
        yield Pass(Kind.weight, 0, micro_batch)


def bubble(timeline: Timeline) -> list[float]:
    """Idle time of each stage while the step lasts, over its busy time."""
    end = max(slots[-1].stop for slots in timeline)
    busy = [sum(slot.stop - slot.start for slot in slots) for slots in timeline]
    return [end / time - 1 for time in busy]


def most_in_flight(order: list[Pass]) -> list[int]:
    """Of each chunk, the micro batches whose activations a rank keeps when all of its chunks keep the most together."""
    chunks = 1 + max(task.chunk for task in order)
    frees = Kind.weight if any(task.kind is Kind.weight for task in order) else Kind.backward
    now, most = [0] * chunks, [0] * chunks
    for task in order:
        now[task.chunk] += (task.kind is Kind.forward) - (task.kind is frees)
        most = max(most, list(now), key=sum)
    return most


def micro_batches_in_flight(stages: int, stage: int, virtual: int, micro_batches: int) -> float:
    """Micro batches whose activations a stage keeps at most, in 1F1B or its interleaved form; virtual stages alike.

    Source: arXiv:2104.04473, 2.2; equal to `most_in_flight`.
    """
    if virtual == 1:
        return min(stages - stage, micro_batches)
    passes = 2 * (stages - stage - 1) + (virtual - 1) * stages + 1
    return min(passes, virtual * micro_batches) / virtual
