"""Reads `metrics.jsonl` of any length, line by line."""

from __future__ import annotations

import json
from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.report.thinning import Frames, Series

LOADS = ("moe/expert_load", "moe/device_load")
MAX_FRAMES = 200
MAX_LOADS = 1_000_000  # numbers in all frames: 104 frames of 60 layers with 160 experts


@dataclass(frozen=True)
class Metrics:
    """What a run has logged.

    Attributes:
        series: by the metric's name.
        load_steps: some of those that loads were logged at, evenly.
        loads: by the metric's name, [load_steps, MoE layers, experts or devices] float32, nan where the run had no
            finite number; none of a dense model.
        last_step: 0 where nothing is logged.
        unreadable: numbers, from 1, of lines that are no logged step, but for one that is being written.
    """

    series: dict[str, Series]
    load_steps: list[int]
    loads: dict[str, NDArray[np.float32]]
    last_step: int
    unreadable: list[int]

    def last(self, name: str) -> float | None:
        """The last finite value of a metric, if there is one."""
        values = self.series[name].values if name in self.series else np.empty(0)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if finite.size else None


def read_metrics(path: Path) -> Metrics:
    """Everything that is readable; a run that has logged nothing yet has no file."""
    reader = _Reader()
    if path.exists():
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n"):
                    reader.read(number, line)
    return reader.metrics()


class _Reader:
    """Columns of numbers, and a bounded number of loads."""

    def __init__(self) -> None:
        self._steps = array("q", [0])
        self._tokens = array("d", [0.0])
        self._rows: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))
        self._values: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._frames: Frames | None = None
        self._unreadable: list[int] = []

    def read(self, number: int, line: bytes) -> None:
        """Take a line, if it is a logged step."""
        try:
            found = json.loads(line)
            step = found["step"]
            if not isinstance(step, int) or not self._steps[-1] < step < 2**53:
                raise ValueError(f"step {step} after {self._steps[-1]}")
            numbers = {name: _number(v) for name, v in found.items() if v is None or isinstance(v, int | float)}
            loads = self._loads(found)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            self._unreadable.append(number)
        else:
            self._add(step, numbers)
            if loads:
                self._add_loads(step, loads)

    def _loads(self, line: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
        loads = {name: np.asarray(line[name], np.float32) for name in LOADS if name in line}
        shapes = {name: load.shape for name, load in loads.items()}
        if any(load.ndim != 2 or not load.size for load in loads.values()) or (
            loads and self._shapes not in ({}, shapes)
        ):
            raise ValueError(f"loads of shapes {shapes}")
        return loads

    def _add(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self._rows[name].append(len(self._steps))
            self._values[name].append(number)
        self._steps.append(step)
        self._tokens.append(numbers.get("consumed_tokens", np.nan))

    def _add_loads(self, step: int, loads: dict[str, NDArray[np.float32]]) -> None:
        if self._frames is None:
            self._shapes = {name: load.shape for name, load in loads.items()}
            self._frames = Frames(max(2, min(MAX_FRAMES, MAX_LOADS // sum(load.size for load in loads.values()))))
        self._frames.add(step, loads)

    def metrics(self) -> Metrics:
        """Of all lines."""
        steps, tokens = np.array(self._steps), np.array(self._tokens)
        rows = {name: np.array(found) for name, found in self._rows.items()}
        frames = self._frames.chosen() if self._frames is not None else []
        return Metrics(
            series={name: Series(steps[at], tokens[at], np.array(self._values[name])) for name, at in rows.items()},
            load_steps=[step for step, _ in frames],
            loads={name: np.stack([loads[name] for _, loads in frames]) for name in self._shapes},
            last_step=int(steps[-1]),
            unreadable=self._unreadable,
        )


def _number(value: float | None) -> float:
    """What was not finite is logged as null."""
    return np.nan if value is None else float(value)
