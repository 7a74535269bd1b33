"""Steps that the plan predicts, calibrated on one run, beside those of other layouts and sizes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_moe.config.load import compose_plan
from megatron_moe.plan.calibration import calibrated, predicted
from megatron_moe.plan.hardware import measured
from megatron_moe.report.measurement import measurements

ROOT = Path(__file__).resolve().parents[2]
CALIBRATED = "parallel=single"
OTHERS = (
    "train.micro_batch_size=1",
    "train.micro_batch_size=8",
    "train.global_batch_size=16 train.micro_batch_size=4",
    "data.sequence_length=256",
    "data.sequence_length=512",
    "parallel=pp2",
    "parallel=pp2_vpp2",
    "parallel=ep2",
    "parallel=ep2 train.micro_batch_size=4",
    "parallel=dp2",
    "parallel=pp2_ep2",
    "parallel=tp2",
)


def predictions(steps: int, others: list[str]) -> list[dict[str, Any]]:
    """Of the nano model on this machine's cores, in `steps` steps of a run with each of the options in `others`."""
    cluster = measured(compose_plan(["cluster=cpu"]).cluster)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        runs = enumerate((CALIBRATED, *others))
        folders = [train(Path(folder) / f"run{number}", steps, choice.split()) for number, choice in runs]
        first, *rest = measurements(folders, cluster)
    fitted = calibrated(cluster, [first])
    return [
        {
            "what": f"step of nano, {choice}",
            "figure": run.step,
            "unit": "s",
            "beside": f"{predicted(run, fitted):.3g} s predicted",
            "ratio": predicted(run, fitted) / run.step,
        }
        for choice, run in zip(others, rest, strict=True)
    ]


def train(run: Path, steps: int, options: list[str]) -> Path:
    """Train, and return the run's folder."""
    rarely = f"evaluation.interval={steps} evaluation.num_samples=8 checkpoint.save_interval={steps}".split()
    command = [sys.executable, str(ROOT / "pretrain.py"), "data=mock", f"run.dir={run}", f"run.name={run.name}"]
    often = [f"train.train_steps={steps}", "logger.log_interval=2"]
    subprocess.run([*command, *often, *rarely, *options], check=True, stdout=subprocess.DEVNULL)
    return run
