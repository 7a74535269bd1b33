"""RMSNorm for where Transformer Engine is absent."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Torch's RMSNorm with the interface of megatron-core's norms.

    megatron-core's own wrapper (0.16.1, torch_norm.py:32) refuses sequence parallelism, where each tensor-parallel rank
    sees a slice of the sequence: the mark on the weight makes `finalize_model_grads` sum its gradient over them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
