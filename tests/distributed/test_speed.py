"""Times and bytes of a step, counted again by other means."""

import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_run

SLOW = 0.02  # seconds that something is made to take longer
STEPS = 2
HIDDEN, MICRO_BATCHES, MOE_LAYERS = 64, 2, 3


def speed_of_two_steps(overrides: list[str], slow: str) -> dict[str, Any]:
    """On each rank: the metrics of two steps of which a part is slow on rank 1, and selections of the other rank."""
    from megatron_moe.model.router import DeepSeekMoERouter
    from megatron_moe.train import step as step_module
    from megatron_moe.train.speed_metrics import speed_metrics
    from megatron_moe.train.step import train_step

    selected_elsewhere, calls = [], []
    all_to_all, routing, update = dist.all_to_all_single, DeepSeekMoERouter.routing, step_module.clip_and_update

    def slow_if(part: str) -> None:
        if part == slow and dist.get_rank() == 1:
            time.sleep(SLOW)

    def slow_all_to_all(*args: Any, **options: Any) -> Any:
        calls.append(1)
        slow_if("all_to_all")
        return all_to_all(*args, **options)

    def slow_update(*args: Any) -> None:
        slow_if("optimizer")
        update(*args)

    def counting_routing(router: Any, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        probs, routing_map = routing(router, *args, **options)
        own = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
        selected_elsewhere.append((routing_map.sum() - routing_map[:, own].sum()).item())
        return probs, routing_map

    dist.all_to_all_single, step_module.clip_and_update = slow_all_to_all, slow_update
    DeepSeekMoERouter.routing = counting_routing
    with tiny_run(["run.dir=unused", *overrides]) as (run, batches, num_micro_batches):

        def slow_batches() -> Any:
            for batch in batches[0]:
                slow_if("data_wait")
                yield batch

        timed = [run.pipeline.timers.waiting_for(slow_batches(), "data_wait")]
        for _ in range(STEPS):
            selected_elsewhere.clear()
            train_step(run.pipeline, run.optimizer, timed, num_micro_batches)
        timers, own = run.pipeline.timers, {}
        report = timers.report
        timers.report = lambda: own.update(report()) or own
        metrics = speed_metrics(run.config, run.context, timers, tokens_per_second=1000.0, step_time_s=0.1)
    return {"metrics": metrics, "own": own, "selected_elsewhere": sum(selected_elsewhere), "calls": len(calls)}


@pytest.mark.parametrize(
    ("slow", "times_a_step"),
    [("all_to_all", 6 * MOE_LAYERS * MICRO_BATCHES), ("optimizer", 1), ("data_wait", MICRO_BATCHES)],
)
def test_the_time_of_the_slowest_rank_is_told_by_all(slow: str, times_a_step: int) -> None:
    first, second = run_ranks(speed_of_two_steps, 2, ["parallel=ep2"], slow)
    assert first["metrics"] == second["metrics"]
    times = {name: value for name, value in first["metrics"].items() if name.startswith("time/")}
    own = [first["own"], second["own"]]
    assert times == {
        "time/forward_backward_s": max(rank["forward_backward"] - rank["data_wait"] for rank in own),
        "time/all_to_all_s": max(rank["all_to_all"] for rank in own),
        "time/optimizer_s": max(rank["optimizer"] for rank in own),
        "time/data_wait_s": max(rank["data_wait"] for rank in own),
    }
    assert second["own"][slow] >= times_a_step * SLOW
    if slow == "all_to_all":  # tokens and probabilities there, tokens back, and as much in the backward pass
        assert first["calls"] == STEPS * times_a_step
        assert times["time/forward_backward_s"] >= times["time/all_to_all_s"]


def test_what_the_all_to_all_sends_is_what_the_selections_of_other_ranks_take() -> None:
    ranks = run_ranks(speed_of_two_steps, 2, ["parallel=ep2"], "nothing")
    selections = sum(rank["selected_elsewhere"] for rank in ranks)
    tokens_and_probabilities = 4 * HIDDEN + 4
    expected = selections * (2 * tokens_and_probabilities + 2 * 4 * HIDDEN)  # dispatch and combine, there and back
    assert ranks[0]["metrics"]["moe/all_to_all_gib"] * 2**30 == expected
    assert selections > 0


def test_rates_of_a_rank_follow_from_those_of_all() -> None:
    (alone,) = run_ranks(speed_of_two_steps, 1, ["parallel=single"], "nothing")
    assert alone["metrics"]["moe/all_to_all_gib"] == 0
    assert alone["metrics"]["time/all_to_all_s"] == 0
    two = run_ranks(speed_of_two_steps, 2, ["parallel=dp2"], "nothing")[0]["metrics"]
    assert two["speed/tokens_per_second_per_gpu"] == 500
    assert two["speed/tflops_per_gpu"] == pytest.approx(alone["metrics"]["speed/tflops_per_gpu"] / 2)
    assert "speed/mfu" not in two


def utilization(precision: str) -> dict[str, Any]:
    """On a rank whose device passes for one of a known peak: the metrics of a step."""
    from megatron_moe.train import speed_metrics
    from megatron_moe.train.step import train_step

    device, name = torch.device("cuda"), "NVIDIA H100 80GB HBM3"
    with tiny_run(["run.dir=unused", f"precision={precision}"]) as (run, batches, num_micro_batches):
        train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
        with mock.patch.object(torch.cuda, "get_device_name", return_value=name):
            peak = speed_metrics.device_peak_flops(run.config, device)
        with mock.patch.object(speed_metrics, "device_peak_flops", return_value=peak):
            rates = {"tokens_per_second": 1000.0, "step_time_s": 0.1}
            return speed_metrics.speed_metrics(run.config, run.context, run.pipeline.timers, **rates)


def test_mfu_is_of_the_peak_in_bf16_and_none_in_fp32() -> None:
    (in_bf16,) = run_ranks(utilization, 1, "bf16")
    assert in_bf16["speed/mfu"] == pytest.approx(in_bf16["speed/tflops_per_gpu"] / 989)
    (in_fp32,) = run_ranks(utilization, 1, "fp32")
    assert "speed/mfu" not in in_fp32


def peaks(gib: float) -> tuple[float, float]:
    """On each rank, of which the second takes some memory and gives it back: its own peak, and the one that is told."""
    from megatron_moe.train.step import train_step
    from megatron_moe.train.step_metrics import peak_memory_gib, step_metrics

    with tiny_run(["run.dir=unused", "parallel=dp2"]) as (run, batches, num_micro_batches):
        if run.context.rank == 1:
            torch.ones(int(gib * 2**28))  # fp32
        result = train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
        own = peak_memory_gib(run.context.device)
        return own, step_metrics(run.config, run.context, run.pipeline.model, result)["memory/peak_gib"]


def test_the_largest_peak_of_all_ranks_is_told() -> None:
    (first, told), (second, told_too) = run_ranks(peaks, 2, 0.5)
    assert second > first + 0.4
    assert told == told_too == pytest.approx(second, abs=0.05)
