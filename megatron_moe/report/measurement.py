"""What runs measured of their steps, for the plan's calibration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_moe.config.cluster import ClusterConfig
from megatron_moe.config.errors import ConfigError
from megatron_moe.plan.calibration import Measurement
from megatron_moe.report.runs import RunRecord, read_runs

PARTS = ("speed/step_time_s", "time/forward_backward_s", "time/all_to_all_s", "time/data_wait_s", "time/optimizer_s")


def measurements(folders: list[Path], cluster: ClusterConfig) -> list[Measurement]:
    """Of each run the median of what it logged, but for the first time, which has the warm-up in it.

    Raises:
        ConfigError: a folder is no run, has logged less than twice, or ran in another precision than the cluster's.
    """
    runs = read_runs(folders)
    problems = [text for folder, run in zip(folders, runs, strict=True) for text in _problems(folder, run, cluster)]
    if problems:
        raise ConfigError(*problems)
    return [_measurement(run) for run in runs]


def _problems(folder: Path, run: RunRecord, cluster: ClusterConfig) -> Iterator[str]:
    logged = min(len(_values(run, name)) for name in PARTS)
    dtype = run.config.precision.dtype
    if run.config.model.forced_routing is not None:
        yield f"--calibrate {folder}: its routing was forced, which takes another time than routing that is learned"
    if logged < 2:
        yield f"--calibrate {folder}: has logged its speed {logged} times; 2 are needed (logger.log_interval=1)"
    if dtype is not cluster.dtype:
        yield (
            f"--calibrate {folder}: ran in {dtype.value}, and the rates of cluster={cluster.name} are of "
            f"{cluster.dtype.value}; choose another cluster, such as cluster=cpu"
        )


def _values(run: RunRecord, name: str) -> np.ndarray:
    series = run.metrics.series.get(name)
    return np.empty(0) if series is None else np.asarray(series.values)


def _measurement(run: RunRecord) -> Measurement:
    step, passes, all_to_all, data_wait, optimizer = (float(np.median(_values(run, name)[1:])) for name in PARTS)
    update = max(step - passes - data_wait, optimizer)  # parts are those of the slowest rank in each
    return Measurement(run.config, run.world_size, step - data_wait, passes, all_to_all, update)
