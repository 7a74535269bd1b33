"""`train.deterministic` on a CPU, where everything is deterministic anyway."""

import os
from pathlib import Path

import numpy as np
import torch

from megatron_moe.config.load import compose_config
from tests.helpers.cli import metrics_of, run_cli
from tests.helpers.ranks import run_ranks
from tests.helpers.training import TINY, tiny_run, train_tiny

SWITCHED = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}


def switches(overrides: list[str]) -> tuple[bool, ...]:
    """On each rank: what is switched while it trains."""
    with tiny_run(overrides) as (run, _, _):
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark,
            run.pipeline.model[0].config.deterministic_mode,
            run.pipeline.model[0].module.embedding.word_embeddings.deterministic_mode,
            SWITCHED.items() <= os.environ.items(),
        )


def test_it_switches_everything_or_nothing() -> None:
    assert compose_config(["debug=deterministic"]).train.deterministic
    assert run_ranks(switches, 1, ["train.deterministic=true"]) == [(True,) * 5]
    assert run_ranks(switches, 1, []) == [(False,) * 5]


def first_gradients(overrides: list[str]) -> dict[str, torch.Tensor]:
    from megatron_moe.train.step import train_step

    with tiny_run(["run.dir=without_checkpoints", "parallel=tp2_ep2", *overrides]) as (run, batches, num_micro_batches):
        train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
        return {name: p.main_grad.clone() for name, p in run.pipeline.model[0].named_parameters()}


def test_no_gradient_changes() -> None:
    """Of the first step, but for the order in which megatron-core's embedding adds its up (0.16.1, layers.py:283)."""
    plain, deterministic = (run_ranks(first_gradients, 2, [f"train.deterministic={on}"]) for on in ("false", "true"))
    for before, after in zip(plain, deterministic, strict=True):
        embedding = next(name for name in before if "word_embeddings" in name)
        torch.testing.assert_close(after.pop(embedding), before.pop(embedding), rtol=1e-6, atol=1e-8)
        assert [name for name, gradient in before.items() if not torch.equal(gradient, after[name])] == []


def test_no_number_changes() -> None:
    def numbers(*overrides: str) -> list:
        ranks = run_ranks(train_tiny, 2, ["parallel=tp2_ep2", *overrides], 5)
        return [
            [[m["train/lm_loss"], m["train/grad_norm"], *np.ravel(m["moe/expert_load"])] for m in rank["metrics"]]
            for rank in ranks
        ]

    np.testing.assert_allclose(numbers("train.deterministic=true"), numbers(), rtol=1e-6)


def test_a_run_says_what_it_switched(tmp_path: Path) -> None:
    short = [*TINY, "train.train_steps=2", "logger.log_interval=1", "evaluation.num_samples=8", "run.name=a"]
    result = run_cli("pretrain.py", *short, "debug=deterministic", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("kernels")]
    assert "deterministic: torch.use_deterministic_algorithms" in line
    assert all(f"{name}={value}" in line for name, value in SWITCHED.items())
    assert len(metrics_of(tmp_path / "runs" / "a")) == 2
