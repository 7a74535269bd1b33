"""The colors of load over the mean, the same in the report and at Weights & Biases. Needs no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

LOW, NEUTRAL, HIGH = "#2b6cb8", "#f1f2f4", "#d23f31"  # of no load, of the mean, and of the end of the range
LEAST_RANGE = 2.0  # from 0, so that small differences look small
SHOWN_PERCENT = 99.5  # of the loads; what lies above has the color of the end


def end_of_range(load: ArrayLike) -> float:
    """The load that is drawn in the strongest color."""
    values = np.asarray(load, dtype=float)
    finite = values[np.isfinite(values)]
    return float(max(LEAST_RANGE, np.percentile(finite, SHOWN_PERCENT))) if finite.size else LEAST_RANGE
