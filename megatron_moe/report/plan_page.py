"""A plan as one HTML page that needs no network."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable

import plotly.graph_objects as go
import plotly.io

from megatron_moe.plan.estimate import Plan

GIB = 2**30
DRAWN = 20_000  # passes of a time line
STYLE = (
    "body{font:1rem/1.4 system-ui,sans-serif;margin:1rem;max-width:90rem}h1{font-size:1.3rem}"
    "table{border-collapse:collapse;width:100%}td{padding:.3rem .6rem;border-top:1px solid #ddd;vertical-align:top;"
    "overflow-wrap:anywhere}"
)


def plan_page(title: str, plan: Plan, rows: Iterable[tuple[str, ...]]) -> str:
    """Memory of the stages, a time line, and all estimates as rows of text."""
    figures = [
        plotly.io.to_html(figure, full_html=False, include_plotlyjs=number == 0, config={"responsive": True})
        for number, figure in enumerate((_memory(plan), _timeline(plan)))
    ]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    title = html.escape(title)
    return (
        f"<!doctype html><html lang='en'><head><title>{title}</title><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head>"
        f"<body><h1>{title}</h1>{''.join(figures)}<table>{cells}</table></body></html>"
    )


def _memory(plan: Plan) -> go.Figure:
    """A bar for each stage, and what may be used."""
    stages = [f"stage {stage}" for stage in range(len(plan.memory))]
    bars = [
        go.Bar(name=field.name, x=stages, y=[getattr(memory, field.name) / GIB for memory in plan.memory])
        for field in dataclasses.fields(plan.memory[0])
    ]
    figure = go.Figure(bars, layout={"barmode": "stack", "title": "memory of the fullest rank of each stage"})
    figure.add_hline(plan.memory_limit / GIB, annotation_text="usable")
    return figure.update_yaxes(title="GiB")


def _timeline(plan: Plan) -> go.Figure:
    """The passes of each stage; of a long step the first."""
    shown = [slots[: DRAWN // len(plan.timeline)] for slots in plan.timeline]
    bars = []
    for kind in sorted({slot.task.kind for slots in shown for slot in slots}, key=lambda kind: kind.value):
        drawn = [(stage, slot) for stage, slots in enumerate(shown) for slot in slots if slot.task.kind is kind]
        bars.append(
            go.Bar(
                name=kind.value,
                orientation="h",
                y=[f"stage {stage}" for stage, _ in drawn],
                base=[slot.start for _, slot in drawn],
                x=[slot.stop - slot.start for _, slot in drawn],
                hovertext=[f"micro batch {s.task.micro_batch}, virtual stage {s.task.chunk}" for _, s in drawn],
            )
        )
    figure = go.Figure(bars, layout={"barmode": "overlay", "title": "forward and backward passes of a step"})
    return figure.update_xaxes(title="seconds").update_yaxes(autorange="reversed")
