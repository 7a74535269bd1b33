"""megatron-core 0.16.1 without Transformer Engine, on CPUs and GPUs alike.

tests/distributed/test_workarounds.py leaves each entry out in turn and goes red when megatron-core no longer needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def install() -> None:
    """Apply every work-around. Idempotent."""
    for apply in WORKAROUNDS.values():
        apply()


class ReplicatedLinear(torch.nn.Linear):
    """Transformer Engine's linear in its `duplicated` mode: the same weight on all tensor-parallel ranks.

    Latent attention's down-projections need it. megatron-core cuts them into columns where Transformer Engine is
    absent, and its backward then drops the other ranks' part of the gradient of the rotary key
    (multi_latent_attention.py:587).
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **unused: Any) -> None:
        super().__init__(input_size, output_size, bias=False, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, input: Tensor) -> tuple[Tensor, None]:
        """Project, [s, b, input_size] to [s, b, output_size] and no bias."""
        return super().forward(input), None


def _router_gemm() -> None:
    moe_utils.te_general_gemm = None


def _latent_projections() -> None:
    multi_latent_attention.TELinear = ReplicatedLinear


def _recomputed_norms() -> None:
    CheckpointWithoutOutput.__init__.__defaults__ = (None,)


WORKAROUNDS: dict[str, Callable[[], None]] = {
    "router_gemm": _router_gemm,
    "latent_projections": _latent_projections,
    "recomputed_norms": _recomputed_norms,
}
