"""Which steps update nothing, from their numbers alone."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.checkpoint.state import TrainState
from megatron_moe.config.errors import TrainingError
from megatron_moe.config.load import compose_config
from megatron_moe.config.schema import TrainConfig
from megatron_moe.train.guard import Guard


@functools.cache
def options(*overrides: str) -> TrainConfig:
    return compose_config([f"train.{override}" for override in overrides]).train


def guard(*overrides: str, state: TrainState | None = None) -> Guard:
    return Guard(options(*overrides), state or TrainState())


def judge(guard: Guard, *losses: float) -> list[str | None]:
    """What comes of steps with these losses and a clean gradient."""
    verdicts = []
    for loss in losses:
        verdicts.append(guard.judge(loss, 1.0, finite=math.isfinite(loss)))
        guard.state.advance(1)
    return verdicts


def window(mean: float = 3.0, deviation: float = 0.1, size: int = 128) -> list[float]:
    return [mean + deviation, mean - deviation] * (size // 2)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (math.nan, 1.0, "loss is nan"),
        (math.inf, math.nan, "loss is inf"),
        (2.0, math.inf, "gradient norm is inf"),
        (2.0, math.nan, "gradient norm is nan"),
        (2.0, 1.0, "gradient is not finite on some rank"),
    ],
)
def test_what_is_not_finite_is_skipped_and_counted(loss: float, grad_norm: float, reason: str) -> None:
    one = guard()
    assert one.judge(loss, grad_norm, finite=False) == reason
    assert (one.state.skipped_steps, one.state.skipped_in_a_row, one.state.recent_losses) == (1, 1, [])
    assert one.judge(2.0, 1.0, finite=True) is None
    assert (one.state.skipped_steps, one.state.skipped_in_a_row, one.state.recent_losses) == (1, 0, [2.0])


def test_a_spike_lies_beyond_six_sigma() -> None:
    one = guard("spike_sigma=6", state=TrainState(recent_losses=window()))
    above, below = judge(one, 3.6001, 3.5999)
    assert above == (
        "loss 3.6001 lies 6.0 standard deviations of 0.1000 above 3.0000, the mean of the last 128 steps "
        "(train.spike_sigma=6)"
    )
    assert below is None


def test_without_sigma_nothing_is_a_spike_and_the_window_is_kept() -> None:
    one = guard("spike_window=4")
    assert judge(one, 3.0, 3.1, 2.9, 3.0, 3.1, 1e9) == [None] * 6
    assert one.state.recent_losses == [2.9, 3.0, 3.1, 1e9]


def test_no_loss_is_a_spike_before_the_window_is_full() -> None:
    one = guard("spike_sigma=6", "spike_window=8")
    assert judge(one, *window(size=6), 1000.0) == [None] * 7
    one = guard("spike_sigma=6", "spike_window=8")
    assert judge(one, *window(size=8), 1000.0)[-1] is not None


def test_a_skipped_loss_does_not_enter_the_window() -> None:
    one = guard("spike_sigma=6", "spike_window=8")
    verdicts = judge(one, *window(size=8), 9.0, math.nan, 9.0, 3.1)
    assert [verdict is None for verdict in verdicts[8:]] == [False, False, False, True]
    assert max(one.state.recent_losses) < 4
    assert len(one.state.recent_losses) == 8


def test_a_fall_of_the_loss_is_no_spike() -> None:
    assert judge(guard("spike_sigma=6", state=TrainState(recent_losses=window())), -50.0) == [None]


@pytest.mark.parametrize("loss", [0.0, 1 / 3, 5.6424646])
def test_what_sums_in_another_order_differ_by_is_no_spike(loss: float) -> None:
    one = guard("spike_sigma=6", "spike_window=3")
    assert judge(one, *[loss] * 9, loss + 5e-6) == [None] * 10
    assert judge(one, loss + 0.1)[0] is not None


def test_the_window_survives_a_restart() -> None:
    losses = [*window(), 3.05, 9.0, 3.0, 3.1, math.nan, 8.0, 2.9]
    whole = guard("spike_sigma=6")
    expected = judge(whole, *losses)
    assert sum(verdict is not None for verdict in expected) == 3
    for cut in range(len(losses)):
        before = guard("spike_sigma=6")
        verdicts = judge(before, *losses[:cut])
        saved = json.loads(json.dumps(dataclasses.asdict(before.state)))
        after = guard("spike_sigma=6", state=TrainState(**saved))
        assert verdicts + judge(after, *losses[cut:]) == expected
        assert after.state == whole.state


def test_a_run_that_goes_on_with_another_window_fits_it() -> None:
    state = TrainState(recent_losses=window(size=128))
    shorter = guard("spike_sigma=6", "spike_window=16", state=state)
    assert judge(shorter, 9.0)[0] is not None
    assert judge(shorter, 3.0) == [None]
    assert len(state.recent_losses) == 16
    assert judge(guard("spike_sigma=6", "spike_window=32", state=state), 9.0) == [None]


def test_too_many_in_a_row_end_the_training() -> None:
    one = guard("max_skipped_steps=3", state=TrainState(step=40))
    judge(one, math.nan, math.nan, 2.0, math.nan, math.inf)
    with pytest.raises(TrainingError) as error:
        one.judge(2.0, math.inf, finite=False)
    text = str(error.value)
    assert "too many steps were skipped: 3 in a row, since step 44 (train.max_skipped_steps=3)" in text
    assert "in step 46 the gradient norm is inf" in text
    assert "checkpoint stands" in text
    assert "lower optimizer.lr" in text
    assert one.state.skipped_steps == 5


def test_one_may_be_too_many() -> None:
    with pytest.raises(TrainingError, match=r"1 in a row, since step 1 .*in step 1 the loss is nan"):
        judge(guard("max_skipped_steps=1"), math.nan)


def test_the_row_goes_on_after_a_restart() -> None:
    one = guard("max_skipped_steps=3", state=TrainState(skipped_steps=2, skipped_in_a_row=2))
    with pytest.raises(TrainingError):
        judge(one, math.nan)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    mean=st.floats(0.1, 12),
    deviation=st.floats(1e-7, 1),
    noise=st.sampled_from(["normal", "uniform", "triangular", "rademacher"]),
    drift=st.floats(-1e-2, 0),
)
def test_a_thousand_clean_steps_skip_nothing(
    seed: int, mean: float, deviation: float, noise: str, drift: float
) -> None:
    random = np.random.default_rng(seed)
    draws = {
        "normal": random.standard_normal(1000),
        "uniform": random.uniform(-1.7, 1.7, 1000),
        "triangular": random.triangular(-2.4, 0, 2.4, 1000),
        "rademacher": random.integers(0, 2, 1000) * 2.0 - 1,
    }
    losses = mean + drift * np.arange(1000) + deviation * draws[noise]
    one = guard("spike_sigma=6")
    assert judge(one, *losses.tolist()) == [None] * 1000
    assert judge(one, mean + 40 * max(deviation, 1e-5))[0] is not None
