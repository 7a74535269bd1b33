"""Where the time of a profiled step went, from a trace of PyTorch's profiler (Chrome's format)."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# By priority: at every moment the first kind that is under way counts, so that communication hidden behind computing
# does not.
KINDS = {
    "matmul": "matrix multiplication",
    "attention": "attention",
    "optimizer": "optimizer",
    "other": "other operations",
    "all-to-all": "all-to-all",
    "pipeline": "pipeline send and receive",
    "gradients": "gradient reduction",
    "communication": "other communication",
    "data": "data",
    "idle": "between operations",
}
PHASES = ("optimizer", "pipeline", "gradients", "data")  # all that happens within is theirs
PATTERNS = {
    "all-to-all": re.compile(r"all_?to_?all|sendrecv"),  # NCCL's kernels outside of the pipeline's ranges
    "communication": re.compile(r"nccl|gloo:|c10d::|parallelregion"),
    "attention": re.compile(r"scaled_?dot_?product|flash|fmha|attention|attn"),
    "matmul": re.compile(r"(::|_)(add|b|badd)?mm\b|matmul|linear|gemm|cutlass|nvjet"),
}
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")
ON_HOST = ("cpu_op", "user_annotation")

Event = dict[str, Any]
Span = tuple[float, float, str]  # begin, end, kind


@dataclass(frozen=True)
class StepCost:
    """Where the time of one step on one rank went.

    Attributes:
        step: as it is logged.
        rank: of the trace.
        on_gpu: whether the times are those of a GPU's kernels, or those of the main thread.
        seconds: by kind; they add up to the duration of the step.
    """

    step: int
    rank: int
    on_gpu: bool
    seconds: dict[str, float]


def read_cost(path: Path) -> StepCost:
    """Of a file `step_N_rank_N.json.gz`.

    Raises:
        ValueError, OSError, EOFError: it is no trace of a step.
    """
    found = re.fullmatch(r"step_(\d+)_rank_(\d+)\.json\.gz", path.name)
    if found is None:
        raise ValueError("is not named step_N_rank_N.json.gz")
    with gzip.open(path) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    step, rank = map(int, found.groups())
    on_gpu = any(event["cat"] == "kernel" for event in events)
    return StepCost(step, rank, on_gpu, seconds_by_kind(events, f"step {step}"))


def seconds_by_kind(events: list[Event], step: str) -> dict[str, float]:
    """Of the complete events of a trace, within the range of that name.

    With a GPU its streams count, else the thread that has the range.
    """
    whole = next((event for event in events if event["name"] == step and event["cat"] == "user_annotation"), None)
    if whole is None:
        raise ValueError(f"has no range '{step}'")
    begin, end = whole["ts"], whole["ts"] + whole["dur"]
    spans = [(max(a, begin), min(b, end), kind) for a, b, kind in _all_spans(events, whole["tid"])]
    seconds = _first_of_each_moment(span for span in spans if span[0] < span[1])
    seconds["idle"] += (end - begin) / 1e6 - sum(seconds.values())
    return {kind: seconds[kind] for kind in KINDS}


def _all_spans(events: list[Event], main_thread: Any) -> Iterator[Span]:
    if not any(event["cat"] == "kernel" for event in events):
        yield from _spans([event for event in events if event["cat"] in ON_HOST and event["tid"] == main_thread])
        return
    streams = defaultdict(list)
    for event in events:
        if event["cat"] in ON_GPU:
            streams[event["tid"]].append(event)
    for stream in streams.values():
        yield from _spans(stream)


def _spans(events: list[Event]) -> Iterator[Span]:
    """What one thread or stream does when: the innermost of nested events."""
    nested: list[tuple[float, str, str]] = []  # end, kind of what is within, kind of the rest
    now = 0.0
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while nested and nested[-1][0] <= event["ts"]:
            end, _, own = nested.pop()
            yield now, end, own
            now = end
        if nested:
            yield now, event["ts"], nested[-1][2]
        now = event["ts"]
        end = now + event["dur"]
        kind = _kind(event, nested[-1][1] if nested else "idle")
        is_idle = event["cat"] == "gpu_user_annotation"  # between the kernels of a range
        nested.append((min(end, nested[-1][0]) if nested else end, kind, "idle" if is_idle else kind))
    for end, _, own in reversed(nested):
        yield now, end, own
        now = end


def _kind(event: Event, outer: str) -> str:
    if outer in PHASES:
        return outer
    is_range = event["cat"].endswith("user_annotation")
    name = event["name"]
    if is_range and name.partition(" ")[0] in PHASES:
        return name.partition(" ")[0]
    text = f"{name} {event.get('args', {}).get('Collective name', '')}".lower()
    for kind, pattern in PATTERNS.items():
        if pattern.search(text):
            return kind
    return "other" if outer == "idle" and not is_range else outer


def _first_of_each_moment(spans: Iterable[Span]) -> defaultdict[str, float]:
    """Seconds by kind; where several overlap, the first of `KINDS` has them."""
    changes = sorted(change for a, b, kind in spans for change in ((a, 1, kind), (b, -1, kind)))
    under_way = dict.fromkeys(KINDS, 0)
    seconds: defaultdict[str, float] = defaultdict(float)
    for (now, change, kind), (then, _, _) in pairwise(changes):
        under_way[kind] += change
        first = next((kind for kind in KINDS if under_way[kind]), "idle")
        seconds[first] += (then - now) / 1e6
    return seconds
