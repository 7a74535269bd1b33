"""A whole run with `logger=wandb`, offline, stopped and gone on, as wandb itself reads it."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.cli import ROOT, metrics_of, run_cli, user_environment
from tests.helpers.training import TINY
from tests.helpers.wandb import Record, history, of_type, records, segments

STEPS = 8
RUN = [
    *(option for option in TINY if not option.startswith("train.train_steps")),
    f"train.train_steps={STEPS}",
    "parallel=ep2",
    "run.name=w",
    "logger=wandb",
    "logger.log_interval=1",
    "logger.heat_map_interval=2",
    "evaluation.interval=2",
    "evaluation.num_samples=4",
    "checkpoint.save_interval=2",
    "checkpoint.keep_last=9",
]
MOE_LAYERS = (1, 2, 3)
METRICS = {
    "consumed_tokens",
    "train/lm_loss",
    "train/expert_balance_loss",
    "train/device_balance_loss",
    "train/communication_balance_loss",
    "train/lr",
    "train/grad_norm",
    "train/batch_size",
    "train/skipped_steps",
    "valid/lm_loss",
    "speed/tokens_per_second",
    "speed/tokens_per_second_per_gpu",
    "speed/tflops_per_gpu",
    "speed/step_time_s",
    "time/forward_backward_s",
    "time/all_to_all_s",
    "time/optimizer_s",
    "time/data_wait_s",
    "memory/peak_gib",
    "moe/max_violation",
    *(f"moe/layer_{layer}/max_violation" for layer in MOE_LAYERS),
    "moe/max_device_violation",
    "moe/dropped_fraction",
    "moe/all_to_all_gib",
    "checkpoint/save_s",
    "checkpoint/blocked_s",
}
HEAT_MAPS = {"moe/expert_load", "moe/device_load"}


@dataclass(frozen=True)
class Run:
    """What a run left in its folder, and in wandb's files in each of its two starts."""

    folder: Path
    starts: list[list[Record]]

    @property
    def rows(self) -> list[Record]:
        """The logged steps."""
        return [row for start in self.starts for row in history(start)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Stopped by SIGTERM, gone on from an earlier checkpoint, so that steps are done again, and finished."""
    folder = tmp_path_factory.mktemp("wandb")
    command = subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain.py"), *RUN],
        cwd=folder,
        env=user_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in command.stdout:
        if line.startswith("step 5/"):
            break
    command.send_signal(signal.SIGTERM)
    command.communicate(timeout=120)
    assert command.returncode == 75
    for checkpoint in (folder / "runs/w/checkpoints").glob("step_*"):
        if checkpoint.name > "step_00000002":
            shutil.rmtree(checkpoint)
    result = run_cli("pretrain.py", *RUN, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "from step 2 to 8" in result.stdout
    run = folder / "runs" / "w"
    return Run(run, [records(segment) for segment in segments(run)])


def test_one_run_for_both_starts_holds_each_step_once(run: Run) -> None:
    ids = [of_type(start, "run")[0]["run_id"] for start in run.starts]
    assert len(ids) == 2
    assert set(ids) == {json.loads((run.folder / "wandb.json").read_text())["id"]}
    assert [row["_step"] for row in run.rows] == list(range(1, STEPS + 1))


def test_it_holds_every_metric_that_the_run_has_logged(run: Run) -> None:
    rows = {row["_step"]: row for row in run.rows}
    logged = {line.pop("step"): line for line in metrics_of(run.folder)}
    found = {name for row in rows.values() for name in row}
    assert found >= METRICS | {f"{name}._type" for name in HEAT_MAPS}
    scalars = {name for line in logged.values() for name in line} - HEAT_MAPS
    assert scalars <= found
    for step in (1, 2, STEPS):  # of those between, metrics.jsonl has the second time
        assert {name: rows[step][name] for name in logged[step] if name not in HEAT_MAPS} == {
            name: value for name, value in logged[step].items() if name not in HEAT_MAPS
        }


def test_there_are_few_names_for_60_layers_of_160_experts(run: Run) -> None:
    names = {name.partition("._")[0] for row in run.rows for name in row if not name.startswith("_")}
    by_layer = {name for name in names if re.search(r"layer_\d+", name)}
    assert len(by_layer) == len(MOE_LAYERS)
    assert len(names - by_layer) + 60 < 120


def test_the_user_is_told_of_the_preemption(run: Run) -> None:
    first, second = run.starts
    assert [alert["title"] for alert in of_type(first, "alert")] == ["preempted"]
    assert of_type(second, "alert") == []
    assert [of_type(part, "exit")[0]["exit_code"] for part in (first, second)] == [1, 0]


def test_the_readme_names_every_metric(run: Run) -> None:
    text = (ROOT / "README.md").read_text()
    names = {name for line in metrics_of(run.folder) for name in line} - {"step", "valid/mock/lm_loss"}
    names |= {"speed/mfu"}  # of a GPU
    assert {name for name in names if f"`{name}`" not in text and "/layer_" not in name} == set()


def test_the_workspace_shows_what_a_run_logs(tmp_path: Path) -> None:
    result = run_cli("tools/wandb_dashboard.py", "--project", "p", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    panels = [panel for section in json.loads(result.stdout) for panel in section["panels"]]
    shown = {name for panel in panels for name in panel.get("y", []) + panel.get("media_keys", [])}
    patterns = [panel["metric_regex"] for panel in panels if "metric_regex" in panel]
    by_layer = {name for name in METRICS if any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert shown == METRICS - by_layer | HEAT_MAPS | {"speed/mfu"}
    assert len(by_layer) == len(MOE_LAYERS)
    axes = {panel.get("x") for panel in panels if panel.get("y") == ["train/lm_loss"]}
    assert axes == {"Step", "consumed_tokens"}


def test_the_workspace_needs_a_key_to_be_saved(tmp_path: Path) -> None:
    result = run_cli("tools/wandb_dashboard.py", "--project", "p", cwd=tmp_path, HOME=str(tmp_path), WANDB_API_KEY="")
    assert result.returncode == 2
    assert result.stderr.startswith("error: wandb: ")
    assert "API key" in result.stderr
    assert "Traceback" not in result.stderr
