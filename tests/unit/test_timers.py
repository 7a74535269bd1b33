"""Parts of a step on a clock that the test sets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_moe.metrics.timers import Timers, all_to_all_measured


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("megatron_moe.metrics.timers.time.perf_counter", lambda: clock.now)
    return clock


def test_a_report_is_of_the_mean_step_since_the_last(clock: SimpleNamespace) -> None:
    timers = Timers(torch.device("cpu"))
    for seconds in (1.0, 3.0):
        timers.begin_step()
        with timers.measure("outer"):
            clock.now += 0.5
            with timers.measure("inner"):
                clock.now += seconds
        clock.now += 10  # of no part
    assert timers.report() == {"outer": 2.5, "inner": 2.0}
    timers.begin_step()
    with timers.measure("inner"):
        clock.now += 7
    assert timers.report() == {"inner": 7.0}


def test_waiting_for_an_item_counts_and_what_is_done_with_it_does_not(clock: SimpleNamespace) -> None:
    def slow():
        for item in range(3):
            clock.now += 2
            yield item

    timers = Timers(torch.device("cpu"))
    timers.begin_step()
    items = timers.waiting_for(slow(), "data_wait")
    for expected in range(3):
        assert next(items) == expected
        clock.now += 100
    assert timers.report() == {"data_wait": 6.0}


@pytest.mark.parametrize(
    ("rows_to_ranks", "to_others"),
    [([1, 2, 0, 3], 4), (np.array([1, 2, 0, 3]), 4), ([0, 6, 0, 0], 0), (None, 6)],  # of 6, or 8 for four ranks alike
)
def test_rows_for_other_ranks_count_in_bytes(
    rows_to_ranks: list[int] | None, to_others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(dist, "all_to_all_single", lambda *args, **options: calls.append(options) or "work")
    original = dist.all_to_all_single
    timers = Timers(torch.device("cpu"))
    timers.begin_step()
    x = torch.zeros(8 if rows_to_ranks is None else 6, 5, dtype=torch.bfloat16)
    group = SimpleNamespace(rank=lambda: 1, size=lambda: 4)
    options = {"output_split_sizes": None, "input_split_sizes": rows_to_ranks, "group": group}
    with all_to_all_measured(timers):
        assert dist.all_to_all_single(x, x, **options) == "work"
    assert dist.all_to_all_single is original
    assert calls == [options]
    assert timers.sent_bytes == to_others * 5 * 2
    timers.begin_step()
    assert timers.sent_bytes == 0
