"""What only a GPU can show. Skipped without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import GPUS
from tests.helpers.cli import ROOT, metrics_of
from tests.helpers.training import TINY


def environment() -> dict[str, str]:
    hidden = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return hidden if GPUS is None else hidden | {"CUDA_VISIBLE_DEVICES": GPUS}


def has_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gpu(), reason="needs a GPU: NCCL and CUDA kernels"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_gpu_learns(precision: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "pretrain.py"), *TINY, f"precision={precision}", "logger.log_interval=1"]
    subprocess.run([*command, "run.name=gpu"], cwd=tmp_path, env=environment(), check=True)
    logged = metrics_of(tmp_path / "runs" / "gpu")
    losses = [line["train/lm_loss"] for line in logged]
    assert sum(losses[-3:]) < sum(losses[:3])
    for line in logged[3:]:
        parts = sum(line[f"time/{part}_s"] for part in ("forward_backward", "optimizer", "data_wait"))
        assert 0.3 * line["speed/step_time_s"] < parts < 1.2 * line["speed/step_time_s"]
