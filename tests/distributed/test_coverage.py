"""The names and shapes that a checkpoint must have are those that megatron-core gives a model's tensors."""

import os

import pytest

from megatron_moe.model.names import other_name, our_tensors
from tests.helpers.ranks import run_ranks
from tests.helpers.training import MLA, tiny_config

HASH = ["model.routing=hash", "model.router_topk=1", "model.expert_balance_factor=0", "model.device_balance_factor=0"]
DENSE = ["model=dense_nano", "model.num_experts=0", "model.num_dense_layers=4", "model.num_shared_experts=0"]
DENSE += ["model.router_topk=0", "model.expert_balance_factor=0"]
VARIANTS = {
    "moe": [],
    "all_moe": ["model.num_dense_layers=0", "model.num_shared_experts=0"],
    "mla": MLA,
    "mla_with_query_latent": [*MLA, "model.q_lora_rank=20"],
    "hash": HASH,
    "dense": DENSE,
}


def shapes_in_megatron_core() -> dict[str, dict[str, tuple[int, ...]]]:
    """Of each variant's tensors, by name; the model takes no memory."""
    import torch

    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_chunks, sharded_tensors
    from megatron_moe.model.transformer_config import transformer_config

    found = {}
    with distributed(tiny_config().parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context:
        for name, overrides in VARIANTS.items():
            config = tiny_config(*overrides)
            mcore_config = transformer_config(config)
            (chunk,) = build_chunks(config, mcore_config, context.pg_collection, torch.device("meta"))
            found[name] = {t.key: tuple(t.global_shape) for t in sharded_tensors(chunk.sharded_state_dict())}
    return found


@pytest.fixture(scope="module")
def theirs() -> dict[str, dict[str, tuple[int, ...]]]:
    return run_ranks(shapes_in_megatron_core, 1)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes(variant: str, theirs: dict) -> None:
    ours = {name: tensor.shape for name, tensor in our_tensors(tiny_config(*VARIANTS[variant]).model).items()}
    found = {other_name(key) if key not in ours else key: shape for key, shape in theirs[variant].items()}
    assert found == ours
