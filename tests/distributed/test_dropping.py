"""What is sent where, seen at the dispatcher's entrance."""

import pytest
import torch

from megatron_moe.model.selection import hash_table
from tests.distributed.test_layouts import DEEPSEEK_V2_ROUTING, HASH
from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_run, train_tiny

DEVICES, LIMIT, TOPK, UNDROPPED = 4, 2, 3, 0.3  # of DEEPSEEK_V2_ROUTING


def routed(overrides: list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """On each rank, of one step: what was selected and kept, by forward [s, b, e]; and the fraction dropped."""
    from megatron_moe.model.router import DeepSeekMoERouter
    from megatron_moe.train.step import train_step
    from megatron_moe.train.step_metrics import step_metrics

    selected, kept = [], []

    class Spy(DeepSeekMoERouter):
        def _drop(self, probs, routing_map, *, sequence_length):
            selected.append(routing_map.view(sequence_length, -1, self.num_experts))
            probs, routing_map = super()._drop(probs, routing_map, sequence_length=sequence_length)
            assert torch.equal(probs > 0, routing_map)
            kept.append(routing_map.view(sequence_length, -1, self.num_experts))
            return probs, routing_map

    with tiny_run(["run.dir=without_checkpoints", *overrides]) as (run, batches, num_micro_batches):
        for router in run.pipeline.routers:
            router.__class__ = Spy
        result = train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
        metrics = step_metrics(run.config, run.context, run.pipeline.model, result)
        return selected, kept, metrics["moe/dropped_fraction"]


@pytest.mark.parametrize(("layout", "world_size"), [("single", 1), ("ep2", 2)])
def test_devices_keep_their_budget_and_protected_sequences_everything(layout: str, world_size: int) -> None:
    overrides = [*DEEPSEEK_V2_ROUTING, f"parallel={layout}", "train.micro_batch_size=2"]
    ranks = run_ranks(routed, world_size, overrides)
    forwards, moe_layers = len(ranks[0][0]), 3
    samples_at_once = 2 * world_size
    dropped = total = 0
    for forward in range(forwards):
        # ranks hold consecutive samples, so that side by side they are the batch that is dispatched together
        selected, kept = (torch.cat([rank[i][forward] for rank in ranks], dim=1) for i in (0, 1))
        first = forward // moe_layers * samples_at_once
        protected = [
            ((first + i) * 2654435769) % 2**32 < UNDROPPED * 2**32 for i in range(samples_at_once)
        ]  # the rule, written again
        on_device = kept.unflatten(-1, (DEVICES, -1))
        budget = int(selected.numel() / selected.shape[-1] * TOPK / DEVICES)
        for device, held in enumerate(on_device.sum(dim=(0, 1, 3)).tolist()):
            of_protected = on_device[:, protected, device].sum().item()
            wanted = selected.unflatten(-1, (DEVICES, -1))[:, :, device].sum().item()
            assert held == max(min(wanted, budget), of_protected)
        assert torch.equal(kept[:, protected], selected[:, protected])
        assert not (kept & ~selected).any()
        assert (selected.unflatten(-1, (DEVICES, -1)).any(dim=-1).sum(dim=-1) <= LIMIT).all()
        assert (selected.sum(dim=-1) == TOPK).all()
        dropped, total = dropped + (selected & ~kept).sum().item(), total + selected.sum().item()
    assert ranks[0][2] == pytest.approx(dropped / total)
    assert dropped > 0


def hashed(overrides: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """On each rank, of one forward: token ids and their experts in the first MoE layer, position by position."""
    seen = []
    with tiny_run(["run.dir=without_checkpoints", *overrides]) as (run, batches, _):
        router = run.pipeline.routers[0]
        router.register_forward_hook(lambda _router, _args, output: seen.append(output[1].clone()))
        batch = next(batches[0])
        run.pipeline.run([iter([batch])], 1, forward_only=True)
        rank, size = run.context.pg_collection.tp.rank(), run.context.pg_collection.tp.size()
        tokens = batch["tokens"].T.chunk(size)[rank].flatten()
        return tokens, seen[0].int().argmax(dim=1), seen[0].sum(dim=1)


@pytest.mark.parametrize(("layout", "world_size"), [("single", 1), ("tp2", 2), ("cp2", 2), ("ep2", 2)])
def test_a_token_goes_to_the_expert_of_its_id(layout: str, world_size: int) -> None:
    table = hash_table(256, 8, seed=5, layer=2)
    for tokens, experts, counts in run_ranks(hashed, world_size, [*HASH, f"parallel={layout}", "model.hash_seed=5"]):
        assert torch.equal(experts, table[tokens])
        assert (counts == 1).all()
        assert len(set(experts.tolist())) == 8


def test_nothing_is_dropped_at_evaluation() -> None:
    losses = [
        run_ranks(train_tiny, 1, [*DEEPSEEK_V2_ROUTING, f"model.device_capacity_factor={factor}"], 0)[0]["valid"]
        for factor in ("0.01", "null")
    ]
    assert losses[0] == losses[1]
