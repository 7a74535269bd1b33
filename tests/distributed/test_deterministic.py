"""`train.deterministic` on a CPU, where everything is deterministic anyway."""

import os
from pathlib import Path

import numpy as np
import pytest
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


def numbers(layout: str, *overrides: str) -> list:
    ranks = run_ranks(train_tiny, 2, [f"parallel={layout}", *overrides], 5)
    return [
        [[m["train/lm_loss"], m["train/grad_norm"], *np.ravel(m["moe/expert_load"])] for m in rank["metrics"]]
        for rank in ranks
    ]


@pytest.mark.parametrize("layout", ["ep2", "pp2", "dp2"])
def test_no_number_changes(layout: str) -> None:
    assert numbers(layout, "train.deterministic=true") == numbers(layout)


def test_tensor_parallel_embeddings_add_up_in_another_order() -> None:
    """megatron-core 0.16.1, tensor_parallel/layers.py:283: an index's gradient instead of an embedding's."""
    np.testing.assert_allclose(numbers("tp2_ep2", "train.deterministic=true"), numbers("tp2_ep2"), rtol=1e-6)


def test_a_run_says_what_it_switched(tmp_path: Path) -> None:
    short = [*TINY, "train.train_steps=2", "logger.log_interval=1", "evaluation.num_samples=8", "run.name=a"]
    result = run_cli("pretrain.py", *short, "debug=deterministic", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("kernels")]
    assert "deterministic: torch.use_deterministic_algorithms" in line
    assert all(f"{name}={value}" in line for name, value in SWITCHED.items())
    assert len(metrics_of(tmp_path / "runs" / "a")) == 2
