"""Load, speed and the log."""

import json
import math
from pathlib import Path

import pytest
import torch
import wandb

from megatron_moe.config.load import compose_config
from megatron_moe.metrics.logger import MetricLogger, progress_line
from megatron_moe.metrics.routing import device_load, max_violation, relative
from megatron_moe.metrics.throughput import Throughput, format_duration
from megatron_moe.metrics.wandb_run import has_wandb_key


def test_uniform_load_violates_nothing() -> None:
    assert max_violation(torch.full((3, 8), 5.0)).tolist() == [0.0, 0.0, 0.0]


def test_load_of_experts_and_devices() -> None:
    tokens = torch.tensor([[6.0, 0.0, 1.0, 1.0]])
    assert max_violation(tokens).tolist() == [2.0]
    assert device_load(tokens, 2).tolist() == [[6.0, 2.0]]
    assert relative(device_load(tokens, 2)).tolist() == [[1.5, 0.5]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7s"), (249, "4m09s"), (3 * 3600 + 300, "3h05m"), (26 * 3600, "1d02h")]
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_throughput_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("megatron_moe.metrics.throughput.time.perf_counter", lambda: now[0])
    throughput = Throughput()
    for _ in range(4):
        now[0] += 0.5
        throughput.count(100)
    with throughput.paused():
        now[0] += 60
    assert throughput.report() == (200.0, 0.5)


def metrics(**values: float) -> dict[str, float]:
    names = "train/lm_loss train/expert_balance_loss train/device_balance_loss train/grad_norm train/lr"
    names += " speed/tokens_per_second speed/step_time_s moe/max_violation moe/dropped_fraction"
    return dict.fromkeys(names.split(), 2.0) | values


def test_progress_line_says_how_long_is_left() -> None:
    line = progress_line(90, 120, metrics())
    assert line.startswith("step  90/120 | lm_loss 2.0000")
    assert line.endswith("2 tokens/s | 1m00s left")


def test_a_resumed_log_repeats_no_step(tmp_path: Path) -> None:
    config = compose_config([f"run.dir={tmp_path}"])
    for first, last in ((0, 5), (3, 4)):
        with MetricLogger(config, first_step=first) as logger:
            for step in range(first + 1, last + 1):
                logger.log(step, {"train/lm_loss": float(first)})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 5, "tra')  # cut off by a crash
    MetricLogger(config, first_step=4).__exit__(None, None, None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/lm_loss"]) for line in lines] == [(1, 0), (2, 0), (3, 0), (4, 3)]


def test_wandb_key_is_found_in_the_environment_and_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_wandb_key()
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password x\n")
    netrc.chmod(0o600)
    assert has_wandb_key()
    netrc.write_text("machine models.example.org login user password x\n")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://models.example.org")
    wandb.teardown()  # it has read its environment
    assert has_wandb_key()
    wandb.teardown()


def test_what_is_not_finite_is_null_in_the_log_and_readable_in_the_progress(tmp_path: Path) -> None:
    bad = metrics(**{"train/lm_loss": math.nan, "train/grad_norm": math.inf})
    with MetricLogger(compose_config([f"run.dir={tmp_path}"]), first_step=0) as logger:
        logger.log(1, bad | {"moe/expert_load": [[1.0, -math.inf]]})

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["train/lm_loss"], line["train/grad_norm"], line["train/lr"]) == (None, None, 2.0)
    assert line["moe/expert_load"] == [[1.0, None]]
    assert "lm_loss nan" in progress_line(1, 2, bad)
    assert "grad norm inf" in progress_line(1, 2, bad)
