"""Communication while something is computed changes no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe.checkpoint.run_folder import read_json
from tests.distributed.test_forced_routing import trained
from tests.distributed.test_recompute import compare, first_step
from tests.helpers.ranks import run_ranks
from tests.helpers.saving import small_run


def test_saved_weights_are_whole(tmp_path: Path) -> None:
    """And losses are the same. Red: no `gather_weights` in train/loop.py."""
    tensors, losses = [], []
    for name in ("plain", "overlapped"):
        folder = tmp_path / name
        overlap = [f"overlap.overlap_param_gather={name == 'overlapped'}"]
        options = [f"run.dir={folder}", f"run.name={name}", "train.train_steps=3", "checkpoint.save_interval=1"]
        said = run_ranks(trained, 2, [*options, "parallel=dp2", *overlap])
        assert [error for _, error in said] == ["", ""]
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/lm_loss"] for line in logged])
        files = read_json(folder / "checkpoints/step_00000002/manifest.json")["files"]
        tensors.append({file: entry for file, entry in files.items() if file.endswith(".distcp")})
    assert losses[0] == losses[1]
    assert tensors[0] == tensors[1]
    assert tensors[0]


def test_shared_experts_compute_while_tokens_are_on_their_way() -> None:
    """In another order: gradients of router and shared experts are added up the other way round."""
    ranks = run_ranks(first_step, 2, ["parallel=ep2", "overlap.moe_shared_expert_overlap=true"])
    plain = run_ranks(first_step, 2, ["parallel=ep2"])
    compare(ranks, plain)
    assert plain[0]["calls"]["mlp.shared_experts"] > 0
    assert ranks[0]["calls"]["mlp.shared_experts"] == 0  # its parts are called by the dispatcher


class Event:
    """A CUDA event where all has happened."""

    def record(self, stream: Any = None) -> None:
        """Nothing to mark."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""


def merged_step(overrides: list[str]) -> dict[str, Any]:
    """`first_step` by megatron-core's schedule of two micro batches at once, which asks for a GPU."""
    from megatron_moe.model import build
    from megatron_moe.train.step import Pipeline

    torch.cuda.Event = Event
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: None
    torch.Tensor.record_stream = lambda tensor, stream: None
    build.check_accelerators = lambda config, accelerators: None
    planned = []

    def forward_step(self: Pipeline, *args: Any, **options: Any) -> Any:
        planned.append(options)
        return original(self, *args, **options)

    original, Pipeline._forward_step = Pipeline._forward_step, forward_step
    return {**first_step(overrides), "planned": planned}


def test_two_micro_batches_at_once() -> None:
    overrides = ["parallel=ep2", "precision=bf16"]
    ranks = run_ranks(merged_step, 2, [*overrides, "overlap.overlap_moe_expert_parallel_comm=true"])
    assert ranks[0]["planned"] == 2 * [{"return_schedule_plan": True}]
    compare(ranks, run_ranks(first_step, 2, overrides))


def gradient_types(overrides: list[str]) -> set[torch.dtype]:
    with small_run("dp2", "without_checkpoints", *overrides) as (run, step):
        assert np.isfinite(step())
        return {buffer.grad_dtype for buffer in run.pipeline.model[0].buffers}


def test_gradients_are_summed_in_bf16_only_if_asked_for() -> None:
    asked = ["precision=bf16", "precision.grad_reduce_in_fp32=false"]
    assert run_ranks(gradient_types, 2, asked)[0] == {torch.bfloat16}
    assert run_ranks(gradient_types, 2, asked[:1])[0] == {torch.float32}
