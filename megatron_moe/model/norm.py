"""RMSNorm for where Transformer Engine is absent."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import FunctionCtx


class RMSNorm(torch.nn.RMSNorm):
    """Torch's RMSNorm with the interface of megatron-core's norms.

    megatron-core's own wrapper (0.16.1, torch_norm.py:32) refuses sequence parallelism, where each tensor-parallel rank
    sees a slice of the sequence: the mark on the weight makes `finalize_model_grads` sum its gradient over them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., h]. On CPUs torch has no kernel for it and keeps a second copy for the backward pass."""
        return super().forward(x) if x.is_cuda else _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """In float32, as torch's: y = w x r with r = (mean(x^2) + eps)^-1/2."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        products = (gradient.float() * x).flatten(0, -2)  # [n, h]
        of_weight = products.T.mv(scale.flatten())
        of_scale = products.mv(weight.float()).view_as(scale)
        of_x = (gradient * scale).mul_(weight)
        of_x.addcmul_(x, of_scale.mul_(scale.pow(3)).div_(-x.shape[-1]))
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None
