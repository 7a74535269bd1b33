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


def stepwise(whole: bool) -> tuple[list[float], bytes]:
    """Norms and final parameters over steps that clip and steps that do not, by megatron-core's `step` or our parts."""
    from megatron_moe.optim.optimizer import clip_and_update, prepare_gradients, set_learning_rate

    with tiny_run(["parallel=tp2_ep2"]) as (run, _, _):
        parameters = list(run.pipeline.model[0].parameters())
        torch.manual_seed(run.context.rank)
        set_learning_rate(run.optimizer, 1e-2)
        norms = []
        for step in range(4):
            for p in parameters:
                p.main_grad.copy_(torch.randn_like(p) * 10.0 ** (-step))
            if whole:
                norms.append(run.optimizer.step()[1])
            else:
                norm, finite = prepare_gradients(run.optimizer)
                assert finite
                clip_and_update(run.optimizer, norm)
                norms.append(norm)
        assert max(norms) > run.config.optimizer.clip_grad > min(norms)
        return norms, b"".join(p.detach().numpy().tobytes() for p in parameters)


def test_the_two_halves_of_a_step_are_megatron_cores_whole_one() -> None:
    assert run_ranks(stepwise, 2, False) == run_ranks(stepwise, 2, True)


def test_equals_plain_adamw_with_decay_on_matrices_only() -> None:
    ((ours, plain, fused),) = run_ranks(updates, 1, 5)
    assert fused == {True}
    assert any(p.ndim == 1 for p in ours.values())
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, plain[name], rtol=1e-6, atol=1e-7, msg=name)
