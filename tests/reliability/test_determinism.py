"""The same command gives the same bytes again, in every layout."""

from pathlib import Path

import pytest

from tests.helpers.runs import LAYOUTS, assert_same_digests, train_run

STEPS = ["train.train_steps=5", "evaluation.interval=2", "evaluation.num_samples=8"]


def check(layout: str, dtype: str, folder: Path) -> None:
    options = [*STEPS, f"precision={dtype}"]
    first, second = (train_run(folder / name, layout, *options) for name in ("first", "second"))
    assert len(first.metrics) == 5
    assert second.metrics == first.metrics
    assert second.samples == first.samples
    assert_same_digests(second.digests, first.digests)


def test_two_runs_are_equal(tmp_path: Path) -> None:
    check("ep2", "fp32", tmp_path)


@pytest.mark.soak("two runs are equal")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_runs_are_equal_in_every_layout(layout: str, dtype: str, tmp_path: Path, record_property) -> None:
    check(layout, dtype, tmp_path)
    record_property("runs", 2)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    """Digests that never differ would prove nothing."""
    ours, other = (
        train_run(tmp_path / seed, "single", "train.train_steps=1", f"train.seed={seed}") for seed in ("1", "2")
    )
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same_digests(ours.digests, other.digests)
    assert ours.metrics != other.metrics
