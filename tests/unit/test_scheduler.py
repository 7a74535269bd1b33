"""The learning rate against the paper's closed form."""

import bisect

import pytest

from megatron_moe.config.derived import samples_before
from megatron_moe.config.load import compose_config
from megatron_moe.config.schema import Config
from megatron_moe.optim.scheduler import learning_rate


@pytest.mark.parametrize("unit", ["steps", "tokens"])
@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1_000, 4.2e-4 / 2),
        (2_000, 4.2e-4),
        (85_158, 4.2e-4),
        (85_159 + 1, 4.2e-4 * 0.316),
        (95_804 + 1, 4.2e-4 * 0.316**2),
        (106_449, 4.2e-4 * 0.316**2),
    ],
)
def test_16b(step: int, expected: float, unit: str) -> None:
    """arXiv:2401.06066, 5.1.2: 2,000 warm-up steps, x 0.316 at 80 % and at 90 % of 106,449 steps."""
    config = compose_config(["experiment=deepseekmoe_16b", f"scheduler.unit={unit}"])
    assert learning_rate(config, step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(85_159, 4.2e-4 * 0.316), (95_804, 4.2e-4 * 0.316**2)])
def test_16b_milestones_in_steps_round_down(step: int, expected: float) -> None:
    config = compose_config(["experiment=deepseekmoe_16b"])
    assert learning_rate(config, step) == pytest.approx(expected, rel=1e-12)


def test_constant() -> None:
    config = compose_config(["scheduler=constant", "optimizer.lr=3e-4", "train.train_steps=13000"])
    assert learning_rate(config, 1_999) < 3e-4
    assert {learning_rate(config, step) for step in range(2_000, 13_000)} == {3e-4}


def test_factors_and_milestones_are_options() -> None:
    config = compose_config(
        ["scheduler.milestones=[0.7]", "scheduler.decay_factor=0.5", "scheduler.warmup_steps=0", "train.train_steps=10"]
    )
    rates = [learning_rate(config, step) / config.optimizer.lr for step in range(10)]
    assert rates == [1.0] * 7 + [0.5] * 3


def test_deepseek_v2_decays_by_tokens() -> None:
    """arXiv:2405.04434, 3.1.2: x 0.316 after about 60 % and 90 % of 8.1T tokens, of which 225B in smaller batches."""
    config = compose_config(["experiment=deepseek_v2"])
    for milestone, factor in ((0.6, 0.316), (0.9, 0.316**2)):
        steps = range(config.train.train_steps)
        step = bisect.bisect_left(steps, milestone * 8.1e12, key=lambda step: tokens(config, step))
        assert learning_rate(config, step - 2) == pytest.approx(2.4e-4 * factor / 0.316)
        assert learning_rate(config, step + 2) == pytest.approx(2.4e-4 * factor)
    assert tokens(config, config.train.train_steps) == pytest.approx(8.1e12, rel=1e-5)


def tokens(config: Config, step: int) -> int:
    return samples_before(config, step) * config.data.sequence_length
