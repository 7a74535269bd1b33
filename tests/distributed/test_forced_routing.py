"""Routing for measurements: exact loads, a gradient, and a mark on everything that comes of it."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint.compatibility import check_same_model, check_same_run
from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import ForcedRouting, ModelConfig
from megatron_moe.hugging_face.config import to_hf_config
from megatron_moe.metrics import wandb_run
from megatron_moe.model.selection import forced_experts
from tests.helpers.ranks import run_ranks
from tests.helpers.saving import SMALL
from tests.helpers.training import tiny_config, tiny_run

FORCED = "model.forced_routing"


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "topk"), [(8, 2, 2), (8, 4, 3), (63, 7, 7), (64, 1, 6), (8, 4, 8)]
)
def test_experts_take_turns(num_experts: int, num_ranks: int, topk: int) -> None:
    for num_tokens in (1, 17, 8 * 63 * 64):
        for is_skewed in (False, True):
            experts = forced_experts(num_tokens, num_experts, topk, num_ranks=num_ranks, is_skewed=is_skewed)
            assert (experts.sort(dim=1).values.diff(dim=1) > 0).all()  # all of a token are different
            in_turn = max(topk, num_experts // num_ranks) if is_skewed else num_experts
            loads = experts.flatten().bincount(minlength=num_experts)
            assert loads[:in_turn].max() - loads[:in_turn].min() <= 1
            assert loads[in_turn:].sum() == 0


def test_balanced_tokens_go_from_rank_to_rank() -> None:
    experts = forced_experts(4, 8, 2, num_ranks=2, is_skewed=False)
    assert experts.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def routed(forced: str) -> dict[str, Any]:
    """On each rank, of one step: loads, tokens at the experts, the router's gradient."""
    from megatron_moe.train.step import train_step
    from megatron_moe.train.step_metrics import step_metrics

    at_experts = 0
    overrides = ["run.dir=without_checkpoints", "parallel=ep2", f"{FORCED}={forced}", "model.expert_balance_factor=0"]
    with tiny_run(overrides) as (run, batches, num_micro_batches):

        def count(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            nonlocal at_experts
            at_experts += len(args[0])

        for name, module in run.pipeline.model[0].named_modules():
            if name.endswith("mlp.experts"):
                module.register_forward_pre_hook(count)
        result = train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
        metrics = step_metrics(run.config, run.context, run.pipeline.model, result)
        gradients = [router.weight.main_grad.abs().sum().item() for router in run.pipeline.routers]
        return {"load": metrics["moe/expert_load"], "at_experts": at_experts, "gradients": gradients}


@pytest.mark.parametrize(
    ("forced", "loads", "shares"),
    [("balanced", 8 * [1.0], (0.5, 0.5)), ("skewed", [*4 * [2.0], *4 * [0.0]], (1.0, 0.0))],
)
def test_loads_are_exact(forced: str, loads: list[float], shares: tuple[float, float]) -> None:
    ranks = run_ranks(routed, 2, forced)
    assert ranks[0]["load"] == 3 * [loads]
    total = 8 * 32 * 2 * 3  # sequences x tokens x top-k x layers
    assert tuple(rank["at_experts"] / total for rank in ranks) == shares
    assert all(gradient > 0 for gradient in ranks[0]["gradients"])


def trained(overrides: list[str]) -> tuple[str, str]:
    """What `train` says, and its error."""
    import os

    from megatron_moe.distributed.context import distributed
    from megatron_moe.train.loop import train

    said = io.StringIO()
    config = tiny_config(*SMALL, *overrides, world_size=int(os.environ["WORLD_SIZE"]))
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    try:
        with (
            redirect_stdout(said),
            distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context,
        ):
            train(config, context, overrides)
    except ConfigError as error:
        return said.getvalue(), "\n".join(error.problems)
    return said.getvalue(), ""


def test_every_output_is_marked_and_no_training_goes_on_from_it(tmp_path: Path) -> None:
    run = [f"run.dir={tmp_path / 'measured'}", "run.name=measured", "train.train_steps=2", "evaluation.interval=1"]
    ((said, error),) = run_ranks(trained, 1, [*run, f"{FORCED}=balanced"])
    assert error == ""
    assert "FORCED, balanced: for measurements only" in said
    numbers = [line for line in said.splitlines() if "lm_loss" in line]
    assert len(numbers) == 4
    assert all("FORCED ROUTING, balanced" in line for line in numbers)
    assert "losses of this run mean nothing" in said
    logged = [json.loads(line) for line in (tmp_path / "measured/metrics.jsonl").read_text().splitlines()]
    assert [line["moe/forced_routing"] for line in logged] == ["balanced", "balanced"]

    ((said, error),) = run_ranks(trained, 1, run)
    assert f"{FORCED}=None: {tmp_path / 'measured'} was trained with balanced; start another run" in error
    fresh = [f"run.dir={tmp_path / 'fresh'}", "run.name=fresh", f"checkpoint.init_from={tmp_path / 'measured'}"]
    ((said, error),) = run_ranks(trained, 1, fresh)
    assert f"{FORCED}=None: " in error
    assert "has balanced" in error


def test_nothing_is_forced_upon_a_training() -> None:
    normal, forced = tiny_config(), tiny_config(f"{FORCED}=balanced")
    with pytest.raises(ConfigError, match=rf"{FORCED}=balanced: .* was trained with None; start another run"):
        check_same_run(plain(normal), forced)
    old = plain(normal)
    del old["model"]["forced_routing"]  # of an earlier version
    with pytest.raises(ConfigError, match=rf"{FORCED}=balanced"):
        check_same_run(old, forced)
    check_same_run(old, normal)
    with pytest.raises(ConfigError, match=rf"{FORCED}=balanced: .* has None"):
        check_same_model(normal.model, forced.model, Path("step_00000001"))


def test_it_is_not_exported() -> None:
    model: ModelConfig = tiny_config(f"{FORCED}=balanced").model
    with pytest.raises(ConfigError, match=rf"{FORCED}=balanced: was for measurements only"):
        to_hf_config(model, 32)


def test_wandb_has_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(f"{FORCED}=skewed", "parallel=ep2", "logger.wandb_tags=[nano]", "run.name=a", world_size=2)
    given: dict[str, Any] = {}

    class Run:
        def define_metric(self, *args: Any, **options: Any) -> None:
            """Not looked at."""

    monkeypatch.setattr("wandb.init", lambda **options: given.update(options) or Run())
    wandb_run.init(config, "id", "offline")
    assert given["tags"] == ["nano", "forced-routing-skewed"]
    assert given["config"]["model"]["forced_routing"] == ForcedRouting.skewed.value
