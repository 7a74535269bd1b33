"""Times of a step: the closed form against the simulation, and what each input does."""

import pytest

from megatron_moe.config.cluster import PlanConfig
from megatron_moe.config.load import compose_plan
from megatron_moe.plan.estimate import checked, estimate
from megatron_moe.plan.step_time import OPTIMIZER_BYTES, StepModel


def plan_of(*options: str) -> PlanConfig:
    return checked(compose_plan(["precision=bf16", *options]))


@pytest.mark.parametrize(
    ("options", "num_gpus"),
    [
        (["experiment=deepseekmoe_145b"], 512),
        (["experiment=deepseekmoe_145b", "parallel=pp8_ep4"], 512),
        (["experiment=deepseekmoe_145b", "parallel=pp8_ep4", "parallel.virtual_pipeline_model_parallel_size=2"], 512),
        (["experiment=deepseekmoe_145b", "cluster.inter_node_bandwidth=5e9"], 512),
        (["experiment=deepseekmoe_16b"], 64),
        (["experiment=deepseek_v2_lite"], 64),
        (["experiment=deepseekmoe_2b"], 1),
    ],
)
def test_closed_form_is_near_the_simulation(options: list[str], num_gpus: int) -> None:
    times = StepModel(plan_of(*options), num_gpus)
    simulated = max(slots[-1].stop for slots in times.timeline())
    assert times.pipeline_s() == pytest.approx(simulated, rel=0.01)


def test_a_step_by_hand() -> None:
    """One GPU: 3 x forward FLOPs of all tokens over the reached peak, and the optimizer's bytes."""
    from megatron_moe.plan.flops import model_flops_per_token
    from megatron_moe.plan.params import total_params

    config = plan_of("experiment=deepseekmoe_2b")
    plan, cluster = estimate(config), config.cluster
    flops = 2048 * 2048 * model_flops_per_token(config.model, 2048)
    assert plan.step.pipeline == pytest.approx(flops / (989e12 * cluster.compute_efficiency))
    assert plan.step.data_parallel == 0
    written = OPTIMIZER_BYTES * total_params(config.model)
    assert plan.step.optimizer == pytest.approx(written / (3.35e12 * cluster.memory_efficiency))
    assert plan.mfu == pytest.approx(flops / plan.step.total / 989e12)
    assert plan.gpu_hours == pytest.approx(25_000 * plan.step.total / 3600)
    assert plan.days == pytest.approx(plan.gpu_hours / 24)


MOE = ["experiment=deepseekmoe_145b", "cluster.num_gpus=512"]


def test_what_is_overlapped_takes_no_time() -> None:
    plain, hidden = estimate(plan_of(*MOE)), estimate(plan_of(*MOE, "cluster.all_to_all_overlap=1"))
    assert hidden.busy["all_to_all"] == 0 < plain.busy["all_to_all"]
    assert hidden.step.total < plain.step.total
    assert estimate(plan_of(*MOE, "cluster.data_parallel_overlap=1")).step.data_parallel == 0 < plain.step.data_parallel


def test_the_fullest_rank_holds_up_all() -> None:
    """Twice the mean: twice its all-to-all; routed experts alone compute twice as much."""
    even, uneven = (estimate(plan_of(*MOE, f"cluster.expert_imbalance={load}")) for load in (1, 2))
    assert uneven.busy["all_to_all"] == pytest.approx(2 * even.busy["all_to_all"])
    assert even.busy["compute"] < uneven.busy["compute"] < 2 * even.busy["compute"]
    kept = [uneven.memory[1].activations - even.memory[1].activations, even.memory[1].dispatch]
    layer = 2 * 12 * (4096 + 3 * 1408)  # more bytes a token of a MoE layer: top-12, width 1408
    assert kept[0] == pytest.approx(4 * 15 * 2048 * layer)  # 4 layers, 15 micro batches of 4096 / 2 tokens
    assert uneven.memory[1].dispatch == 2 * kept[1]
    alone = ["experiment=deepseekmoe_16b", "cluster.num_gpus=64"]  # all experts on each rank
    assert estimate(plan_of(*alone, "cluster.expert_imbalance=2")).step == estimate(plan_of(*alone)).step


def test_checkpoints_come_as_often_as_failures_ask() -> None:
    """Young and Daly: the root of twice the seconds of a save times those from failure to failure."""
    plan = estimate(plan_of(*MOE, "cluster.storage_bandwidth=1e9", "cluster.gpu_mtbf_hours=10000"))
    assert plan.checkpoint.size == 14 * 144_612_773_888
    assert plan.checkpoint.seconds == pytest.approx(14 * 144_612_773_888 / 64e9)
    assert plan.checkpoint.interval == pytest.approx((2 * plan.checkpoint.seconds * 10_000 * 3600 / 512) ** 0.5)


def test_slower_links_and_cards_take_longer() -> None:
    speeds = [
        estimate(plan_of(*MOE, f"cluster={name}")).tokens_per_second_per_gpu
        for name in ("a100_80gb", "h800_80gb", "h100_80gb", "h200_141gb", "b200_180gb")
    ]
    assert speeds == sorted(speeds)
    assert speeds[0] < 0.5 * speeds[2] < speeds[1]
