"""Our experts against megatron-core's, one expert after the other."""

import os
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_config

FULL = 70  # rows of an expert: more than is rounded up
COUNTS = {
    "as many each": [5, 5, 5, 5],
    "some without": [0, 7, 0, 33],
    "one with all": [0, 0, FULL, 0],
    "one fuller": [3, 2, FULL, 1],
    "none": [0, 0, 0, 0],
}
OPTIONS = ["model.num_experts=4", "model.num_device_groups=null", "model.router_topk=2"]


def both(overrides: list[str], world_size: int = 1) -> Any:
    """Our experts and megatron-core's with the same weights."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.experts import GroupedExperts
    from megatron_moe.model.transformer_config import transformer_config

    config = tiny_config(*OPTIONS, *overrides, world_size=world_size)
    mcore_config = transformer_config(config)
    with distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context:
        count = config.model.num_experts // config.parallel.expert_model_parallel_size
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        theirs = SequentialMLP(count, mcore_config, submodules, pg_collection=context.pg_collection)
        ours = GroupedExperts(count, mcore_config, pg_collection=context.pg_collection)
        torch.manual_seed(0)
        for i, weight in ((1, ours.weight1), (2, ours.weight2)):
            torch.nn.init.normal_(weight, std=0.3)
            for part, expert in zip(weight, theirs.local_experts, strict=True):
                getattr(expert, f"linear_fc{i}").weight.data.copy_(part)
        yield ours, theirs


def gradients(experts: torch.nn.Module, counts: list[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output, and gradients of tokens, gate values and weights."""
    generator = torch.Generator().manual_seed(1)
    hidden = experts.config.hidden_size
    tokens = torch.randn(sum(counts), hidden, generator=generator).bfloat16().to(dtype).requires_grad_()
    probs = torch.rand(sum(counts), generator=generator).requires_grad_()
    output, _ = experts(tokens, torch.tensor(counts), probs)
    output.backward(torch.randn(sum(counts), hidden, generator=generator).bfloat16().to(dtype))
    found = {"output": output.detach(), "tokens": tokens.grad, "probs": probs.grad}
    if hasattr(experts, "weight1"):
        return {**found, "weight1": experts.weight1.grad, "weight2": experts.weight2.grad}
    of_experts = [[getattr(e, f"linear_fc{i}").weight for e in experts.local_experts] for i in (1, 2)]
    stacked = [torch.stack([w.new_zeros(w.shape) if w.grad is None else w.grad for w in part]) for part in of_experts]
    return {**found, "weight1": stacked[0], "weight2": stacked[1]}


def compare(overrides: list[str], counts: list[int], dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, ...]]:
    """Ours and theirs by name."""
    for ours, theirs in both(overrides):
        mine, others = gradients(ours, counts, dtype), gradients(theirs, counts, dtype)
        return {name: (mine[name].float(), others[name].float()) for name in others}
    raise AssertionError


def assert_close(pairs: dict[str, tuple[torch.Tensor, ...]], tolerance: float) -> None:
    for name, (ours, theirs) in pairs.items():
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), name


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equal_in_fp32(counts: list[int]) -> None:
    (pairs,) = run_ranks(compare, 1, [], counts, torch.float32)
    assert_close(pairs, 1e-6)


def test_equal_in_bf16() -> None:
    (pairs,) = run_ranks(compare, 1, ["precision=bf16"], COUNTS["one fuller"], torch.bfloat16)
    weights = {name: pairs.pop(name) for name in ("weight1", "weight2")}
    assert_close(pairs, 1e-3)  # rounded at the same places: each rounding is up to 4e-3
    assert_close(weights, 1e-2)  # the sum of two products is rounded once more


def with_main_grad(precision: str, of_main_grad: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Of both weights the gradient, and what two passes have added to ones."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    counts = COUNTS["one fuller"]
    for ours, _ in both([f"precision={precision}"]):
        weights = [ours.weight1, ours.weight2]
        gradients(ours, counts, dtype)
        expected = [weight.grad.float().clone() for weight in weights]
        for weight in weights:
            weight.main_grad = torch.ones_like(weight, dtype=of_main_grad)
        for _ in range(2):
            gradients(ours, counts, dtype)
        assert all(weight.grad_added_to_main_grad for weight in weights)
        return [(one, (w.main_grad.float() - 1) / 2) for one, w in zip(expected, weights, strict=True)]
    raise AssertionError


@pytest.mark.parametrize(
    ("precision", "of_main_grad", "tolerance"),
    [("fp32", torch.float32, 1e-6), ("bf16", torch.float32, 1e-2), ("bf16", torch.bfloat16, 1e-2)],
)
def test_adds_to_main_grad(precision: str, of_main_grad: torch.dtype, tolerance: float) -> None:
    (pairs,) = run_ranks(with_main_grad, 1, precision, of_main_grad)
    for expected, found in pairs:
        assert (found - expected).norm() < tolerance * expected.norm()


def places(overrides: list[str], world_size: int) -> tuple[list[tuple], ...]:
    """Where each weight lies in a checkpoint, ours and theirs."""
    from megatron_moe.model.build import sharded_tensors

    for modules in both(overrides, world_size):
        return tuple(
            sorted(
                (t.key, t.global_shape, t.global_offset, t.local_shape, t.replica_id, tuple(t.data.flatten().tolist()))
                for t in sharded_tensors(module.sharded_state_dict("mlp.experts.", ((0, 1, 3),)))
            )
            for module in modules
        )
    raise AssertionError


@pytest.mark.parametrize(("layout", "ranks"), [("single", 1), ("ep2", 2), ("tp2", 2)])
def test_same_checkpoint(layout: str, ranks: int) -> None:
    for ours, theirs in run_ranks(places, ranks, [f"parallel={layout}"], ranks):
        assert len(theirs) == 3 * 4 // (2 if layout == "ep2" else 1)
        assert ours == theirs


@given(counts=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_places_of_padded_rows(counts: list[int]) -> None:
    from megatron_moe.model.expert_products import GRID, PaddedProducts

    if not sum(counts):
        return
    padding = PaddedProducts(torch.tensor(counts), torch.device("cpu"))
    assert padding.source[padding.place].tolist() == list(range(sum(counts)))
    assert padding.is_token.sum() == sum(counts)
    assert padding.parts[0][0] == slice(None)  # of all experts, so that nothing stale stays
    assert all(shape[-1] in GRID for _, _, shape in padding.parts)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for expert, part, shape in padding.parts:
        of = torch.arange(len(counts))[expert].reshape(-1, 1).expand(-1, shape[-1]).flatten()
        assert (owner[padding.source[part]] == of)[padding.is_token[part]].all()


def products(kind: str, counts: list[int]) -> Any:
    from megatron_moe.model import expert_products

    of_kind = getattr(expert_products, kind)
    on_device = (torch.device("cpu"),) if kind == "PaddedProducts" else ()
    return of_kind(torch.tensor(counts), *on_device)


@pytest.mark.parametrize("of_total", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 300, 5], [8, 8, 8, 8], [0, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("kind", ["SingleProducts", "GroupedProducts", "PaddedProducts"])
def test_products(kind: str, counts: list[int], of_total: torch.dtype) -> None:
    """Each against a loop in fp32."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(sum(counts), n, generator=generator).bfloat16() for n in (16, 24))
    matrices = torch.randn(4, 24, 16, generator=generator).bfloat16()
    padding = products(kind, counts)
    found = padding.unpad(padding.multiply(padding.pad(inputs), matrices.mT))
    rows = [part.split(counts) for part in (inputs.float(), outputs.float())]
    expected = torch.cat([part @ matrix.float().T for part, matrix in zip(rows[0], matrices, strict=True)])
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)

    outer = torch.stack([out.T @ part for part, out in zip(*rows, strict=True)])
    total = torch.full((4, 24, 16), torch.nan, dtype=of_total)
    padded = padding.pad(outputs) * (padding.is_token[:, None] if kind == "PaddedProducts" else 1)
    for times, is_stale in ((1, True), (2, False)):
        padding.add_weight_gradient(total, padded, padding.pad(inputs), is_stale=is_stale)
        torch.testing.assert_close(total.float(), times * outer, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize(
    ("device", "dtype", "kind"),
    [
        ("cpu", torch.float32, "SingleProducts"),
        ("cpu", torch.bfloat16, "PaddedProducts"),
        ("cuda", torch.float32, "SingleProducts"),
        ("cuda", torch.bfloat16, "GroupedProducts"),
    ],
)
def test_which_products(device: str, dtype: torch.dtype, kind: str) -> None:
    from megatron_moe.model.expert_products import products_of

    tokens = mock.MagicMock(is_cuda=device == "cuda", device=torch.device("cpu"), dtype=dtype)
    tokens.__len__.return_value = 5
    assert type(products_of(torch.tensor([2, 3]), tokens)).__name__ == kind
