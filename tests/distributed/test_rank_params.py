"""Parameters of each rank in the plan are those that megatron-core gives it."""

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import MLA, tiny_config

LATENT = [*MLA, "model.q_lora_rank=16"]
LAYOUTS = {
    "tp2_ep2": ["parallel=tp2_ep2"],
    "tp2_ep2_mla": ["parallel=tp2_ep2", *LATENT],
    "tp2_etp2_pp2": ["parallel=tp2", "parallel.pipeline_model_parallel_size=2"],
    "tp2_ep2_etp2": ["parallel=tp2_ep2", "parallel.expert_tensor_parallel_size=2"],
    "pp2_vpp2_mla": ["parallel=pp2_vpp2", *LATENT],
    "pp4": ["parallel=pp4", "model.num_dense_layers=2"],
    "tp4_hash": [
        "parallel.tensor_model_parallel_size=4",
        "model.routing=hash",
        "model.router_topk=1",
        "model.expert_balance_factor=0",
        "model.device_balance_factor=0",
    ],
}
RANKS = 4


def counted(layouts: dict[str, list[str]]) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """On each rank, for each layout: parameters of routed experts and others, planned and in the built model."""
    import os

    import torch

    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_chunks
    from megatron_moe.model.transformer_config import transformer_config
    from megatron_moe.plan.params import rank_params
    from megatron_moe.plan.pipeline import layers_by_stage

    found = {}
    for name, overrides in layouts.items():
        config = tiny_config(*overrides, world_size=RANKS)
        rendezvous = f"{os.environ['MEGATRON_MOE_INIT_METHOD']}_{name}"
        with distributed(config.parallel, init_method=rendezvous) as context:
            chunks = build_chunks(config, transformer_config(config), context.pg_collection, torch.device("meta"))
            sizes = [(".experts." in name, p.numel()) for chunk in chunks for name, p in chunk.named_parameters()]
            stage = context.pg_collection.pp.rank()
        planned = rank_params(config.model, config.parallel, layers_by_stage(config.model, config.parallel)[stage])
        routed = sum(size for is_routed, size in sizes if is_routed)
        found[name] = (planned.experts, planned.dense), (routed, sum(size for _, size in sizes) - routed)
    return found


@pytest.fixture(scope="module")
def counts() -> list[dict[str, tuple[tuple[int, int], tuple[int, int]]]]:
    return run_ranks(counted, RANKS, LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rank_params_are_those_of_the_built_model(name: str, counts: list) -> None:
    for rank in counts:
        planned, built = rank[name]
        assert planned == built
