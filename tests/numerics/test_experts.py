"""Our experts against megatron-core's, one expert after the other."""

import math
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


def with_main_grad(precision: str, of_main_grad: torch.dtype, start: float) -> list[tuple[torch.Tensor, ...]]:
    """Of both weights the gradient, and what each of two passes has added; a start that is no number is stale."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    counts = COUNTS["one fuller"]
    for ours, _ in both([f"precision={precision}"]):
        weights = [ours.weight1, ours.weight2]
        gradients(ours, counts, dtype)
        expected = [weight.grad.float().clone() for weight in weights]
        for weight in weights:
            weight.main_grad = torch.full_like(weight, start, dtype=of_main_grad)
            weight.main_grad_is_stale = math.isnan(start)
        for _ in range(2):
            gradients(ours, counts, dtype)
        assert all(weight.grad_added_to_main_grad for weight in weights)
        before = 0 if math.isnan(start) else start
        return [(one, (w.main_grad.float() - before) / 2) for one, w in zip(expected, weights, strict=True)]
    raise AssertionError


@pytest.mark.parametrize("start", [1.0, math.nan])
@pytest.mark.parametrize(
    ("precision", "of_main_grad", "tolerance"),
    [("fp32", torch.float32, 1e-6), ("bf16", torch.float32, 1e-2), ("bf16", torch.bfloat16, 1e-2)],
)
def test_adds_to_main_grad(precision: str, of_main_grad: torch.dtype, tolerance: float, start: float) -> None:
    (pairs,) = run_ranks(with_main_grad, 1, precision, of_main_grad, start)
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


def routed(sort: bool) -> dict[str, torch.Tensor]:
    """Output and gradients where tokens are left in place, or are sorted by expert and their outputs added up."""
    for experts, _ in both([]):
        generator = torch.Generator().manual_seed(2)
        routing = torch.rand(20, 4, generator=generator) < torch.tensor([0.9, 0.5, 0.0, 0.2])
        tokens = torch.randn(20, experts.config.hidden_size, generator=generator).requires_grad_()
        gates = torch.rand(20, 4, generator=generator).requires_grad_()
        if sort:
            expert, token = routing.T.nonzero().unbind(1)
            parts, _ = experts(tokens[token], routing.sum(0), gates[token, expert])
            output = torch.zeros_like(tokens).index_add(0, token, parts)
        else:
            output, _ = experts(tokens, routing, gates)
        output.backward(torch.randn(output.shape, generator=generator))
        of_weights = {name: weight.grad for name, weight in experts.named_parameters()}
        return {"output": output.detach(), "tokens": tokens.grad, "gates": gates.grad, **of_weights}
    raise AssertionError


def test_tokens_left_in_place() -> None:
    (in_place,), (sorted_first,) = (run_ranks(routed, 1, sort) for sort in (False, True))
    assert_close({name: (values, sorted_first[name]) for name, values in in_place.items()}, 1e-6)
    assert len(in_place) == 5


def all_dropped() -> list[torch.Tensor]:
    """Output and gradients of tokens of which none goes anywhere, in bf16."""
    for experts, _ in both(["precision=bf16"]):
        tokens = torch.ones(5, experts.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        output, _ = experts(tokens, torch.zeros(5, 4, dtype=torch.bool), torch.rand(5, 4, requires_grad=True))
        output.sum().backward()
        return [output.detach(), tokens.grad, *(weight.grad for weight in experts.parameters())]
    raise AssertionError


def test_all_dropped() -> None:
    (found,) = run_ranks(all_dropped, 1)
    assert not any(values.any() for values in found)


def dispatchers(overrides: list[str]) -> set[str]:
    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_model

    config = tiny_config(*overrides, world_size=int(os.environ["WORLD_SIZE"]))
    with distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context:
        modules = build_model(config, context.pg_collection, context.device)[0].modules()
        return {type(layer.token_dispatcher).__name__ for layer in modules if hasattr(layer, "token_dispatcher")}


@pytest.mark.parametrize(
    ("options", "ranks", "dispatcher"),
    [
        (["parallel=single"], 1, "LocalDispatcher"),
        (["parallel=single", "overlap.moe_shared_expert_overlap=true"], 1, "MoEAlltoAllTokenDispatcher"),
        (["parallel=ep2"], 2, "MoEAlltoAllTokenDispatcher"),
        (["parallel=tp2"], 2, "MoEAlltoAllTokenDispatcher"),
    ],
)
def test_who_dispatches(options: list[str], ranks: int, dispatcher: str) -> None:
    assert run_ranks(dispatchers, ranks, options) == [{dispatcher}] * ranks


@given(counts=st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_places_of_padded_rows(counts: list[int]) -> None:
    from megatron_moe.model.expert_rows import GRID, PaddedRows

    if not sum(counts):
        return
    rows = PaddedRows(torch.tensor(counts), None, 3, torch.device("cpu"))
    assert rows.token_index[rows.place].tolist() == list(range(sum(counts)))
    assert rows.is_token.sum() == sum(counts)
    is_first = [part.is_first for part in rows.parts]
    assert is_first == sorted(is_first, reverse=True)
    firsts = [part.experts for part in rows.parts if part.is_first]
    assert [e for part in firsts for e in range(*part.indices(len(counts)))] == list(range(len(counts)))
    assert [part.rows.start for part in rows.parts[1:]] == [part.rows.stop for part in rows.parts[:-1]]
    assert rows.parts[-1].rows.stop == len(rows.token_index)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for part in rows.parts:
        experts = torch.arange(len(counts))[part.experts]
        num_rows = (part.rows.stop - part.rows.start) // len(experts)
        assert num_rows in GRID
        is_right = owner[rows.token_index[part.rows]] == experts.repeat_interleave(num_rows)
        is_idle = (torch.tensor(counts)[experts] == 0).repeat_interleave(num_rows)
        assert (is_right | is_idle).all()  # padding too
        assert not rows.is_token[part.rows][is_idle].any()


def expert_rows_of(kind: str, counts: list[int], token: torch.Tensor | None) -> Any:
    from megatron_moe.model import expert_rows

    how = {"SingleRows": (4,), "GroupedRows": (), "PaddedRows": (4, torch.device("cpu"))}[kind]
    return getattr(expert_rows, kind)(torch.tensor(counts), token, *how)


NINE = [3, 0, 300, 5, 0, 0, 1, 2, 4]  # more than are computed at once


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("of_total", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [NINE, [8, 8, 8, 8], [0, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("kind", ["SingleRows", "GroupedRows", "PaddedRows"])
def test_products(kind: str, counts: list[int], of_total: torch.dtype, is_sorted: bool) -> None:
    """Each against a loop in fp32, of tokens in the order of the experts, or of one token each in reversed order."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(sum(counts), n, generator=generator).bfloat16() for n in (16, 24))
    matrices = torch.randn(len(counts), 24, 16, generator=generator).bfloat16()
    order = torch.arange(sum(counts))
    order = order if is_sorted else order.flip(0)
    rows = expert_rows_of(kind, counts, None if is_sorted else order)
    is_token = rows.gather_gates(torch.ones(sum(counts))).bfloat16()
    found = rows.new_sums(outputs)
    total = torch.full(matrices.shape, torch.nan, dtype=of_total)
    for is_stale in (True, False):
        for part in rows.parts:
            ours = rows.gather(inputs[order], part) * is_token[part.rows]
            of_outputs = rows.gather(outputs[order], part)
            rows.add_weight_gradient(total, of_outputs, ours, part, is_stale=is_stale)
            if is_stale:
                rows.scatter_add(found, rows.multiply(ours, matrices.mT, part), part)

    parts = [part.split(counts) for part in (inputs.float(), outputs.float())]
    expected = torch.cat([part @ matrix.float().T for part, matrix in zip(parts[0], matrices, strict=True)])
    torch.testing.assert_close(found[order].float(), expected, rtol=1e-2, atol=1e-2)
    gradient = torch.stack([out.T @ part for part, out in zip(*parts, strict=True)])
    torch.testing.assert_close(total.float(), 2 * gradient, rtol=2e-2, atol=0.2)
    assert rows.scatter_gates(rows.gather_gates(inputs[:, 0].float())[:, 0]).tolist() == inputs[:, 0].tolist()


@pytest.mark.parametrize(
    ("device", "dtype", "width", "kind"),
    [
        ("cpu", torch.float32, 8, "SingleRows"),
        ("cpu", torch.bfloat16, 8, "PaddedRows"),
        ("cuda", torch.float32, 8, "SingleRows"),
        ("cuda", torch.bfloat16, 8, "GroupedRows"),
        ("cuda", torch.bfloat16, 428, "PaddedRows"),  # of deepseekmoe_2b on two tensor-parallel ranks
    ],
)
def test_which_rows(device: str, dtype: torch.dtype, width: int, kind: str) -> None:
    from megatron_moe.model.expert_rows import expert_rows

    tokens = mock.MagicMock(is_cuda=device == "cuda", device=torch.device("cpu"), dtype=dtype, shape=(5, 8))
    tokens.__len__.return_value = 5
    assert type(expert_rows(tokens, width, torch.tensor([2, 3]))).__name__ == kind
