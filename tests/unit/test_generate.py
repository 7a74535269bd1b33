"""The choice of the next token."""

import pytest
import torch

from megatron_moe.train.generate import next_token

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def shares(temperature: float, top_p: float) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    draws = [next_token(LOGITS, temperature=temperature, top_p=top_p, generator=generator) for _ in range(4000)]
    return torch.tensor(draws).bincount(minlength=4).div(4000).tolist()


def test_temperature_zero_takes_the_likeliest() -> None:
    assert shares(0.0, 1.0) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.75, [0.625, 0.375, 0, 0]),  # the two likeliest are the fewest that make up 0.75
        (1.0, 0.01, [1, 0, 0, 0]),
        (0.5, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ],
)
def test_samples_follow_the_distribution(temperature: float, top_p: float, expected: list[float]) -> None:
    assert shares(temperature, top_p) == pytest.approx(expected, abs=0.03)
    assert [share == 0 for share in shares(temperature, top_p)] == [share == 0 for share in expected]
