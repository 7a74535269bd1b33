"""`pretrain.py` as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.cli import ROOT, metrics_of, processes_mentioning, run_cli, user_environment
from tests.helpers.training import TINY

SHORT = [*TINY, "train.train_steps=4", "logger.log_interval=1", "evaluation.interval=2", "evaluation.num_samples=8"]
FIELDS = {
    "step",
    "consumed_tokens",
    "train/lm_loss",
    "train/expert_balance_loss",
    "train/device_balance_loss",
    "train/grad_norm",
    "train/lr",
    "speed/tokens_per_second",
    "moe/max_violation",
    "moe/expert_load",
    "moe/device_load",
}


def losses(run: Path) -> list[float]:
    return [line["train/lm_loss"] for line in metrics_of(run)]


def test_a_run_leaves_metrics_config_and_checkpoint(tmp_path: Path) -> None:
    result = run_cli("pretrain.py", *SHORT, "run.name=a", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "a"
    logged = metrics_of(run)
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert all(line.keys() >= FIELDS for line in logged)
    assert ["valid/lm_loss" in line for line in logged] == [False, True, False, True]
    assert logged[-1]["consumed_tokens"] == 4 * 8 * 32
    assert len(logged[0]["moe/expert_load"]) == 3
    assert len(logged[0]["moe/expert_load"][0]) == 8
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["num_experts"] == 8
    assert "run.name=a" in json.loads((run / "environment.json").read_text())["overrides"]
    assert (run / "checkpoints" / "step_00000004" / "state.json").is_file()
    assert not list((run / "checkpoints").glob("*.partial"))
    assert "held-out loss" in result.stdout
    assert "unigram entropy" in result.stdout
    for fact in ("parameters", "tokens a step", "expert factor 0.01", "warm-up", "fp32", "dense 0, MoE 1-3", "0-7"):
        assert fact in result.stdout
    assert "Warning" not in result.stderr


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Bitwise on one rank; across layouts the sums differ in their order."""
    for arguments in (
        ["run.name=whole"],
        ["run.name=cut", "train.exit_step=2"],
        ["run.name=cut"],
        ["run.name=moved", "train.exit_step=2", "parallel=pp2_ep2"],
        ["run.name=moved", "parallel=ep2"],
    ):
        result = run_cli("pretrain.py", *SHORT, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    whole, cut, moved = (losses(tmp_path / "runs" / name) for name in ("whole", "cut", "moved"))
    assert cut == whole
    assert moved == pytest.approx(whole, rel=1e-6)
    again = run_cli("pretrain.py", *SHORT, "run.name=cut", cwd=tmp_path)
    assert again.returncode == 0
    assert "finished 4 steps" in again.stdout
    assert losses(tmp_path / "runs" / "cut") == whole


def test_the_batch_grows_and_a_resumed_run_goes_on_growing(tmp_path: Path) -> None:
    ramp = ["train.batch_ramp.start=4", "train.batch_ramp.increment=2", "train.batch_ramp.tokens=600"]
    for arguments in (["run.name=whole"], ["run.name=cut", "train.exit_step=2"], ["run.name=cut", "parallel=dp2"]):
        result = run_cli("pretrain.py", *SHORT, *ramp, "train.micro_batch_size=1", *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    whole, cut = (metrics_of(tmp_path / "runs" / name) for name in ("whole", "cut"))
    # 2 increments over 18.75 sequences: 4 until 9.4, 6 until 18.75, then 8
    assert [line["consumed_tokens"] for line in whole] == [4 * 32, 8 * 32, 12 * 32, 18 * 32]
    assert [line["consumed_tokens"] for line in cut] == [line["consumed_tokens"] for line in whole]
    assert losses(tmp_path / "runs" / "cut") == pytest.approx(losses(tmp_path / "runs" / "whole"), rel=1e-6)


def test_a_run_cannot_change_its_model_on_the_way(tmp_path: Path) -> None:
    run_cli("pretrain.py", *SHORT, "run.name=a", "train.exit_step=1", cwd=tmp_path)
    result = run_cli("pretrain.py", *SHORT, "run.name=a", "model.rotary_base=500", "data.seed=2", cwd=tmp_path)
    assert result.returncode == 2
    assert "model.rotary_base=500: runs/a was trained with 10000" in result.stderr
    assert "data.seed=2: runs/a was trained with 1234" in result.stderr
    assert "Traceback" not in result.stderr
    other_schedule = [*SHORT, "run.name=a", "train.exit_step=2", "optimizer.lr=0.5"]
    result = run_cli("pretrain.py", *other_schedule, cwd=tmp_path)
    assert result.returncode == 2
    assert "optimizer.lr=0.5: runs/a was trained with 0.001, another learning-rate schedule" in result.stderr
    result = run_cli("pretrain.py", *other_schedule, "checkpoint.allow_schedule_change=true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "changed since the checkpoint: optimizer.lr: 0.001 -> 0.5" in result.stdout


def test_torchrun_is_joined(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", str(ROOT / "pretrain.py")]
    result = subprocess.run(
        [*torchrun, *SHORT, "parallel=pp2_ep2", "run.name=t"],
        cwd=tmp_path,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    alone = run_cli("pretrain.py", *SHORT, "parallel=pp2_ep2", "run.name=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert losses(tmp_path / "runs" / "t") == losses(tmp_path / "runs" / "alone")


def test_wandb_without_a_key_is_offline(tmp_path: Path) -> None:
    result = run_cli("pretrain.py", *SHORT, "logger=wandb", "logger.log_interval=1", "run.name=w", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "runs" / "w" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["parallel.expert_model_parallel_size=3"],
        ["model.num_layer=3"],
        ["+model.foo=1"],
        ["data=blend", "data.train=[{path: nowhere}]"],
        ["parallel.pipeline_model_parallel_size=9"],
        ["train.global_batch_size=7"],
        ["model=deepseekmoe_3b"],
        ["~model"],
        ["--config-name=nothing"],
        ["run.dir=/proc/nothing"],
        ["parallel.expert_model_parallel_size=0"],
        ["--resolve"],
        ["--auto-restart"],
        ["--auto-restart", "run.name=a"],
        ["--auto-restart=-1"],
    ],
)
def test_wrong_input_ends_at_once_without_a_traceback(arguments: list[str], tmp_path: Path) -> None:
    result = run_cli("pretrain.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert 1 <= len(result.stderr.strip().splitlines()) <= 5
    assert all(line.startswith("error: ") for line in result.stderr.strip().splitlines())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("more", [[], ["model.num_layer=3"]])
def test_all_that_is_wrong_is_listed_at_once(more: list[str], tmp_path: Path) -> None:
    wrong = ["+model.foo=1", "train.global_batch_size=7", "parallel.expert_model_parallel_size=3", *more]
    result = run_cli("pretrain.py", *wrong, cwd=tmp_path)
    assert result.returncode == 2
    for mistake in wrong:
        assert mistake in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 1), (signal.SIGINT, 130)])
def test_one_worker_killed_or_the_command_interrupted_ends_all(number: int, code: int, tmp_path: Path) -> None:
    mark = f"run.name=killed{number}"
    endless = [*SHORT, "train.train_steps=100000", "evaluation.interval=100000", "parallel=pp2_ep2", mark]
    command = subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain.py"), *endless],
        cwd=tmp_path,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in command.stdout:
        if line.startswith("step"):
            break
    workers = [pid for pid in processes_mentioning(mark) if pid != command.pid]
    assert len(workers) == 4
    os.kill(workers[2] if number == signal.SIGKILL else command.pid, number)
    start = time.monotonic()
    _, errors = command.communicate(timeout=60)
    assert time.monotonic() - start < 30
    assert command.returncode == code
    assert processes_mentioning(mark) == []
    if number == signal.SIGINT:
        assert "interrupted; the same command goes on from the last checkpoint" in errors
    if number == signal.SIGKILL:
        assert "was killed by SIGKILL; all ranks were ended" in errors


def test_evaluation_is_rounded_up_to_what_the_layout_runs_at_once(tmp_path: Path) -> None:
    result = run_cli("pretrain.py", *SHORT, "parallel=pp2_vpp2", "evaluation.num_samples=5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "held-out loss" in result.stdout


def test_a_sweep_needs_a_name_for_each_job(tmp_path: Path) -> None:
    sweep = ["-m", *SHORT, "train.train_steps=2", "train.seed=1,2"]
    result = run_cli("pretrain.py", *sweep, cwd=tmp_path)
    assert result.returncode == 2
    assert "run.name: each job of a sweep needs its own" in result.stderr
    result = run_cli("pretrain.py", *sweep, "run.name=seed${train.seed}", "parallel=dp2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "runs" / "seed1") != losses(tmp_path / "runs" / "seed2")


def test_workers_get_hydras_flags_too(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "two.yaml").write_text("# @package _global_\ntrain:\n  train_steps: 2\n")
    tiny = [option for option in SHORT if not option.startswith("train.train_steps")]
    choice = ["experiment=two", "parallel=ep2", "run.name=flags"]
    result = run_cli("pretrain.py", "--config-dir=mine", *tiny, *choice, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "runs" / "flags")) == 2


def test_cfg_prints_the_resolved_configuration(tmp_path: Path) -> None:
    arguments = ["model=deepseekmoe_16b", "parallel=pp4", "optimizer.lr=3e-4", "--cfg", "job", "--resolve"]
    result = run_cli("pretrain.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    composed = yaml.safe_load(result.stdout)
    assert composed["model"]["hidden_size"] == 2048
    assert composed["parallel"]["pipeline_model_parallel_size"] == 4
    assert composed["optimizer"]["lr"] == 3e-4
    assert composed["run"]["dir"] == "runs/deepseekmoe_16b-pp4"


def test_under_a_launcher_it_is_the_launcher_that_restarts(tmp_path: Path) -> None:
    result = run_cli("pretrain.py", *SHORT, "--auto-restart", "3", cwd=tmp_path, RANK="0", WORLD_SIZE="2")
    assert result.returncode == 2
    assert result.stderr == (
        "error: --auto-restart: this rank was started by a launcher; torchrun has --max-restarts\n"
    )


def test_an_override_arrives_as_it_was_typed_and_nothing_of_it_runs(tmp_path: Path) -> None:
    awkward = "a;touch canary $(touch canary) `touch canary` \"b\" 'c'\n& | > canary"
    quoted = awkward.replace("'", "\\'")
    result = run_cli(
        "pretrain.py",
        *SHORT,
        "parallel=dp2",
        "run.name=x",
        "train.train_steps=1",
        f"data.cache_dir='{quoted}'",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load((tmp_path / "runs" / "x" / "config.yaml").read_text())["data"]["cache_dir"] == awkward
    assert not list(tmp_path.rglob("canary"))
