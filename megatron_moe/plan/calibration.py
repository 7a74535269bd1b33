"""The inputs of the step's time that fit measured runs. Pure; imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moe.config.cluster import ClusterConfig, PlanConfig
from megatron_moe.config.schema import Config
from megatron_moe.plan.hardware import of_a_rank
from megatron_moe.plan.step_time import StepModel

LINKS = ("intra_node", "inter_node")
GRID = 60


@dataclass(frozen=True)
class Measurement:
    """What a run measured, in seconds a step.

    Attributes:
        config: of the run.
        world_size: its ranks.
        step: all of it.
        passes: forward and backward, what is sent meanwhile and the reduction of gradients included.
        all_to_all: what of this is dispatch and combine.
        update: what follows the passes: the optimizer's, and the gathering of weights.
    """

    config: Config
    world_size: int
    step: float
    passes: float
    all_to_all: float
    update: float


def calibrated(cluster: ClusterConfig, runs: list[Measurement]) -> ClusterConfig:
    """The cluster with the inputs that bring the estimates nearest to what runs measured.

    Each part of the step gives its own: the update `memory_efficiency`; dispatch and combine, waiting included, the
    efficiency of the links that they use; and the passes `compute_efficiency` and `layer_overhead_s`, in the proportion
    that the cluster has unless the runs differ in the tokens of a micro batch. Shares stay at most 1. Parts that no run
    has leave their input as it is.

    Args:
        cluster: with all rates.
        runs: of one or more layouts on it.
    """
    fitted: dict[str, float] = {}
    for link in LINKS:
        name = f"{link}_efficiency"
        sending = [run for run in runs if run.all_to_all > 0 and _link(run, cluster) == link]
        if sending:
            fitted[name] = _share(*zip(*(_sent(run, cluster, link) for run in sending), strict=True))
            cluster = dataclasses.replace(cluster, **fitted)
    fitted["memory_efficiency"] = _share(*zip(*(_update(run, cluster) for run in runs), strict=True))
    cluster = dataclasses.replace(cluster, **fitted)
    fitted |= _passes(cluster, runs)
    return dataclasses.replace(cluster, **fitted, calibrated=sorted(fitted))


def predicted(run: Measurement, cluster: ClusterConfig) -> float:
    """Seconds of a run's step."""
    model = _model(run, cluster)
    return model.step(model.pipeline_s()).total


def _model(run: Measurement, cluster: ClusterConfig, **changes: float) -> StepModel:
    """Of the run's layout, with other inputs."""
    cluster = dataclasses.replace(of_a_rank(cluster, run.world_size), **changes)
    return StepModel(PlanConfig(**vars(run.config), cluster=cluster), run.world_size)


def _update(run: Measurement, cluster: ClusterConfig) -> tuple[float, float]:
    """Seconds of the optimizer at the full rate, and those measured: without the gathering of weights."""
    step = _model(run, cluster, memory_efficiency=1.0).step(0.0)
    return step.optimizer, max(run.update - step.weights, 0.1 * run.update)


def _sent(run: Measurement, cluster: ClusterConfig, link: str) -> tuple[float, float]:
    """Seconds of all-to-alls over a link at its full rate, and those measured: without what goes over the other."""
    others = _all_to_all(run, cluster, **{f"{link}_bandwidth": math.inf})
    at_full_rate = _all_to_all(run, cluster, **{f"{link}_efficiency": 1.0}) - others
    return at_full_rate, max(run.all_to_all - others, 0.1 * run.all_to_all)


def _all_to_all(run: Measurement, cluster: ClusterConfig, **changes: float) -> float:
    """Of the stage that sends most."""
    model = _model(run, cluster, **changes)
    return model.micro_batches * max(
        sum(model.pass_time(layers, backward=kind).all_to_all for layers in chunks for kind in (False, True))
        for chunks in model.chunks
    )


def _link(run: Measurement, cluster: ClusterConfig) -> str | None:
    """What the slower part of a run's all-to-alls goes over; None: it has none."""
    group = _model(run, cluster).groups.expert
    if group.size == 1:
        return None
    return "inter_node" if group.per_node < group.size else "intra_node"


def _share(at_full_rate: Sequence[float], measured: Sequence[float]) -> float:
    """Median of the seconds at the full rate over the measured ones."""
    return min(1.0, float(np.median(np.divide(at_full_rate, measured))))


def _passes(cluster: ClusterConfig, runs: list[Measurement]) -> dict[str, float]:
    """Of all `compute_efficiency`, and of the overheads that suit each best, those with the least relative errors."""
    sizes = {run.config.train.micro_batch_size * run.config.data.sequence_length for run in runs}
    measured = np.array([run.passes for run in runs])
    silent = {"peak_flops": math.inf, "memory_bandwidth": math.inf, **{f"{link}_bandwidth": math.inf for link in LINKS}}
    layers = np.array([_model(run, cluster, **silent, layer_overhead_s=1.0).pipeline_s() for run in runs]) / measured

    def error_and_inputs(efficiency: float) -> tuple[float, dict[str, float]]:
        times = [_model(run, cluster, compute_efficiency=efficiency, layer_overhead_s=0.0) for run in runs]
        left = 1 - np.array([model.pipeline_s() + model.step(0.0).gradients for model in times]) / measured
        if len(sizes) > 1:
            overhead = max(0.0, float(layers @ left / (layers @ layers)))
        else:
            overhead = cluster.layer_overhead_s * cluster.compute_efficiency / efficiency
        fitted = {"compute_efficiency": efficiency, "layer_overhead_s": overhead}
        return float(np.square(left - overhead * layers).sum()), fitted

    best = 1 / 30
    for width in (30.0, 1.15, 1.006):  # of what is searched, as a factor
        choices = np.minimum(1.0, best * np.geomspace(1 / width, width, GRID))
        best = min(choices.tolist(), key=lambda efficiency: error_and_inputs(efficiency)[0])
    return error_and_inputs(best)[1]
