"""megatron-core's MoE layer with our router against a plain-torch layer, forward and backward."""

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_config
from tests.numerics import reference

OPTIONS = ["model.device_balance_factor=0.05", "model.num_device_groups=4", "model.init_method_std=0.3"]


def layer_and_reference(overrides: list[str], seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name: ours and the reference's, for outputs, losses and gradients."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_model, routers

    config = tiny_config(*OPTIONS, *overrides)
    with distributed(config.parallel) as context:
        model = build_model(config, context.pg_collection, context.device)
        layer = model[0].module.decoder.layers[1].mlp
        torch.manual_seed(seed)
        u = torch.randn(32, 3, config.model.hidden_size, requires_grad=True)
        cotangent = torch.randn_like(u)

        ours = run_ours(layer, u, cotangent, routers(model)[0], MoEAuxLossAutoScaler)
        theirs = run_reference(layer, u, cotangent, config.model)
    return {name: (ours[name], theirs[name]) for name in theirs}


def run_ours(layer, u, cotangent, router, scaler) -> dict[str, torch.Tensor]:
    scaler.set_loss_scale(torch.ones(1))
    router.reset_counters()
    output, _ = layer(u)
    parameters = dict(layer.named_parameters())
    (output * cotangent).sum().backward()
    gradients = {f"gradient of {name}": p.main_grad if p.grad is None else p.grad for name, p in parameters.items()}
    expert_loss, device_loss, _ = router.counters.balance_losses
    return {
        "output": output.detach(),
        "expert-level loss": expert_loss,
        "device-level loss": device_loss,
        "load": router.counters.tokens_per_expert,
        "gradient of input": u.grad,
        **gradients,
    }


def run_reference(layer, u, cotangent, model) -> dict[str, torch.Tensor]:
    copies = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    v = u.detach().clone().requires_grad_()
    experts = list(zip(copies["experts.weight1"], copies["experts.weight2"], strict=True))
    shared = tuple(copies[f"shared_experts.linear_fc{n}.weight"] for n in (1, 2))
    output, affinity, selected = reference.moe(v, copies["router.weight"], experts, shared, model.router_topk)
    topk, groups = model.router_topk, model.num_device_groups
    expert_loss = model.expert_balance_factor * reference.expert_level(affinity, selected, topk)
    device_loss = model.device_balance_factor * reference.device_level(affinity, selected, topk, groups)
    ((output * cotangent).sum() + expert_loss + device_loss).backward()
    return {
        "output": output.detach(),
        "expert-level loss": expert_loss.detach(),
        "device-level loss": device_loss.detach(),
        "load": selected.sum(dim=(0, 1)),
        "gradient of input": v.grad,
        **{f"gradient of {name}": p.grad for name, p in copies.items()},
    }


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("overrides", [[], ["model.router_topk=1"], ["model.expert_balance_factor=10"]])
def test_equals_plain_torch(overrides: list[str], seed: int) -> None:
    (pairs,) = run_ranks(layer_and_reference, 1, overrides, seed)
    assert len(pairs) == 5 + 1 + 2 + 2
    for name, (ours, theirs) in pairs.items():
        difference = (ours - theirs).norm() / theirs.norm()
        assert difference < 1e-5, f"{name}: {difference:.1e}"  # fp32 sums in another order
