"""Traffic inside and between nodes against megatron-core's own groups, rank by rank."""

import itertools

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_moe.config.load import compose_plan
from megatron_moe.plan.pipeline import Layers
from megatron_moe.plan.traffic import Group, Traffic, groups_of, pass_traffic, seconds, stage_to_stage

ON_NODE, WORLD = 8, 64
# tensor, context, pipeline, expert, expert tensor
LAYOUTS = [(1, 1, 1, 8, 1), (2, 1, 4, 4, 1), (2, 2, 2, 8, 2), (4, 1, 2, 16, 1), (8, 1, 2, 32, 1), (1, 4, 8, 8, 1)]


def plan_of(tensor: int, context: int, pipeline: int, expert: int, expert_tensor: int):
    sizes = {
        "tensor": tensor,
        "context": context,
        "pipeline": pipeline,
        "expert": expert,
        "expert_tensor": expert_tensor,
    }
    names = {"tensor": "tensor_model", "pipeline": "pipeline_model", "expert": "expert_model"}
    options = [f"parallel.{names.get(name, name)}_parallel_size={size}" for name, size in sizes.items()]
    return compose_plan([*options, "precision=bf16", "cluster.num_gpus=64"])


def mcore_groups(sizes: tuple[int, ...]) -> dict[str, list[list[int]]]:
    """Ranks of each group, by megatron-core."""
    tensor, context, pipeline, expert, expert_tensor = sizes
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(
        tp=tensor, ep=1, dp=WORLD // (tensor * context * pipeline), pp=pipeline, cp=context, order=order
    )
    experts = RankGenerator(
        tp=expert_tensor, ep=expert, dp=WORLD // (expert_tensor * expert * pipeline), pp=pipeline, cp=1, order=order
    )
    return {
        "tensor": dense.get_ranks("tp"),
        "context": dense.get_ranks("cp"),
        "data": dense.get_ranks("dp-cp"),
        "pipeline": dense.get_ranks("pp"),
        "expert": experts.get_ranks("ep"),
        "expert_tensor": experts.get_ranks("tp"),
        "expert_data": experts.get_ranks("dp"),
    }


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_groups_are_those_of_megatron_core(sizes: tuple[int, ...]) -> None:
    """Each group's size, distance of ranks and ranks on a node; and what an all-to-all sends within it."""
    config = plan_of(*sizes)
    for name, lists in mcore_groups(sizes).items():
        group: Group = getattr(groups_of(config, config.cluster, WORLD), name)
        for ranks in lists:
            assert len(ranks) == group.size
            assert all(b - a == group.stride for a, b in itertools.pairwise(ranks))
            inside = sum(a // ON_NODE == b // ON_NODE for a in ranks for b in ranks if a != b)
            pairs = len(ranks) * (len(ranks) - 1)
            sent = group.all_to_all(len(ranks))  # a byte to each rank
            assert (sent.inside * len(ranks), sent.between * len(ranks)) == pytest.approx((inside, pairs - inside))


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_a_ring_crosses_nodes_where_neighbours_do(sizes: tuple[int, ...]) -> None:
    config = plan_of(*sizes)
    for name, lists in mcore_groups(sizes).items():
        group: Group = getattr(groups_of(config, config.cluster, WORLD), name)
        if group.size == 1:
            assert group.ring(1.0) == Traffic()
            continue
        ranks = lists[0]
        edges = list(zip(ranks, [*ranks[1:], ranks[0]], strict=True))
        between = sum(a // ON_NODE != b // ON_NODE for a, b in edges) / len(edges)
        sent = group.ring(100.0)
        assert sent.total == pytest.approx(100 * (group.size - 1) / group.size)
        assert sent.between == pytest.approx(between * sent.total)


def test_all_to_all_of_a_pass_by_hand() -> None:
    """2 MoE layers, 8 ranks: each token's 6 copies of 160 x 2 bytes, 7 of 8 to others, there and back."""
    config = plan_of(1, 1, 1, 8, 1)
    tokens = config.train.micro_batch_size * config.data.sequence_length
    groups = groups_of(config, config.cluster, 8)
    sent = pass_traffic(config, groups, Layers(1, 2), backward=False, imbalance=1.0).all_to_all
    assert sent == Traffic(2 * 2 * tokens * 6 * 160 * 2 * 7 / 8, 0.0)
    fuller = pass_traffic(config, groups, Layers(1, 2), backward=False, imbalance=1.5).all_to_all
    assert fuller.total == 1.5 * sent.total


def test_tensor_parallel_traffic_by_hand() -> None:
    """A dense layer: attention's and FFN's input gathered and output scattered; backward, inputs gathered again."""
    config = plan_of(2, 1, 1, 1, 2)
    tokens = config.train.micro_batch_size * config.data.sequence_length
    groups = groups_of(config, config.cluster, 2)
    one = tokens / 2 * 160 * 2  # what a rank sends of an activation
    for backward, times in ((False, 4), (True, 6)):
        sent = pass_traffic(config, groups, Layers(1, 0), backward=backward, imbalance=1.0).tensor
        assert sent == Traffic(times * one, 0.0)


def test_stages_on_one_node_send_inside_it() -> None:
    inside, between = plan_of(1, 1, 4, 1, 1), plan_of(2, 1, 4, 1, 2)
    assert stage_to_stage(inside, groups_of(inside, inside.cluster, 8)).between == 0
    assert stage_to_stage(between, groups_of(between, between.cluster, 64)).inside == 0
    one = plan_of(1, 1, 1, 1, 1)
    assert stage_to_stage(one, groups_of(one, one.cluster, 8)) == Traffic()


def test_seconds_are_of_the_rates_that_are_reached() -> None:
    cluster = compose_plan(["cluster.intra_node_efficiency=0.5", "cluster.inter_node_efficiency=0.8"]).cluster
    assert seconds(cluster, Traffic(450e9, 50e9)) == 1 / 0.5 + 1 / 0.8
