"""What a run may change when it goes on, and what it takes over of its state."""

import dataclasses
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.checkpoint.compatibility import changed_options, check_same_run, check_same_schedule, check_start
from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.checkpoint.state import TrainState
from megatron_moe.config.errors import ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.saving import small_run
from tests.helpers.training import tiny_config

MILESTONES = ["scheduler.milestones=[0.5]", "train.train_steps=20"]
CONSTANT = ["scheduler.milestones=[]"]
ALLOWED = "checkpoint.allow_schedule_change=true"


def lines_of(saved: list[str], now: list[str]) -> list[str]:
    """Of the error, where a run with some options goes on with others."""
    try:
        check_same_schedule(plain(tiny_config(*saved)), tiny_config(*now))
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("saved", "now", "option"),
    [
        ([], ["optimizer.lr=2e-3"], "optimizer.lr=0.002"),
        ([], ["scheduler.warmup_steps=5"], "scheduler.warmup_steps=5"),
        (MILESTONES, [*MILESTONES, "scheduler.milestones=[0.5,0.9]"], "scheduler.milestones=[0.5, 0.9]"),
        (MILESTONES, ["scheduler.milestones=[]"], "scheduler.milestones=[]"),
        (MILESTONES, [*MILESTONES, "scheduler.decay_factor=0.1"], "scheduler.decay_factor=0.1"),
        (MILESTONES, [*MILESTONES, "scheduler.unit=tokens"], "scheduler.unit=tokens"),
        (MILESTONES, [*MILESTONES, "train.train_steps=40"], "train.train_steps=40"),
    ],
)
def test_another_schedule_needs_leave(saved: list[str], now: list[str], option: str) -> None:
    (line,) = lines_of(saved, now)
    assert line.startswith(f"{option}: ")
    assert "was trained with" in line
    assert line.endswith("another learning-rate schedule; go on with it by checkpoint.allow_schedule_change=true")
    assert lines_of(saved, [*now, ALLOWED]) == []


def test_a_line_for_each_difference() -> None:
    lines = lines_of(MILESTONES, [*MILESTONES, "optimizer.lr=2e-3", "scheduler.warmup_steps=5", "train.train_steps=40"])
    assert [line.split("=")[0] for line in lines] == ["scheduler.warmup_steps", "optimizer.lr", "train.train_steps"]


@pytest.mark.parametrize(
    "now",
    [
        [*CONSTANT, "train.train_steps=40"],
        [*CONSTANT, "optimizer.clip_grad=0.5", "optimizer.weight_decay=0.2", "optimizer.adam_beta2=0.9"],
        [*CONSTANT, "train.micro_batch_size=1", "evaluation.interval=7", "checkpoint.keep_last=5", "run.name=other"],
    ],
)
def test_other_options_are_no_schedule(now: list[str]) -> None:
    assert lines_of(CONSTANT, now) == []


def test_leave_for_a_schedule_is_none_for_other_data() -> None:
    with pytest.raises(ConfigError, match=r"data\.seed=7: .* was trained with"):
        check_same_run(plain(tiny_config()), tiny_config("data.seed=7", ALLOWED))


def go_on(folder: str, *overrides: str) -> tuple[int, list[str]]:
    with small_run("single", folder, *overrides) as (run, step):
        if run.state.step == 0:
            step()
            run.checkpointer.save(run.state)
        return run.state.step, run.notes


def test_a_changed_schedule_is_told(tmp_path: Path) -> None:
    run_ranks(go_on, 1, str(tmp_path))
    with pytest.raises(AssertionError, match=r"optimizer\.lr=0\.002: .*was trained with 0\.001"):
        run_ranks(go_on, 1, str(tmp_path), "optimizer.lr=2e-3")
    ((step, notes),) = run_ranks(go_on, 1, str(tmp_path), "optimizer.lr=2e-3", ALLOWED)
    assert step == 1
    assert "changed since the checkpoint: optimizer.lr: 0.001 -> 0.002" in notes
    assert changed_options(plain(tiny_config()), tiny_config()) == []


# --- The state


@given(
    losses=st.lists(st.floats(), max_size=130),
    counts=st.tuples(*[st.integers(0, 2**62)] * 4),
)
def test_a_state_survives_bit_for_bit(losses: list[float], counts: tuple[int, ...]) -> None:
    step, samples, skipped, in_a_row = counts
    state = TrainState(step, samples, skipped, in_a_row, losses)
    found = TrainState.read(json.loads(json.dumps(dataclasses.asdict(state), indent=1)), Path("state.json"))
    assert dataclasses.replace(found, recent_losses=[]) == dataclasses.replace(state, recent_losses=[])
    assert list(map(bits, found.recent_losses)) == list(map(bits, losses))


def bits(number: float) -> bytes:
    return b"nan" if math.isnan(number) else struct.pack("d", number)


LOSSES = [0.1 + 0.2, 1 / 3, float(np.float32(2.7182817)), 5e-324, 1e300]


def save_state(folder: str) -> TrainState:
    with small_run("single", folder) as (run, step):
        step()
        run.state.recent_losses.extend(LOSSES)
        run.state.skipped_steps, run.state.skipped_in_a_row = 1, 1
        run.checkpointer.save(run.state)
        return run.state


def load_state(folder: str) -> TrainState:
    with small_run("single", folder) as (run, _):
        return run.state


def test_a_run_takes_over_its_state(tmp_path: Path) -> None:
    saved, loaded = run_ranks(save_state, 1, str(tmp_path))[0], run_ranks(load_state, 1, str(tmp_path))[0]
    assert saved.recent_losses[1:] == LOSSES
    assert loaded == saved


# --- Random numbers


def save_random(layout: str, folder: str) -> list[int]:
    with small_run(layout, folder) as (run, step):
        step()
        torch.manual_seed(1000 + torch.distributed.get_rank())
        run.checkpointer.save(run.state)
        return torch.randint(10**9, (4,)).tolist()


def load_random(layout: str, folder: str) -> tuple[int, list[int]]:
    """The step, and numbers drawn after loading."""
    with small_run(layout, folder) as (run, _):
        torch.manual_seed(7)
        step = run.checkpointer.load_latest()[0].step
        return step, torch.randint(10**9, (4,)).tolist()


def test_random_numbers_go_on_where_there_are_as_many_ranks(tmp_path: Path) -> None:
    saved = run_ranks(save_random, 2, "ep2", str(tmp_path))
    assert saved[0] != saved[1]
    assert run_ranks(load_random, 2, "ep2", str(tmp_path)) == [(1, numbers) for numbers in saved]
    assert run_ranks(load_random, 2, "dp2", str(tmp_path)) == [(1, numbers) for numbers in saved]
    torch.manual_seed(7)
    assert run_ranks(load_random, 1, "single", str(tmp_path)) == [(1, torch.randint(10**9, (4,)).tolist())]


def test_a_dry_run_refuses_what_a_start_would(tmp_path: Path) -> None:
    config = tiny_config(f"run.dir={tmp_path}")
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"config": plain(config)}))
    check_start(config)
    for options, problem in (
        ([f"run.dir={tmp_path}", "model.hidden_size=128"], "model.hidden_size=128: .* was trained with 64"),
        ([f"run.dir={tmp_path}", "optimizer.lr=0.5"], "optimizer.lr=0.5: .* another learning-rate schedule"),
        (["run.dir=new", f"checkpoint.init_from={tmp_path}", "model.hidden_size=128"], "hidden_size=128: .* has 64"),
    ):
        with pytest.raises(ConfigError, match=problem):
            check_start(tiny_config(*options))
