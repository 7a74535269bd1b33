"""`tools/plan.py --calibrate`."""

from __future__ import annotations

import argparse
import dataclasses
import json

import yaml
from rich.console import Console
from rich.table import Table

from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.config.cluster import ClusterConfig
from megatron_moe.plan.calibration import Measurement, calibrated, predicted
from megatron_moe.plan.hardware import measured
from tools.planning.choices import new_choice


def calibrate(cluster: ClusterConfig, args: argparse.Namespace) -> None:
    """Fit a cluster's inputs to runs, show how well they then agree, and write them.

    Args:
        cluster: as it is.
        args: of the command line.
    """
    from megatron_moe.report.measurement import measurements

    runs = dict(zip(map(str, args.calibrate), measurements(args.calibrate, cluster), strict=True))
    fitted = calibrated(measured(cluster), list(runs.values()))
    if args.json:
        errors = {folder: predicted(run, fitted) / run.step - 1 for folder, run in runs.items()}
        print(json.dumps({"cluster": dataclasses.asdict(fitted), "errors": errors}, default=str))
    else:
        show(cluster, fitted, runs)
    if args.emit:
        write(fitted, args)


def show(before: ClusterConfig, fitted: ClusterConfig, runs: dict[str, Measurement]) -> None:
    """The inputs, and the steps of the runs, by folder."""
    inputs = Table("input", "before", "fitted", box=None)
    for name in fitted.calibrated:
        value = getattr(fitted, name)
        most = " (the most that it can be)" if name.endswith("efficiency") and value == 1 else ""
        inputs.add_row(f"cluster.{name}", f"{getattr(before, name):.4g}", f"{value:.4g}{most}")
    steps = Table("run", "ranks", "tokens of a micro batch", "step, s", "predicted", "error", box=None)
    for folder, run in runs.items():
        tokens = run.config.train.micro_batch_size * run.config.data.sequence_length
        found = predicted(run, fitted)
        error = f"{found / run.step - 1:+.1%}"
        steps.add_row(folder, str(run.world_size), f"{tokens:,}", f"{run.step:.4g}", f"{found:.4g}", error)
    Console(highlight=False).print(inputs, steps)


def write(fitted: ClusterConfig, args: argparse.Namespace) -> None:
    """As a choice of `cluster`."""
    path = new_choice(args.config_dir, "cluster", args.emit)
    inputs = {**plain(fitted), "name": args.emit}
    path.write_text(f"# Fitted to {', '.join(map(str, args.calibrate))}\n{yaml.safe_dump(inputs, sort_keys=False)}")
    if not args.json:
        print(f"wrote {path}; python tools/plan.py --config-dir {args.config_dir} cluster={args.emit}")
