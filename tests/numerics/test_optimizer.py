"""AdamW as we drive it against torch's own, and what decays."""

import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_run


def updates(steps: int) -> tuple[dict, dict, set[bool]]:
    """Parameters after some steps; from torch's plain AdamW on the same gradients; and whether ours is fused."""
    from megatron_moe.optim.optimizer import set_learning_rate

    with tiny_run(["optimizer.clip_grad=1e9"]) as (run, _, _):
        (part,) = run.optimizer.chained_optimizers
        model = run.pipeline.model[0]
        names = {p: name for name, p in model.named_parameters()}
        copies = {name: p.detach().clone().requires_grad_() for p, name in names.items()}
        decays = {True: [c for c in copies.values() if c.ndim > 1], False: [c for c in copies.values() if c.ndim == 1]}
        options = run.config.optimizer
        plain = torch.optim.AdamW(
            [{"params": c, "weight_decay": options.weight_decay * decay} for decay, c in decays.items()],
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            foreach=False,
        )
        torch.manual_seed(0)
        for step in range(steps):
            rate = 1e-3 * (step + 1)
            set_learning_rate(run.optimizer, rate)
            for group in plain.param_groups:
                group["lr"] = rate
            for p, name in names.items():
                p.main_grad.copy_(torch.randn_like(p))
                copies[name].grad = p.main_grad.clone()
            run.optimizer.step()
            plain.step()
        ours = {name: p.detach() for p, name in names.items()}
        fused = {group["fused"] for group in part.optimizer.param_groups}
        return ours, {name: c.detach() for name, c in copies.items()}, fused


def test_equals_plain_adamw_with_decay_on_matrices_only() -> None:
    ((ours, plain, fused),) = run_ranks(updates, 1, 5)
    assert fused == {True}
    assert any(p.ndim == 1 for p in ours.values())
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, plain[name], rtol=1e-6, atol=1e-7, msg=name)
