"""A run at Weights & Biases, offline, read back; and wandb that fails or hangs."""

import json
import math
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_moe.config.errors import Preempted
from megatron_moe.config.load import compose_config
from megatron_moe.config.schema import Config
from megatron_moe.distributed import watchdog
from megatron_moe.metrics import wandb_run
from megatron_moe.metrics.wandb_run import WandbRun, heat_map
from tests.helpers.cli import ROOT
from tests.helpers.wandb import history, of_type, records, segments

KEY = "0c1e5a7b" * 5
NOTES = 'a "b" $(touch hacked); c'


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = compose_config(["logger=wandb", f"run.dir={tmp_path}", "run.name=try1", "logger.heat_map_interval=10"])
    config.run.notes = NOTES
    return config


@pytest.fixture(autouse=True)
def no_stray_threads() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "wandb"] == []


def log_steps(config: Config, steps: range, *, logged_step: int = 0, error: BaseException | None = None) -> None:
    run = WandbRun(config, logged_step=logged_step)
    for step in steps:
        run.log(step, {"train/lm_loss": 1.0 / step, "consumed_tokens": 7 * step, "moe/expert_load": [[0.5, 1.5]] * 3})
    run.finish(error)


def test_name_group_tags_notes_and_config_are_those_of_the_options(config: Config, tmp_path: Path) -> None:
    config.logger.wandb_group, config.logger.wandb_tags, config.logger.wandb_project = "ablation", ["nano", "x y"], "p"
    log_steps(config, range(1, 2))
    (run,) = of_type(records(*segments(tmp_path)), "run")
    assert (run["display_name"], run["run_group"], run["tags"]) == ("try1", "ablation", ["nano", "x y"])
    assert (run["project"], run["notes"]) == ("p", NOTES)
    assert run["config"]["update"]["model"]["routing"] == "topk"
    assert not (tmp_path / "hacked").exists()


def test_a_run_that_goes_on_keeps_its_id_and_sends_no_step_twice(config: Config, tmp_path: Path) -> None:
    """From step 20 after a crash at 25, from 20 again after one at 23, then to the end."""
    log_steps(config, range(1, 26))
    log_steps(config, range(21, 24), logged_step=25)
    log_steps(config, range(21, 31), logged_step=23)
    found = [records(segment) for segment in segments(tmp_path)]
    assert {of_type(part, "run")[0]["run_id"] for part in found} == {
        json.loads((tmp_path / "wandb.json").read_text())["id"]
    }
    assert [row["_step"] for part in found for row in history(part)] == list(range(1, 31))


def test_heat_maps_come_at_intervals_and_losses_over_tokens(config: Config, tmp_path: Path) -> None:
    log_steps(config, range(3, 40, 3))
    found = records(*segments(tmp_path))
    with_map = [row["_step"] for row in history(found) if "moe/expert_load._type" in row]
    assert with_map == [12, 21, 30]  # the first logged steps from 10, 20 and 30 on
    (first,) = (row for row in history(found) if row["_step"] == 12)
    assert first["moe/expert_load._type"] == "plotly-file"
    drawn = json.loads((segments(tmp_path)[0] / "files" / first["moe/expert_load.path"]).read_text())
    assert drawn["data"][0]["z"] == [[0.5, 1.5]] * 3
    assert drawn["data"][0]["y"] == [1, 2, 3]
    defined = of_type(found, "metric")
    by_tokens = {metric["glob_name"] for metric in defined if metric.get("step_metric") == "consumed_tokens"}
    assert by_tokens == {"train/*", "valid/*", "test/*"}
    assert first["consumed_tokens"] == 84


def test_the_heat_map_of_a_large_model_is_small() -> None:
    load = [[round(random.random() * 2, 4) for _ in range(160)] for _ in range(60)]
    assert len(heat_map(load, 1, "expert").to_json()) < 100_000


@pytest.mark.parametrize(("largest", "end"), [(1.5, 2.0), (6.0, 6.0)])
def test_a_heat_map_has_the_colors_of_the_report(largest: float, end: float) -> None:
    load = [[0.5, largest, math.nan]] * 3
    cells = heat_map(load, 1, "expert").data[0]
    assert (cells.zmin, cells.zmax) == (0, end)
    assert [place for place, _ in cells.colorscale] == [0, 1 / end, 1]
    script = (ROOT / "megatron_moe" / "report" / "page.js").read_text()
    assert f'LOW = "{cells.colorscale[0][1]}", HIGH = "{cells.colorscale[2][1]}"' in script


def test_the_user_is_told_of_skipped_steps_stalls_and_preemption(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "LOOK_S", 0.05)
    shares = [0.9, 0.8, 0.1, 0.7, 0.6, 0.4]  # the last is seen first
    monkeypatch.setattr(watchdog, "share_of_timeout", lambda: shares.pop() if len(shares) > 1 else shares[0])
    run = WandbRun(config, logged_step=0)
    run.alert("step skipped", "loss is nan")
    while len(shares) > 1:
        time.sleep(0.05)
    run.finish(Preempted(7))
    found = records(*segments(tmp_path))
    titles = [alert["title"] for alert in of_type(found, "alert")]
    assert sorted(titles) == ["preempted", "stalled", "stalled", "step skipped"]
    assert titles[-1] == "preempted"
    assert "step 7" in of_type(found, "alert")[-1]["text"]
    assert of_type(found, "exit") == [{"exit_code": 1}]


def failing(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **environment: str
) -> str:
    """What is said on standard error by a run that wandb cannot serve as it was asked to."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    log_steps(config, range(1, 30))
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err
    assert not [
        path for path in Path(config.run.dir).rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ]
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("warning: wandb: ")
    return printed.err


@pytest.mark.parametrize(
    ("key", "reason"), [(KEY, "connection refused"), ("short", "API key must have 40+ characters")]
)
def test_without_network_or_with_a_wrong_key_the_run_is_offline(
    key: str, reason: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 1.0)
    nobody = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    assert reason in failing(config, monkeypatch, capsys, WANDB_API_KEY=key, **nobody)
    assert [row["_step"] for row in history(records(*segments(tmp_path)))] == list(range(1, 30))


def test_without_a_folder_to_write_to_nothing_is_sent(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "wandb.json").mkdir()
    assert "Is a directory" in failing(config, monkeypatch, capsys)
    assert not (tmp_path / "wandb").exists()


def test_wandb_that_is_killed_is_told_once(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = WandbRun(config, logged_step=0)
    run.log(1, {"train/lm_loss": 1.0})
    deadline = time.monotonic() + 30
    while "wandb: " not in capsys.readouterr().out:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    wandb_run._kill_service()
    time.sleep(0.2)
    for step in range(2, 10):
        run.log(step, {"train/lm_loss": 1.0})
    run.finish(None)
    assert capsys.readouterr().err.count("warning: wandb: ") == 1


def test_wandb_that_hangs_ends_nobodys_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes no call any more and is still in the first when the run is over."""
    monkeypatch.setattr(wandb_run, "FINISH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(wandb_run, "KILL_S", 0.3)
    monkeypatch.setattr(wandb_run, "MOST_WAITING", 100)
    hang = threading.Event()
    monkeypatch.setattr(wandb_run, "init", lambda *args: hang.wait())
    run = WandbRun(config, logged_step=0)
    start = time.monotonic()
    for step in range(1, 1000):
        run.log(step, {"train/lm_loss": 1.0})
    run.finish(None)
    assert time.monotonic() - start < 5
    assert run._calls.qsize() <= 102
    assert capsys.readouterr().err.startswith("warning: wandb: does not answer; training and metrics.jsonl go on")
    hang.set()
    run._thread.join(10)
