"""Parameter counts: papers' and released models' figures, closed form, and the instantiated model."""

import pytest
import torch

from megatron_moe.config.load import compose_config
from megatron_moe.plan.params import activated_params, total_params
from tests.helpers.ranks import run_ranks

# total, activated. 16B and V2-Lite: sums over the released checkpoints' tensors; 145B: arXiv:2401.06066, table 6
# (144.6B, 22.2B); 2B: 4.1.3 and table 1 (2.0B, 0.3B) with experts 856 wide; nano: this project's own.
COUNTS = {
    "deepseekmoe_2b": (1_974_039_040, 317_370_880),
    "deepseekmoe_16b": (16_375_728_128, 2_828_650_496),
    "deepseekmoe_145b": (144_612_773_888, 22_187_331_584),
    "deepseek_v2_lite": (15_706_484_224, 2_661_150_208),
}


def count_on_meta(name: str) -> tuple[int, int]:
    """Parameters of the whole model, and without the routed experts that a token does not take."""
    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_chunks
    from megatron_moe.model.transformer_config import transformer_config

    config = compose_config([f"model={name}"])
    with distributed(config.parallel) as context:
        mcore_config = transformer_config(config, grouped_gemm=False)
        (model,) = build_chunks(config, mcore_config, context.pg_collection, torch.device("meta"))
    unused = [f".local_experts.{i}." for i in range(config.model.router_topk, config.model.num_experts)]
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.is_meta}
    return sum(sizes.values()), sum(size for n, size in sizes.items() if not any(u in n for u in unused))


@pytest.mark.parametrize("name", COUNTS)
def test_closed_form(name: str) -> None:
    model = compose_config([f"model={name}"]).model
    assert (total_params(model), activated_params(model)) == COUNTS[name]


@pytest.mark.parametrize("name", [*COUNTS, "deepseekmoe_nano"])
def test_instantiated_model(name: str) -> None:
    model = compose_config([f"model={name}"]).model
    assert run_ranks(count_on_meta, 1, name) == [(total_params(model), activated_params(model))]


def test_published_roundings() -> None:
    """arXiv:2401.06066: tables 1 (2B: expert parameters), 6 (145B) and section 5.1.2 (16B)."""
    two, sixteen, large = (compose_config([f"model=deepseekmoe_{n}"]).model for n in ("2b", "16b", "145b"))
    expert = 3 * two.hidden_size * two.expert_ffn_hidden_size * two.num_layers
    assert round(expert * 64 / 1e9, 2) == 1.89
    assert round(expert * 8 / 1e9, 2) == 0.24
    assert (round(total_params(two) / 1e9, 1), round(activated_params(two) / 1e9, 1)) == (2.0, 0.3)
    assert (round(total_params(sixteen) / 1e9, 1), round(activated_params(sixteen) / 1e9, 1)) == (16.4, 2.8)
    assert (round(total_params(large) / 1e9, 1), round(activated_params(large) / 1e9, 1)) == (144.6, 22.2)


def test_nano_is_large_enough_to_be_a_model() -> None:
    model = compose_config([]).model
    assert total_params(model) >= 10_000_000
    assert model.num_experts % 4 == 0
