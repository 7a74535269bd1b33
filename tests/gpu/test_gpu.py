"""What only a GPU can show. Skipped without one."""

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import train_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: NCCL and CUDA kernels"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_gpu_learns(precision: str) -> None:
    (result,) = run_ranks(train_tiny, 1, [f"precision={precision}"])
    losses = [m["train/lm_loss"] for m in result["metrics"]]
    assert sum(losses[-3:]) < sum(losses[:3])
