"""The page: one HTML file that needs no network."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from megatron_moe.report import charts, tables
from megatron_moe.report.runs import RunRecord
from megatron_moe.report.thinning import MAX_POINTS

SECTIONS = {
    "loss": "Loss",
    "routing": "Routing",
    "optimization": "Optimization",
    "speed": "Speed and memory",
    "step": "One step",
    "other": "Other metrics",
}


def page(runs: list[RunRecord]) -> str:
    """Of one run, or of several beside each other."""
    package = files("megatron_moe.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # in the order given
    template = environment.from_string((package / "page.html").read_text(encoding="utf-8"))
    data = chart_data(runs)
    return template.render(
        runs=runs,
        data=data,
        sections={name: title for name, title in SECTIONS.items() if _has_charts(data, name)},
        constant=charts.constant_metrics(runs),
        max_points=MAX_POINTS,
        overview=tables.overview(runs),
        placements=[tables.placement(run) for run in runs],
        options=tables.options(runs),
        environment=tables.environment(runs),
        css=(package / "page.css").read_text(encoding="utf-8"),
        zip=zip,
        js=(package / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def chart_data(runs: list[RunRecord]) -> dict[str, Any]:
    """What `page.js` draws."""
    return {
        "runs": [run.name for run in runs],
        "curves": charts.curves(runs),
        "violations": charts.violation_by_layer(runs),
        "loads": charts.loads(runs),
        "timelines": charts.timelines(runs),
        "costs": charts.costs(runs),
    }


def _has_charts(data: dict[str, Any], section: str) -> bool:
    special = {"routing": ("violations", "loads"), "step": ("timelines", "costs")}
    is_drawn = any(data[name] for name in special.get(section, ()))
    return is_drawn or any(chart["section"] == section for chart in data["curves"])
