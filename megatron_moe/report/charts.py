"""What the charts of the page show, as JSON values; `page.js` draws them."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.metrics.load_colors import end_of_range
from megatron_moe.report.runs import Bar, RunRecord, some
from megatron_moe.report.thinning import MAX_POINTS, Series, thin_out
from megatron_moe.report.trace import KINDS

Chart = dict[str, Any]
LAYER_VIOLATION = re.compile(r"moe/layer_(\d+)/max_violation")
NOT_CURVES = ("step", "consumed_tokens", "test/*", "moe/layer_*")
LABELS = {
    "valid/lm_loss": "mean of the sources",
    "moe/max_violation": "expert",
    "moe/max_device_violation": "device",
    "speed/step_time_s": "whole step",
    "time/forward_backward_s": "forward and backward",
}
STEP_PARTS = "seconds; the all-to-all is within forward and backward"
MAX_COLUMNS = 200  # of a heat map over time
NO_NUMBER = 2**16 - 1
MIN_SHARE = 1 / 4000  # of a time line's width: shorter bars cannot be seen


@dataclass(frozen=True)
class Topic:
    """Metrics that one chart shows together.

    Attributes:
        section: of the page.
        title: of the chart.
        unit: of the values.
        metrics: patterns of names.
    """

    section: str
    title: str
    unit: str
    metrics: tuple[str, ...]


TOPICS = (
    Topic("loss", "Training loss", "nats per token", ("train/lm_loss",)),
    Topic("loss", "Held-out loss", "nats per token", ("valid/lm_loss", "valid/*/lm_loss")),
    Topic("loss", "Held-out loss per byte", "bits per byte of text", ("valid/*/bits_per_byte",)),
    Topic("routing", "Balance losses", "with their factors, summed over layers", ("train/*_balance_loss",)),
    Topic("routing", "Largest violation", "largest load over the mean, minus 1", ("moe/max*_violation",)),
    Topic("routing", "Dropped selections", "share of all", ("moe/dropped_fraction",)),
    Topic("optimization", "Learning rate", "", ("train/lr",)),
    Topic("optimization", "Gradient norm", "before clipping", ("train/grad_norm",)),
    Topic("optimization", "Batch", "sequences a step", ("train/batch_size",)),
    Topic("optimization", "Skipped steps", "since the first step", ("train/skipped_steps",)),
    Topic("speed", "Throughput", "tokens per second", ("speed/tokens_per_second",)),
    Topic("speed", "Throughput per GPU", "tokens per second", ("speed/tokens_per_second_per_gpu",)),
    Topic("speed", "Model FLOP/s per GPU", "TFLOP/s", ("speed/tflops_per_gpu",)),
    Topic("speed", "Model FLOPs utilization", "share of the GPU's peak", ("speed/mfu",)),
    Topic("speed", "Duration of a step and its parts", STEP_PARTS, ("speed/step_time_s", "time/*_s")),
    Topic("speed", "Sent by the all-to-all", "GiB a step, by all ranks", ("moe/all_to_all_gib",)),
    Topic("speed", "Memory", "GiB", ("memory/*_gib",)),
    Topic("speed", "Checkpoints", "seconds", ("checkpoint/*_s",)),
)


def curves(runs: list[RunRecord]) -> list[Chart]:
    """Charts over time.

    Related metrics of a single run share a chart, a line each; of several runs each metric has its own, a line a run.
    Constant metrics are left out.
    """
    names = [name for name in _curve_names(runs) if _constant(runs, name) is None]
    charts = []
    for topic in (*TOPICS, *_untold(names)):
        found = sorted((name for name in names if _is_about(topic, name)), key=lambda name: name not in topic.metrics)
        if len(found) == 2 and topic.metrics[0] == "valid/lm_loss":
            found = ["valid/lm_loss"]  # of a single source
        groups = [[name] for name in found] if len(runs) > 1 else [found]
        charts += [_curve_chart(topic, group, len(found) > 1, runs) for group in groups if group]
    return charts


def constant_metrics(runs: list[RunRecord]) -> list[str]:
    """Metrics that no chart shows, as 'name = value'."""
    constants = {name: _constant(runs, name) for name in _curve_names(runs)}
    return [f"{name} = {value:g}" for name, value in constants.items() if value is not None]


def _curve_names(runs: list[RunRecord]) -> list[str]:
    names = {name for run in runs for name in run.metrics.series}
    return sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in NOT_CURVES))


def _constant(runs: list[RunRecord], name: str) -> float | None:
    """The only value of a metric that was logged more than once, or 0 where it was once."""
    values = np.concatenate([run.metrics.series[name].values for run in runs if name in run.metrics.series])
    is_constant = (values == values[0]).all() and (len(values) > 1 or values[0] == 0)
    return float(values[0]) if is_constant else None


def _is_about(topic: Topic, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in topic.metrics)


def _untold(names: list[str]) -> list[Topic]:
    """A topic for each metric that is in none, such as one that a user has added."""
    return [Topic("other", name, "", (name,)) for name in names if not any(_is_about(topic, name) for topic in TOPICS)]


def _curve_chart(topic: Topic, names: list[str], is_one_of_many: bool, runs: list[RunRecord]) -> Chart:
    title = f"{topic.title}: {_label(names[0])}" if is_one_of_many and len(names) == 1 else topic.title
    lines = [
        _line(number, run.name if len(runs) > 1 else _label(name), run.metrics.series[name])
        for number, run in enumerate(runs)
        for name in names
        if name in run.metrics.series
    ]
    return {"section": topic.section, "title": title, "unit": topic.unit, "lines": lines}


def _label(name: str) -> str:
    """What tells a metric from the others of its chart."""
    if name.count("/") == 2:
        return name.split("/")[1]
    own = name.rsplit("/", maxsplit=1)[-1]
    return LABELS.get(name) or re.sub(r"(_balance_loss|_s|_gib)$", "", own).replace("_", " ")


def _line(run: int, label: str, series: Series) -> dict[str, Any]:
    band = thin_out(series)
    is_thinned = len(series.steps) > MAX_POINTS
    return {
        "run": run,
        "label": label,
        "steps": band.steps.tolist(),
        "tokens": _numbers(band.tokens),
        "mean": _numbers(band.mean),
        "low": _numbers(band.low) if is_thinned else None,
        "high": _numbers(band.high) if is_thinned else None,
        "not_finite": some(series.steps[~np.isfinite(series.values)].tolist(), "step"),
    }


def _numbers(values: NDArray[np.floating]) -> list[float | None]:
    """Six digits of each; None where there is no number."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


def violation_by_layer(runs: list[RunRecord]) -> list[Chart]:
    """Of each run with experts the largest violation of each layer, over time; means where steps are thinned out."""
    charts = []
    for number, run in enumerate(runs):
        found = {int(m[1]): name for name in run.metrics.series if (m := LAYER_VIOLATION.fullmatch(name))}
        bands = {layer: thin_out(run.metrics.series[found[layer]], MAX_COLUMNS) for layer in sorted(found)}
        if bands:
            longest = max(bands.values(), key=lambda band: len(band.steps))
            charts.append(
                {
                    "run": number,
                    "steps": longest.steps.tolist(),
                    "layers": list(bands),
                    "values": [_numbers(band.mean) for band in bands.values()],
                }
            )
    return charts


def loads(runs: list[RunRecord]) -> list[Chart]:
    """Of each run with experts, their loads and their devices' at some steps, in 16 bits each.

    A number n is n * max / 65534; 65535 is none.
    """
    return [
        {
            "run": number,
            "steps": run.metrics.load_steps,
            "kinds": {name.split("/")[1]: _load(run, values) for name, values in run.metrics.loads.items()},
        }
        for number, run in enumerate(runs)
        if run.metrics.loads
    ]


def _load(run: RunRecord, values: NDArray[np.float32]) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    largest = float(finite.max()) if finite.any() else 1.0
    packed = np.where(np.isfinite(values), np.round(np.nan_to_num(values) / largest * (NO_NUMBER - 1)), NO_NUMBER)
    first_layer = run.config.model.num_layers - values.shape[1]
    return {
        "layers": [first_layer + row for row in range(values.shape[1])],
        "columns": values.shape[2],
        "max": largest,
        "strong": end_of_range(values),
        "data": base64.b64encode(packed.astype("<u2").tobytes()).decode(),
    }


def timelines(runs: list[RunRecord]) -> list[Chart]:
    """Of each run that has one, what its ranks do in a step; bars that are too short to be seen are left out."""
    charts = []
    for number, run in enumerate(runs):
        if run.timeline is None or not any(run.timeline.ranks.values()):
            continue
        end_s = max(bar.end_s for bars in run.timeline.ranks.values() for bar in bars)
        ranks = sorted(run.timeline.ranks)
        charts.append(
            {
                "run": number,
                "step": run.timeline.step,
                "rows": [_rank_label(run, rank) for rank in ranks],
                "bars": [
                    [row, bar.kind, bar.label, round(bar.start_s * 1e3, 3), round((bar.end_s - bar.start_s) * 1e3, 3)]
                    for row, rank in enumerate(ranks)
                    for bar in run.timeline.ranks[rank]
                    if bar.end_s - bar.start_s >= end_s * MIN_SHARE
                ],
                "busy": [_computing_s(run.timeline.ranks[rank]) / end_s for rank in ranks],
            }
        )
    return charts


def _rank_label(run: RunRecord, rank: int) -> str:
    stages = run.config.parallel.pipeline_model_parallel_size
    return f"rank {rank}" + (f", stage {rank * stages // run.world_size}" if stages > 1 else "")


def _computing_s(bars: list[Bar]) -> float:
    return sum(bar.end_s - bar.start_s for bar in bars if bar.kind in ("forward", "backward"))


def costs(runs: list[RunRecord]) -> Chart | None:
    """Where the time of the profiled steps went, in milliseconds by kind; None where none was profiled."""
    found = [(run, cost) for run in runs for cost in run.costs]
    if not found:
        return None
    return {
        "rows": [
            (f"{run.name}, " if len(runs) > 1 else "") + f"step {cost.step}, {_rank_label(run, cost.rank)}"
            for run, cost in found
        ],
        "on_gpu": any(cost.on_gpu for _, cost in found),
        "kinds": {KINDS[kind]: [round(cost.seconds[kind] * 1e3, 3) for _, cost in found] for kind in KINDS},
    }
