"""Interventions on a model against models that were built that way."""

import math
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_run

OPTIONS = ["run.dir=without_checkpoints", "model.router_topk=3", "model.init_method_std=0.3"]


def interventions() -> dict[str, float]:
    from megatron_moe.train.expert_analysis import altered

    with tiny_run(OPTIONS) as (run, _, _):
        result = {"before": held_out(run)}
        with altered(run.pipeline, topk=2):
            result["two"] = held_out(run)
        with altered(run.pipeline, without_shared=True):
            result["no shared"] = held_out(run)
        with altered(run.pipeline, num_masked=2, topk=1):
            result["third best only"] = held_out(run)
        result["after"] = held_out(run)
    return result


def built_that_way(change: str) -> float:
    with tiny_run([*OPTIONS, *(["model.router_topk=2"] if change == "two" else [])]) as (run, _, _):
        for router in run.pipeline.routers:
            if change == "third best only":
                router.routing = third_best(router)
        if change == "no shared":
            for name, parameter in run.pipeline.model[0].named_parameters():
                if "shared_experts" in name:
                    parameter.data.zero_()
        return held_out(run)


def third_best(router):
    def routing(logits, padding_mask=None):
        affinity = logits.flatten(0, 1).softmax(dim=-1)
        third = affinity.argsort(dim=-1, descending=True)[:, 2:3]
        chosen = torch.zeros_like(affinity, dtype=torch.bool).scatter(1, third, value=True)
        router.config.moe_router_topk = 1
        return affinity * chosen, chosen

    return routing


def held_out(run) -> float:
    from megatron_moe.train.evaluate import held_out_loss

    return held_out_loss(run.pipeline, run.datasets.valid[0].sequences, 8, run.config.data, run.context.device)


def test_interventions() -> None:
    (ours,) = run_ranks(interventions, 1)
    assert ours["after"] == ours["before"]
    for change in ("two", "no shared", "third best only"):
        assert ours[change] == pytest.approx(run_ranks(built_that_way, 1, change)[0], rel=1e-6), change
        assert ours[change] != pytest.approx(ours["before"], rel=1e-4), change


def selections() -> tuple[list, list, float]:
    from megatron_moe.train.expert_analysis import recorded

    maps = []
    with tiny_run(OPTIONS) as (run, _, _):
        for router in run.pipeline.routers:
            router.register_forward_hook(lambda _router, _args, output: maps.append(output[1]))
        with recorded(run.pipeline) as counts:
            held_out(run)
        return counts, maps, len(run.pipeline.routers)


def test_load_and_co_activation() -> None:
    ((counts, maps, layers),) = run_ranks(selections, 1)
    assert layers == 3
    for layer in range(layers):
        expected = torch.zeros(8, 8)
        for row in torch.cat(maps[layer::layers]).tolist():
            chosen = [i for i, is_chosen in enumerate(row) if is_chosen]
            for i in chosen:
                expected[i, chosen] += 1
        assert torch.equal(counts[layer].float(), expected)
        assert counts[layer].diagonal().sum() == 3 * 8 * 32


def report_of(overrides: list[str]) -> dict:
    from megatron_moe.train.expert_analysis import analyze
    from megatron_moe.train.restore import RestoredRun

    with tiny_run([*OPTIONS, *overrides]) as (run, _, _):
        restored = RestoredRun(run.config, Path("run"), Path("step"), run.pipeline, run.context.device)
        return analyze(restored, {"valid": run.datasets.valid[0].sequences}, 8)


def test_only_what_the_device_limit_leaves_is_tried() -> None:
    """Two of four devices hold 4 of the 8 experts: 3 can be selected of them when one is masked."""
    limited = ["model.num_device_groups=4", "model.device_limit=2", "model.num_shared_experts=2"]
    (report,) = run_ranks(report_of, 1, limited)
    assert report["masked_experts"] == {"0/16": 0, "1/16": 0, "2/16": 1}
    assert "loss_with_routed_for_shared" not in report
    losses = [*report["loss_by_masked_fraction"].values(), *report["loss_by_topk"].values()]
    assert all(math.isfinite(loss) for loss in losses)
