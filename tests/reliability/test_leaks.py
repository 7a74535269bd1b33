"""A long run holds no more memory, files and threads at its end than after its warm-up."""

import ctypes
import gc
import itertools
import statistics
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import train_and_digest

STEPS = 2000
EVERY = 20  # steps between two looks
WARM_UP = 500  # steps
MIB = 2**20
SMALL = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=32",
    "model.num_attention_heads=2",
    "model.vocab_size=64",
    "model.num_experts=4",
    "model.expert_ffn_hidden_size=16",
    "data.sequence_length=8",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "logger.log_interval=1",
    "evaluation.num_samples=4",
]
Look = tuple[int, int, int, int]  # step, bytes of memory, open files, threads


def looks_of_a_run(overrides: list[str], leak_per_step: int) -> list[Look]:
    """On a rank: train, and look at the process every EVERY steps.

    Args:
        overrides: of the run.
        leak_per_step: bytes to lose on purpose.
    """
    from megatron_moe.metrics.logger import MetricLogger

    process, log, looks, leaked = psutil.Process(), MetricLogger.log, [], []

    def look_and_log(self: MetricLogger, step: int, metrics: dict) -> None:
        log(self, step, metrics)
        leaked.append(np.ones(leak_per_step, dtype=np.uint8))
        if step % EVERY == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what is free but kept by malloc is no leak
            looks.append((step, process.memory_info().rss, process.num_fds(), process.num_threads()))

    MetricLogger.log = look_and_log
    train_and_digest(overrides)
    return looks


def growth_per_100_steps(looks: list[Look]) -> float:
    """Bytes, by the median of the slopes between any two looks (Theil, Sen), which single jumps do not move."""
    pairs = itertools.combinations([look[:2] for look in looks], 2)
    return 100 * statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.ranks.TIMEOUT_S", 900.0)


def settled(overrides: list[str], steps: int, leak_per_step: int = 0) -> list[Look]:
    """The looks of a run after its warm-up."""
    looks = run_ranks(looks_of_a_run, 1, [*SMALL, f"train.train_steps={steps}", *overrides], leak_per_step)[0]
    assert [look[0] for look in looks] == list(range(EVERY, steps + 1, EVERY))
    return [look for look in looks if look[0] > WARM_UP]


@pytest.mark.soak("memory, files and threads")
@pytest.mark.parametrize("save", ["sync", "async"])
def test_2000_steps_hold_on_to_nothing(save: str, patient: None, tmp_path: Path, record_property) -> None:
    often = ["evaluation.interval=100", "checkpoint.save_interval=50"]
    saving = f"checkpoint.async_save={str(save == 'async').lower()}"
    looks = settled([f"run.dir={tmp_path}", *often, saving], STEPS)
    assert growth_per_100_steps(looks) < MIB
    quarter = len(looks) // 4
    for kind, i in (("open files", 2), ("threads", 3)):
        before, after = (statistics.median(look[i] for look in part) for part in (looks[:quarter], looks[-quarter:]))
        assert after <= before, f"{kind}: {before} at first, {after} at last"
    record_property("steps", STEPS)


@pytest.mark.soak("memory, files and threads")
def test_a_leak_of_15_kb_a_step_is_found(patient: None, tmp_path: Path) -> None:
    """What is asserted above can fail."""
    looks = settled([f"run.dir={tmp_path}", "evaluation.interval=700"], 700, leak_per_step=15_000)
    assert growth_per_100_steps(looks) > MIB
