"""Balance losses, device-limited selection and dropping against loops written from the equations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.model import balance_loss
from megatron_moe.model.selection import (
    hash_table,
    is_undropped,
    kept_within_budget,
    within_device_limit,
    without_top_experts,
)
from tests.numerics import reference

hundred_cases = settings(max_examples=100, derandomize=True)
seeds = st.integers(0, 2**31)


@st.composite
def routings(draw):
    """Affinities and selections [s, b, e], top-k, device groups and limit."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    limit = draw(st.integers(1, groups))
    topk = draw(st.integers(1, limit * size))
    length, batch = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    torch.manual_seed(draw(seeds))
    affinity = (3 * torch.randn(length, batch, groups * size)).softmax(dim=-1).requires_grad_()
    limited = within_device_limit(affinity.detach(), num_groups=groups, limit=limit)
    selected = torch.zeros_like(limited).scatter(-1, limited.topk(topk).indices, 1).bool()
    return affinity, selected, topk, groups, limit


@hundred_cases
@given(routings())
def test_balance_losses(routing) -> None:
    affinity, selected, topk, groups, limit = routing
    statistics = balance_loss.routing_statistics(
        affinity,
        balance_loss.selections_per_sequence(selected),
        topk=topk,
        sequence_length=len(affinity),
    )
    sent = balance_loss.tokens_sent_per_sequence(selected, groups)
    pairs = {
        "expert": (
            balance_loss.expert_balance_loss(statistics),
            reference.expert_level(affinity, selected, topk),
        ),
        "device": (
            balance_loss.device_balance_loss(statistics, num_groups=groups),
            reference.device_level(affinity, selected, topk, groups),
        ),
        "communication": (
            balance_loss.communication_balance_loss(statistics, sent, limit=limit),
            reference.communication_level(affinity, selected, groups, limit),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        torch.testing.assert_close(ours, theirs, msg=name)
        gradients = (torch.autograd.grad(loss, affinity, retain_graph=True)[0] for loss in (ours, theirs))
        torch.testing.assert_close(*gradients, msg=f"gradient of {name}")


def test_losses_of_uniform_routing_are_one() -> None:
    """Sixteen experts on four devices; each token takes the same place on two of them, each place in turn."""
    affinity = torch.full((24, 1, 16), 1 / 16)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    selected = torch.zeros(24, 1, 16, dtype=torch.bool)
    for t in range(24):
        for device in pairs[t % 6]:
            selected[t, 0, 4 * device + t // 6] = True
    statistics = balance_loss.routing_statistics(
        affinity, balance_loss.selections_per_sequence(selected), topk=2, sequence_length=24
    )
    sent = balance_loss.tokens_sent_per_sequence(selected, 4)
    assert balance_loss.expert_balance_loss(statistics).item() == pytest.approx(1)
    assert balance_loss.device_balance_loss(statistics, num_groups=4).item() == pytest.approx(1)
    assert balance_loss.communication_balance_loss(statistics, sent, limit=2).item() == pytest.approx(1)


@hundred_cases
@given(routings())
def test_device_limited_selection(routing) -> None:
    affinity, selected, topk, groups, limit = routing
    size = affinity.shape[-1] // groups
    for row, chosen in zip(affinity.flatten(0, 1).tolist(), selected.flatten(0, 1).tolist(), strict=True):
        ours = {i for i, is_chosen in enumerate(chosen) if is_chosen}
        assert ours == reference.device_limited(row, groups, limit, topk)
        assert len({i // size for i in ours}) <= limit


def test_limit_holds_where_affinities_vanish() -> None:
    """All but one affinity underflow to 0; the others must still lie on the token's devices."""
    affinity = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
    chosen = within_device_limit(affinity, num_groups=3, limit=1).topk(2).indices
    assert sorted(chosen[0].tolist()) == [2, 3]


@st.composite
def selections(draw):
    """Affinity, device and protection of each selection, devices and budget; some affinities are equal."""
    groups, count = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    torch.manual_seed(draw(seeds))
    affinity = torch.randint(1, 30, (count,)) / 30
    undropped = torch.rand(count) < draw(st.sampled_from([0.0, 0.1, 0.5]))
    return affinity, torch.randint(groups, (count,)), undropped, groups, draw(st.integers(0, count))


@hundred_cases
@given(selections())
def test_dropping(case) -> None:
    affinity, device, undropped, groups, budget = case
    keep = kept_within_budget(affinity, device, undropped, budget=budget, num_devices=groups)
    rows = list(zip(affinity.tolist(), device.tolist(), undropped.tolist(), strict=True))
    assert keep.tolist() == reference.kept(rows, budget, groups)
    assert keep[undropped].all()
    for d in range(groups):
        held = (keep & (device == d)).sum().item()
        assert held <= max(budget, (undropped & (device == d)).sum().item())


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_undropped_sequences_are_spread_evenly(fraction: float) -> None:
    chosen = is_undropped(torch.arange(10_000_000_000, 10_000_010_000), fraction).float()
    assert chosen.mean().item() == pytest.approx(fraction, abs=0.002)
    per_hundred = chosen.view(100, 100).sum(dim=-1)
    assert per_hundred.max() - per_hundred.min() <= 4


def test_the_best_experts_are_masked() -> None:
    masked = without_top_experts(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 2)
    assert masked.topk(2).indices.tolist() == [[2, 0]]


def test_hash_table_is_fixed_and_even() -> None:
    table = hash_table(8192, 16, seed=3, layer=2)
    assert torch.equal(table, hash_table(8192, 16, seed=3, layer=2))
    for other in (hash_table(8192, 16, seed=4, layer=1), hash_table(8192, 16, seed=3, layer=3)):
        assert (table == other).float().mean() < 0.1
    assert table.bincount(minlength=16).float().std() < 3 * (8192 / 16) ** 0.5
