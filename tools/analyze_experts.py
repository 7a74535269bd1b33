"""What a trained run's experts are worth (DeepSeekMoE paper, 4.5), and runs of several models beside each other.

python tools/analyze_experts.py --run RUN [RUN ...]

Writes experts.json and experts.html into RUN/analysis, or --output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from megatron_moe.config.errors import ConfigError, exit_code_of
from megatron_moe.distributed.accelerators import quiet

Report = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="folders of runs, or of imported models")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=PREFIX",
        help="indexed datasets (default: the run's held-out data)",
    )
    parser.add_argument("--num-samples", type=int, default=128, help="sequences of each source (default: 128)")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/analysis, of the first run)")
    args = parser.parse_args(argv)
    return exit_code_of(lambda: analyze_runs(args))


def analyze_runs(args: argparse.Namespace) -> None:
    """Take each run apart, write the reports and print the tables."""
    if args.num_samples < 1:
        raise ConfigError(f"--num-samples={args.num_samples}: must be positive")
    check_runs(args.run)
    folder = args.output or args.run[0] / "analysis"
    folder.mkdir(parents=True, exist_ok=True)
    reports = [analyze_run(run, args) for run in args.run]
    (folder / "experts.json").write_text(json.dumps(reports), encoding="utf-8")
    (folder / "experts.html").write_text(page(reports), encoding="utf-8")
    print_tables(reports)
    print(f"wrote {folder / 'experts.json'} and {folder / 'experts.html'}")


def check_runs(folders: list[Path]) -> None:
    """Raise ConfigError for a folder that is no run, before work on the others."""
    quiet()
    from megatron_moe.train.restore import find_checkpoint, read_config

    for folder in folders:
        read_config(folder)
        find_checkpoint(folder)


def analyze_run(folder: Path, args: argparse.Namespace) -> Report:
    """Restore a run and take it apart."""
    from megatron_moe.data.sources import held_out_sources
    from megatron_moe.train.expert_analysis import analyze
    from megatron_moe.train.restore import restored

    with restored(folder) as run:
        return analyze(run, held_out_sources(run.config, named_paths(args.data)), args.num_samples)


def named_paths(arguments: list[str]) -> dict[str, str]:
    """The paths of datasets by name."""
    paths: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path) or name in paths:
            raise ConfigError(f"--data {argument}: must be NAME=PREFIX, each name once")
        paths[name] = path
    return paths


def print_tables(reports: list[Report]) -> None:
    """Losses of each run, and of the models if there are several."""
    console = Console(soft_wrap=True)
    for report in reports:
        console.print(f"\n{report['run']} ({report['model']}, {report['checkpoint']})", markup=False, highlight=False)
        table = Table("", "loss", "change", box=None)
        for name, loss in losses(report).items():
            table.add_row(name, f"{loss:.4f}", f"{loss - report['loss']:+.4f}")
        console.print(table)
    if len({report["model"] for report in reports}) > 1:
        same_data = len({tuple(s["digest"] for s in report["sources"].values()) for report in reports}) == 1
        console.print(
            comparison(reports) if same_data else "\nno comparison: the runs were measured on different tokens"
        )


def losses(report: Report) -> dict[str, float]:
    """What was measured, by what was changed."""
    masked, topk = report.get("loss_by_masked_fraction", {}), report.get("loss_by_topk", {})
    shared = report.get("loss_with_routed_for_shared")
    return {
        "as trained": report["loss"],
        **(
            {f"as trained, {name}": source["loss"] for name, source in report["sources"].items()}
            if len(report["sources"]) > 1
            else {}
        ),
        **{f"without the top {name} of the routed experts": loss for name, loss in masked.items()},
        **({"routed instead of shared experts": shared} if shared is not None else {}),
        **{f"{k} routed experts a token": loss for k, loss in topk.items()},
    }


def comparison(reports: list[Report]) -> Table:
    """Mean and standard deviation of the held-out loss of each model's runs."""
    table = Table("model", "runs", "parameters", "activated", "held-out loss", box=None)
    by_model: dict[str, list[Report]] = {}
    for report in reports:
        by_model.setdefault(report["model"], []).append(report)
    for model, same in sorted(by_model.items(), key=lambda item: -statistics.mean(r["loss"] for r in item[1])):
        values = [report["loss"] for report in same]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        sizes = (f"{same[0][key]:,}" for key in ("parameters", "activated_parameters"))
        table.add_row(model, str(len(values)), *sizes, f"{statistics.mean(values):.4f}{spread}")
    return table


def page(reports: list[Report]) -> str:
    """The plots, as one HTML page that needs no network."""
    import plotly.io

    figures = [*loss_figures(reports), *(figure for report in reports for figure in layer_figures(report))]
    parts = [
        plotly.io.to_html(figure, full_html=False, include_plotlyjs=number == 0)
        for number, figure in enumerate(figures)
    ]
    title = "<title>Experts</title><meta charset='utf-8'>"
    return f"<!doctype html><html><head>{title}</head><body>{''.join(parts)}</body></html>"


def loss_figures(reports: list[Report]) -> list[Any]:
    """Loss by masked fraction and by activated experts, a line for each run (figures 4 and 5 of the paper)."""
    import plotly.graph_objects as go

    figures = []
    for key, title in (
        ("loss_by_masked_fraction", "share of its best routed experts that each token is kept from"),
        ("loss_by_topk", "routed experts a token"),
    ):
        lines = [
            go.Scatter(x=list(report[key]), y=list(report[key].values()), name=report["run"], mode="lines+markers")
            for report in reports
            if key in report
        ]
        if lines:
            figure = go.Figure(lines, layout={"showlegend": True, "title": f"loss by {title}"})
            figure.update_xaxes(title=title, type="category")
            figures.append(figure.update_yaxes(title="held-out loss, nats per token"))
    return figures


def layer_figures(report: Report) -> list[Any]:
    """For each source, the load of each expert by layer, and co-activation with a slider over layers."""
    import numpy as np
    import plotly.express as px

    figures = []
    for name, source in report["sources"].items():
        if not source["expert_load"]:
            continue
        title = f"{report['run']}, {name}: "
        load = px.imshow(
            source["expert_load"],
            y=[str(layer) for layer in report["moe_layers"]],
            aspect="auto",
            labels={"x": "routed expert", "y": "layer", "color": "load / mean"},
        )
        figures.append(load.update_layout(title=f"{title}load"))
        co_activation = np.array(source["co_activation"])
        co_activation *= 1 - np.eye(co_activation.shape[-1])  # an expert with itself would hide the others
        if not co_activation.any():
            continue
        pairs = px.imshow(
            co_activation,
            animation_frame=0,
            labels={"x": "also selected", "y": "selected", "color": "share", "animation_frame": "MoE layer, from 0"},
        )
        figures.append(pairs.update_layout(title=f"{title}share of a row's tokens that also select the column"))
    return figures


if __name__ == "__main__":
    sys.exit(main())
