"""What the start of a run prints is where megatron-core really puts layers and experts."""

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_config

LAYOUTS = {
    "parallel=pp2_ep2": 4,
    "parallel=tp2_ep2": 2,
    "parallel=pp2_vpp2": 2,
    "parallel=pp4": 4,
}


def where(override: str, world_size: int) -> tuple[list[list[int]], list[int], list[list[int]], list[int]]:
    """Layers and experts of this rank: by the plan and in the built model."""
    import os

    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_model
    from megatron_moe.plan.placement import placements

    config = tiny_config(override, world_size=world_size)
    with distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context:
        chunks = build_model(config, context.pg_collection, context.device)
        layers = [[layer.layer_number - 1 for layer in chunk.module.decoder.layers] for chunk in chunks]
        experts = [
            index
            for chunk in chunks
            for layer in chunk.module.decoder.layers
            if hasattr(layer.mlp, "local_expert_indices")
            for index in layer.mlp.local_expert_indices
        ]
        (mine,) = (p for p in placements(config.model, config.parallel, world_size) if context.rank in p.ranks)
        return mine.layers, sorted(mine.experts or ()), layers, sorted(set(experts))


@pytest.mark.parametrize("override", LAYOUTS)
def test_plan_equals_model(override: str) -> None:
    for planned_layers, planned_experts, layers, experts in run_ranks(
        where, LAYOUTS[override], override, LAYOUTS[override]
    ):
        assert planned_layers == layers
        assert planned_experts == experts
