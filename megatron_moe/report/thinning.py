"""Fewer points of a long run, without losing its extremes. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 500  # of a curve: about one for each pixel of its chart


@dataclass(frozen=True)
class Series:
    """A metric at the steps that it was logged at.

    Attributes:
        steps: rising, [n] int64.
        tokens: consumed by then, [n] float64.
        values: nan where the run had no finite number, [n] float64.
    """

    steps: NDArray[np.int64]
    tokens: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Band:
    """A series in at most `MAX_POINTS` points; the mean, the lowest and the highest of the values that each stands for.

    Attributes:
        steps: [n] int64.
        tokens: [n] float64.
        mean: of those that are finite, nan if none is, [n] float64.
        low: as `mean`.
        high: as `mean`.
    """

    steps: NDArray[np.int64]
    tokens: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def thin_out(series: Series, max_points: int = MAX_POINTS) -> Band:
    """Consecutive values as one point each, about the same number everywhere; no value lies outside of its point."""
    count = len(series.steps)
    points = min(count, max_points)
    starts = np.arange(points) * count // points
    sizes = np.diff(np.append(starts, count))
    finite = np.isfinite(series.values)
    numbers = np.add.reduceat(finite.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(finite, series.values, 0.0), starts)
    middle = starts + sizes // 2
    return Band(
        steps=series.steps[middle],
        tokens=series.tokens[middle],
        mean=np.divide(sums, numbers, out=np.full(len(starts), np.nan), where=numbers > 0),
        low=np.fmin.reduceat(series.values, starts),
        high=np.fmax.reduceat(series.values, starts),
    )


def spread_out(count: int, at_most: int) -> NDArray[np.int64]:
    """Indices of `at_most` of `count` things, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))


class Frames:
    """Some of a long run's matrices, evenly over time; whatever the length, at most twice as many are held.

    Args:
        at_most: frames in the end.
    """

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._stride = 1
        self._count = 0
        self._kept: list[tuple[int, Any]] = []
        self._last: tuple[int, Any] | None = None

    def add(self, step: int, matrix: Any) -> None:
        """Take the next one."""
        self._last = step, matrix
        if self._count % self._stride == 0:
            self._kept.append(self._last)
        self._count += 1
        if len(self._kept) > 2 * self._at_most:
            self._kept = self._kept[::2]
            self._stride *= 2

    def chosen(self) -> list[tuple[int, Any]]:
        """Steps and matrices, the first and the last among them."""
        frames = self._kept if self._kept[-1:] == [self._last] else [*self._kept, self._last]
        return [frames[i] for i in spread_out(len(frames), self._at_most)]
