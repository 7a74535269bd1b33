"""A run that was cut off and went on in new processes is the run that was not: the same bytes."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.runs import LAYOUTS, Outcome, assert_same_digests, train_run, write_blend

HALF = 3  # steps
CUT_AT = HALF + 2  # what came after the save is lost, and done again
STEPS = [f"train.train_steps={2 * HALF}", "evaluation.num_samples=8"]
RAMP = ["train.batch_ramp.start=4", "train.batch_ramp.increment=4", "train.batch_ramp.tokens=500"]
SAVES = {"sync": "checkpoint.async_save=false", "async": "checkpoint.async_save=true"}
EVERY_RUN = [("pp2_ep2", "async", "bf16"), ("single", "sync", "fp32")]
ALL = [(layout, save, dtype) for layout in LAYOUTS for save in SAVES for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_blend(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: list[str], tmp_path_factory: pytest.TempPathFactory):
    """Runs that nothing happened to, by layout and type; the two ways to save are compared with the same one."""
    found: dict[tuple[str, ...], Outcome] = {}

    def get(layout: str, dtype: str) -> Outcome:
        if (layout, dtype) not in found:
            folder = tmp_path_factory.mktemp("whole")
            found[layout, dtype] = train_run(folder, layout, *data, *STEPS, f"precision={dtype}")
        return found[layout, dtype]

    return get


def cut_and_resumed(folder: Path, layout: str, *options: str, then: tuple[str, ...] = ()) -> tuple[Outcome, int]:
    """A run that saves after HALF steps, goes on, is lost, and starts again from there; and what it had to do again."""
    first = train_run(folder, layout, *options, f"checkpoint.save_interval={HALF}", f"train.exit_step={CUT_AT}")
    shutil.rmtree(folder / "checkpoints" / f"step_{CUT_AT:08}")
    second = train_run(folder, layout, *options, *then)
    consumed = second.metrics[HALF]["consumed_tokens"] // 32
    kept = {rank: [s for s in samples if s[0] < consumed] for rank, samples in first.samples.items()}
    assert all(kept[rank] != first.samples[rank] for rank in kept)
    joined = {rank: kept[rank] + second.samples[rank] for rank in kept}
    return Outcome(second.metrics, joined, second.digests), CUT_AT - HALF


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert sorted(found.metrics) == list(range(1, 2 * HALF + 1))
    for step in expected.metrics:
        common = expected.metrics[step].keys() & found.metrics[step].keys()
        assert common >= {"train/lm_loss", "train/grad_norm", "train/lr", "consumed_tokens"}
        for name in common:
            assert found.metrics[step][name] == expected.metrics[step][name], f"{name} of step {step}"
    assert found.samples == expected.samples
    assert_same_digests(found.digests, expected.digests)


def check(layout: str, save: str, dtype: str, data: list[str], whole, folder: Path, record_property) -> None:
    options = [*data, *STEPS, f"precision={dtype}", SAVES[save]]
    found, repeated = cut_and_resumed(folder, layout, *options)
    assert_same(found, whole(layout, dtype))
    record_property("steps done again", repeated)
    record_property("lost steps", 0)


@pytest.mark.parametrize(("layout", "save", "dtype"), EVERY_RUN)
def test_resumed(layout, save, dtype, data, whole, tmp_path, record_property) -> None:
    check(layout, save, dtype, data, whole, tmp_path, record_property)


@pytest.mark.soak("bitwise resume")
@pytest.mark.parametrize(("layout", "save", "dtype"), [case for case in ALL if case not in EVERY_RUN])
def test_resumed_in_every_way(layout, save, dtype, data, whole, tmp_path, record_property) -> None:
    check(layout, save, dtype, data, whole, tmp_path, record_property)


@pytest.mark.soak("bitwise resume")
@pytest.mark.parametrize("layout", ["single", "pp2_ep2"])
@pytest.mark.parametrize("save", SAVES)
def test_resumed_while_the_batch_grows(layout, save, data, tmp_path, record_property) -> None:
    """And evaluated at other steps than the run it equals, which changes nothing."""
    options = [*data, *STEPS, *RAMP]
    expected = train_run(tmp_path / "whole", layout, *options, "evaluation.interval=100")
    often = ("evaluation.interval=1",)
    found, repeated = cut_and_resumed(tmp_path / "cut", layout, *options, *often, SAVES[save], then=often)
    assert [line["train/batch_size"] for line in expected.metrics.values()] == [4, 4, 4, 4, 8, 8]
    assert_same(found, expected)
    record_property("steps done again", repeated)
    record_property("lost steps", 0)
