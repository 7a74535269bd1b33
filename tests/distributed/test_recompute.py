"""What is computed again in the backward pass changes no number, in any layout."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_layouts import DEEPSEEK_V2_ROUTING
from tests.helpers.ranks import run_ranks
from tests.helpers.training import MLA, assemble, optimizer_shards, tiny_run

ALL_PARTS = "recompute.modules=[layernorm,mla_up_proj,core_attn,mlp,moe]"
DOCUMENTS = ["data.reset_position_ids=true"]


def first_step(overrides: list[str]) -> dict[str, Any]:
    """On each rank, of one step: how often modules computed, by the end of their names; numbers and gradients."""
    from megatron_moe.train.step import train_step
    from megatron_moe.train.step_metrics import step_metrics

    calls: Counter[str] = Counter()
    with tiny_run(["run.dir=without_checkpoints", *overrides]) as (run, batches, num_micro_batches):
        for chunk in run.pipeline.model:
            for name, module in chunk.named_modules():
                kind = ".".join(name.split(".")[-2:])
                module.register_forward_hook(lambda *_, kind=kind: calls.update([kind]))
        result = train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
        metrics = step_metrics(run.config, run.context, run.pipeline.model, result)
        return {"calls": calls, "metrics": metrics, "gradients": optimizer_shards(run.checkpointer, "exp_avg")}


def compare(ranks: list[dict], plain: list[dict]) -> None:
    for name, expected in plain[0]["metrics"].items():
        if name != "memory/peak_gib":
            np.testing.assert_allclose(ranks[0]["metrics"][name], expected, rtol=1e-6, atol=1e-7, err_msg=name)
    gradients, expected = (assemble([rank["gradients"] for rank in run]) for run in (ranks, plain))
    for name, gradient in gradients.items():
        atol = 1e-6 * np.abs(expected[name]).max()  # norms that are computed again are added up in another order
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=atol, err_msg=name)


def computed_again(ranks: list[dict], plain: list[dict]) -> set[str]:
    """Ends of the names of modules that computed twice as often on rank 0."""
    before = plain[0]["calls"]
    return {kind for kind, count in ranks[0]["calls"].items() if count == 2 * before[kind]}


@pytest.fixture(scope="module")
def plain() -> list[dict]:
    return run_ranks(first_step, 2, [*MLA, "parallel=ep2"])


@pytest.mark.parametrize(
    ("overrides", "again", "once"),
    [
        (
            ["recompute=selective", ALL_PARTS],
            {"self_attention.core_attention", "mlp.router", "mlp.linear_fc1", "self_attention.linear_kv_up_proj"},
            {"self_attention.linear_kv_down_proj", "self_attention.linear_proj"},
        ),
        (["recompute=selective", "recompute.modules=[shared_experts]"], {"shared_experts.linear_fc1"}, {"mlp.router"}),
        (["recompute=full"], {"self_attention.linear_proj", "mlp.router"}, {"module.output_layer"}),
    ],
    ids=["parts", "shared_experts", "full"],
)
def test_what_is_computed_again_changes_nothing(
    overrides: list[str], again: set[str], once: set[str], plain: list[dict]
) -> None:
    ranks = run_ranks(first_step, 2, [*MLA, "parallel=ep2", *overrides])
    compare(ranks, plain)
    assert again <= computed_again(ranks, plain)
    assert not once & computed_again(ranks, plain)
    assert once <= set(ranks[0]["calls"])


def test_experts_that_leave_tokens_in_place() -> None:
    ranks = run_ranks(first_step, 1, [*MLA, "recompute=selective", ALL_PARTS])
    plain = run_ranks(first_step, 1, MLA)
    compare(ranks, plain)
    assert {"mlp.experts", "layer.pre_mlp_layernorm"} & computed_again(ranks, plain)


def test_a_pipeline_computes_each_micro_batch_again_with_its_own_positions_and_dropping() -> None:
    """Red: have `OfMicroBatch.get` return the newest."""
    overrides = ["parallel=pp2", *MLA, *DEEPSEEK_V2_ROUTING, *DOCUMENTS]
    plain = run_ranks(first_step, 2, overrides)
    assert plain[0]["metrics"]["moe/dropped_fraction"] > 0
    compare(run_ranks(first_step, 2, [*overrides, "recompute=full"]), plain)


def micro_batches_seen() -> list[tuple[str, float]]:
    """Of a layer that is computed again, after the forward passes of two micro batches and an evaluation."""
    from megatron.core.tensor_parallel.random import checkpoint, initialize_rng_tracker

    from megatron_moe.distributed import cpu
    from megatron_moe.model.micro_batch import OfMicroBatch

    cpu.install()
    initialize_rng_tracker(inference_rng_tracker=True)
    ids, seen = OfMicroBatch(), []

    def layer(x: torch.Tensor, training: bool = True) -> torch.Tensor:
        seen.append(("again" if torch.is_grad_enabled() else "first", ids.get(training=training).item()))
        return x * x

    x = torch.ones(1, requires_grad=True)
    outputs = []
    for number in (1.0, 2.0):
        ids.begin(torch.tensor(number))
        outputs.append(checkpoint(layer, False, x))
    ids.begin(torch.tensor(3.0))
    with torch.no_grad():
        checkpoint(lambda x: layer(x, training=False), False, x)
    for output in outputs:
        output.backward()
    return seen


def test_backward_passes_see_the_micro_batches_in_their_order() -> None:
    (seen,) = run_ranks(micro_batches_seen, 1)
    assert seen == [("first", 1.0), ("first", 2.0), ("first", 3.0), ("again", 1.0), ("again", 2.0)]
