"""Lay out a workspace of Weights & Biases for the runs of a project.

python tools/wandb_dashboard.py --project PROJECT [--entity ENTITY] [--name NAME] [--dry-run]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import wandb
from pydantic import RootModel

from megatron_moe.config.errors import ConfigError, exit_code_of

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
except ImportError:
    sys.exit("error: wandb-workspaces is not installed: pip install -e '.[dashboard]'")

TOKENS = "consumed_tokens"
PARTS = ["time/forward_backward_s", "time/optimizer_s", "time/data_wait_s"]


def main(argv: list[str] | None = None) -> int:
    """Save or print the workspace; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", required=True, help="logger.wandb_project of the runs")
    parser.add_argument("--entity", help="logger.wandb_entity of the runs (default: your own)")
    parser.add_argument("--name", default="Megatron-MoE", help="of the workspace (default: Megatron-MoE)")
    parser.add_argument("--dry-run", action="store_true", help="print its sections as JSON, and ask no server")
    args = parser.parse_args(argv)
    if args.dry_run:
        print(RootModel[list[ws.Section]](sections()).model_dump_json(indent=1, exclude_none=True))
        return 0
    return exit_code_of(lambda: save(args.entity, args.project, args.name))


def save(entity: str | None, project: str, name: str) -> None:
    """Send the workspace to the server.

    Raises:
        ConfigError: the server does not take it.
    """
    try:
        entity = entity or wandb.Api().default_entity
        ws.Workspace(entity=entity, project=project, name=name, sections=sections()).save()  # says where it is
    except Exception as error:  # of the network, the key, the project
        raise ConfigError(f"wandb: {error}") from error


def sections() -> list[ws.Section]:
    """All that a run logs, what is looked at first on top."""
    return [
        section(
            "Loss",
            plot("train/lm_loss", x=TOKENS),
            plot("valid/lm_loss", x=TOKENS),
            plot("train/lm_loss"),
            plot("train/grad_norm", log_y=True),
            plot("train/lr"),
            plot("train/skipped_steps"),
            plot("train/batch_size"),
            plot(TOKENS),
        ),
        section(
            "Balance",
            plot("train/expert_balance_loss"),
            plot("train/device_balance_loss"),
            plot("train/communication_balance_loss"),
            plot("moe/max_violation", "moe/max_device_violation"),
            wr.LinePlot(title="moe/layer_N/max_violation", metric_regex=r"moe/layer_\d+/max_violation"),
            plot("moe/dropped_fraction"),
            wr.MediaBrowser(title="expert load", media_keys=["moe/expert_load"]),
            wr.MediaBrowser(title="device load", media_keys=["moe/device_load"]),
        ),
        section(
            "Speed",
            plot("speed/tokens_per_second_per_gpu"),
            plot("speed/tflops_per_gpu"),
            plot("speed/mfu"),
            plot("speed/tokens_per_second"),
            plot("speed/step_time_s"),
            wr.LinePlot(title="step time", y=PARTS, plot_type="stacked-area"),
            plot("time/all_to_all_s"),
            plot("moe/all_to_all_gib"),
            plot("memory/peak_gib"),
            plot("checkpoint/save_s", "checkpoint/blocked_s"),
        ),
    ]


def section(name: str, *panels: wr.LinePlot | wr.MediaBrowser) -> ws.Section:
    """Open, three panels in a row."""
    rows = -(-len(panels) // 3)
    return ws.Section(
        name, panels=list(panels), is_open=True, layout_settings=ws.SectionLayoutSettings(columns=3, rows=rows)
    )


def plot(*metrics: str, x: str = "Step", log_y: bool | None = None) -> wr.LinePlot:
    """Metrics over steps, or over another one."""
    return wr.LinePlot(title=f"{', '.join(metrics)} over {x}", x=x, y=list(metrics), log_y=log_y)


if __name__ == "__main__":
    sys.exit(main())
