"""Times of saves, on a clock that the test sets."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_moe.checkpoint.checkpointer import SaveError
from megatron_moe.checkpoint.state import TrainState
from megatron_moe.train.saving import Saving


class Checkpointer:
    """Takes 1 s to begin, 2 s to copy and 4 s to finish what is in the background."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self.clock = clock
        self.is_saving = False
        self.fails = False

    def begin(self, state: TrainState, *, background: bool) -> None:
        self.clock.now += 1 if background else 10
        self.folder = Path(f"step_{state.step:08}")
        self.is_saving = True

    def wait_until_copied(self) -> None:
        self.clock.now += 2

    def finish(self) -> Path:
        self.clock.now += 4
        self.is_saving = False
        if self.fails:
            raise SaveError("disk full")
        return self.folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("megatron_moe.train.saving.time.perf_counter", lambda: clock.now)
    return clock


def saving(clock: SimpleNamespace, said: list[str], *, in_background: bool) -> Saving:
    return Saving(Checkpointer(clock), in_background=in_background, say=said.append, saved_step=0)


def test_training_waits_for_all_of_a_save_in_the_foreground(clock: SimpleNamespace) -> None:
    saves = saving(clock, said := [], in_background=False)
    assert saves.take_times() == {}
    saves.save(TrainState(step=5))
    assert saves.take_times() == {"checkpoint/save_s": 14.0, "checkpoint/blocked_s": 14.0}
    assert saves.take_times() == {}
    assert said == ["step 5 | saved step_00000005, training waited 14.0 s"]


def test_training_waits_for_the_beginning_the_copy_and_the_end_of_one_in_the_background(clock: SimpleNamespace) -> None:
    saves = saving(clock, said := [], in_background=True)
    saves.save(TrainState(step=5))
    clock.now += 100  # steps
    saves.wait_until_copied()
    clock.now += 1000
    assert saves.take_times() == {}
    saves.finish()
    assert saves.take_times() == {"checkpoint/save_s": 1107.0, "checkpoint/blocked_s": 7.0}
    assert said == ["step 5 | saved step_00000005, training waited 7.0 s"]


def test_a_save_that_fails_has_no_times(clock: SimpleNamespace) -> None:
    saves = saving(clock, said := [], in_background=False)
    saves._checkpointer.fails = True
    saves.save(TrainState(step=5))
    assert saves.take_times() == {}
    assert said[0].startswith("not saved: disk full")
