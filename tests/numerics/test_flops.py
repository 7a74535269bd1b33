"""FLOPs that speed is reported in, equal to those that PyTorch counts of a forward and backward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_moe.plan.flops import model_flops_per_token
from tests.helpers.ranks import run_ranks
from tests.helpers.training import MLA, tiny_config, tiny_run

LENGTH, BATCH = 32, 2
DENSE = [
    "model.num_experts=0",
    "model.num_shared_experts=0",
    "model.router_topk=0",
    "model.num_dense_layers=4",
    "model.expert_balance_factor=0",
    "model.device_balance_factor=0",
    "model.num_device_groups=null",
]
# What PyTorch does not count.
IN_PLACE = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}
EQUAL = "model.v_head_dim=24"  # as wide as the keys: a CPU pads the narrower ones


def flops_of_a_micro_batch(overrides: list[str]) -> int:
    with tiny_run(overrides) as (run, batches, _):
        counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
        with counter, sdpa_kernel(SDPBackend.MATH):  # as products of matrices, which are counted
            run.pipeline.run(batches, 1, forward_only=False)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "model",
    [[], [*MLA, EQUAL], [*MLA, EQUAL, "model.q_lora_rank=16"], DENSE],
    ids=["mha", "mla", "mla_with_q_lora", "dense"],
)
def test_model_flops_are_those_that_pytorch_counts(model: list[str]) -> None:
    """Twice the length gives the whole of the attention, which PyTorch computes, instead of the causal half.

    PyTorch also counts the router, which Megatron-LM's convention leaves out.
    """
    counted = run_ranks(flops_of_a_micro_batch, 1, ["run.dir=unused", *model])[0]
    config = tiny_config(*model).model
    routers = 6 * (config.num_layers - config.num_dense_layers) * config.hidden_size * config.num_experts
    assert counted / (BATCH * LENGTH) - routers == model_flops_per_token(config, 2 * LENGTH)
