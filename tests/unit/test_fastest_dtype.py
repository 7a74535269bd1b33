"""bf16 is chosen where it is faster."""

import os

import pytest

from megatron_moe import precision
from megatron_moe.config.load import compose_config
from megatron_moe.config.schema import Dtype


@pytest.mark.parametrize(
    ("num_gpus", "speedup", "dtype"), [(0, 1.4, Dtype.fp32), (0, 1.5, Dtype.bf16), (1, None, Dtype.bf16)]
)
def test_auto_chooses_what_is_faster(
    num_gpus: int, speedup: float | None, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(precision, "_num_gpus", lambda: num_gpus)
    monkeypatch.setattr(precision, "_speedup_of_bf16", lambda size: asked.append(size) or speedup)
    monkeypatch.setenv(precision.FASTEST_DTYPE, "")
    monkeypatch.delenv(precision.FASTEST_DTYPE)
    for _ in range(2):
        assert compose_config(["precision=auto", "model.hidden_size=96"]).precision.dtype is dtype
    assert asked == ([] if num_gpus else [96])  # once
    assert os.environ[precision.FASTEST_DTYPE] == dtype.value  # which workers are told


def test_a_product_is_measured() -> None:
    assert 0.01 < precision._speedup_of_bf16(64) < 100
