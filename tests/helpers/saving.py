"""A run so small that it saves and loads in milliseconds, and what tests do to its checkpoints."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.helpers.training import tiny_run

SMALL = [
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=16",
    "model.num_attention_heads=2",
    "model.kv_channels=8",
    "model.vocab_size=32",
    "model.num_experts=4",
    "model.expert_ffn_hidden_size=8",
    "data.sequence_length=8",
    "train.global_batch_size=4",
    "evaluation.num_samples=4",
    "logger.log_interval=1",
]
RANKS = {"single": 1, "ep2": 2, "dp2": 2}


@contextmanager
def small_run(layout: str, folder: Path | str, *overrides: str) -> Iterator[Any]:
    """Inside a rank: a `Run` of the small model, and a function that trains it by one step."""
    from megatron_moe.train.step import train_step

    with tiny_run([*SMALL, f"parallel={layout}", f"run.dir={folder}", *overrides]) as (run, batches, num_micro_batches):

        def step() -> float:
            result = train_step(run.pipeline, run.optimizer, batches, num_micro_batches, run.guard)
            run.state.advance(run.config.train.global_batch_size)
            return result.agreement.loss

        yield run, step


def weights_digest(run: Any) -> str:
    """Of this rank's parameters and optimizer state."""
    digest = hashlib.sha256()
    for chunk in run.pipeline.model:
        for param in chunk.parameters():
            digest.update(_bytes(param))
    for part in run.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            for _, values in sorted(state.items()):
                digest.update(_bytes(values))
    return digest.hexdigest()


def _bytes(values: torch.Tensor) -> bytes:
    return values.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def replace_folder(source: Path, target: Path) -> None:
    """A copy in place of what is there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
