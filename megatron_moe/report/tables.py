"""What the tables of the page say, as text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.config.derived import is_moe_layer
from megatron_moe.config.load import option_names
from megatron_moe.config.schema import Config
from megatron_moe.plan.params import activated_params, total_params
from megatron_moe.plan.placement import describe_layout, placements
from megatron_moe.report.runs import RunRecord

LAST = 10  # logged steps that a figure of the overview is the mean of


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is about, and a text for each run."""

    name: str
    texts: list[str]

    @property
    def differs(self) -> bool:
        """Whether the runs do not all have the same text."""
        return len(set(self.texts)) > 1


@dataclass(frozen=True)
class PlacementRow:
    """What ranks hold: as text, and for each layer of the model 'dense', 'moe' or nothing."""

    stage: int
    ranks: str
    layers: str
    experts: str
    strip: list[str]


def overview(runs: list[RunRecord]) -> list[Row]:
    """The facts that one asks for first; without those that no run has."""
    rows = [Row(name, [text(run) for run in runs]) for name, text in FACTS.items()]
    return [row for row in rows if any(row.texts)]


def _model(run: RunRecord) -> str:
    model = run.config.model
    return f"{model.name}, {total_params(model):,} parameters, {activated_params(model):,} activated"


def _progress(run: RunRecord) -> str:
    done, planned = run.metrics.last_step, run.config.train.train_steps
    return f"{done:,} of {planned:,} steps" + ("" if done >= planned else ", unfinished")


def _tokens(run: RunRecord) -> str:
    tokens = run.metrics.last("consumed_tokens")
    return f"{tokens:,.0f}" if tokens is not None else ""


def _mean_of_last(metric: str, form: str) -> Callable[[RunRecord], str]:
    def text(run: RunRecord) -> str:
        if metric not in run.metrics.series:
            return ""
        values = run.metrics.series[metric].values[-LAST:]
        finite = values[np.isfinite(values)]
        return form.format(finite.mean()) if finite.size else "not finite"

    return text


def _last(metric: str, form: str) -> Callable[[RunRecord], str]:
    def text(run: RunRecord) -> str:
        value = run.metrics.last(metric)
        return form.format(value) if value is not None else ""

    return text


def _checkpoints(run: RunRecord) -> str:
    return ("step " if len(run.checkpoints) == 1 else "steps ") + ", ".join(f"{step:,}" for step in run.checkpoints)


FACTS: dict[str, Callable[[RunRecord], str]] = {
    "model": _model,
    "layout": lambda run: describe_layout(run.config.parallel, run.world_size),
    "progress": _progress,
    "tokens": _tokens,
    f"training loss, mean of the last {LAST}": _mean_of_last("train/lm_loss", "{:.4f}"),
    "held-out loss": _last("valid/lm_loss", "{:.4f}"),
    "test loss": _last("test/lm_loss", "{:.4f}"),
    f"largest violation, mean of the last {LAST}": _mean_of_last("moe/max_violation", "{:.2f}"),
    f"tokens per second, mean of the last {LAST}": _mean_of_last("speed/tokens_per_second", "{:,.0f}"),
    f"model FLOPs utilization, mean of the last {LAST}": _mean_of_last("speed/mfu", "{:.1%}"),
    "checkpoints": lambda run: _checkpoints(run) if run.checkpoints else "",
}


def placement(run: RunRecord) -> list[PlacementRow]:
    """Which layers and experts lie on which ranks."""
    model = run.config.model
    kinds = ["moe" if is_moe_layer(model, layer) else "dense" for layer in range(model.num_layers)]
    rows = []
    for place in placements(model, run.config.parallel, run.world_size):
        here = {layer for chunk in place.layers for layer in chunk}
        strip = [kind if layer in here else "" for layer, kind in enumerate(kinds)]
        ranks, layers, experts = place.describe(model)
        rows.append(PlacementRow(place.stage, ranks, layers, experts, strip))
    return rows


def options(runs: list[RunRecord]) -> dict[str, list[Row]]:
    """Every option of the configurations, by group."""
    groups: dict[str, list[Row]] = {}
    values = [plain(run.config) for run in runs]
    for name in option_names(Config):
        row = Row(name, [_option_text(each, name) for each in values])
        groups.setdefault(name.split(".")[0], []).append(row)
    return groups


def _option_text(config: dict[str, Any], name: str) -> str:
    value = functools.reduce(dict.__getitem__, name.split("."), config)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def environment(runs: list[RunRecord]) -> list[Row]:
    """Overrides, ranks, revision and versions."""
    flat = [_flat(run.environment) for run in runs]
    names = dict.fromkeys(name for each in flat for name in each)
    return [Row(name, [each.get(name, "") for each in flat]) for name in names]


def _flat(environment: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in environment.items():
        if isinstance(value, dict):
            found |= {key: str(part) for key, part in value.items()}
        else:
            found[name] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found
