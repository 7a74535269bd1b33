"""Routed experts as few large matrix products instead of a loop over experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import Parameter

from megatron_moe.model.expert_products import Products, products_of


class GroupedExperts(MegatronModule):
    """The local experts of a layer, without bias, in place of megatron-core's `SequentialMLP`.

    How the products of experts with different numbers of tokens are computed is up to model/expert_products.py.
    Gradients of weights are added to `main_grad` where the data-parallel wrapper has made one, as in megatron-core's
    fused accumulation (0.16.1, tensor_parallel/layers.py:560).

    Attributes:
        weight1: [local experts, 2 x f, h], of each the gate and then the up projection, cut over expert tensor
            parallel ranks.
        weight2: [local experts, h, f], the down projections, likewise.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // self.tp_group.size()
        self.weight1 = self._weight(num_local_experts, 2 * width, hidden, tp_axis=1)
        self.weight2 = self._weight(num_local_experts, hidden, width, tp_axis=2)

    def _weight(self, *shape: int, tp_axis: int) -> Parameter:
        weight = Parameter(torch.empty(*shape, dtype=self.config.params_dtype))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=tp_axis, stride=1)
        weight.allreduce = self.ep_group.size() == 1  # else its gradient is of the ranks with the same experts
        weight.main_grad_is_stale = False  # distributed/in_place.py sets it instead of filling `main_grad` with 0
        return weight

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """SwiGLU of each expert, times the gate value of each token.

        Args:
            permuted_local_hidden_states: [n, h], the tokens of the first local expert, then of the second, ...
            tokens_per_expert: [local experts]; their sum is n.
            permuted_probs: [n], gate values.

        Returns:
            [n, h] in the same order, and no bias.
        """
        products = products_of(tokens_per_expert, permuted_local_hidden_states)
        output = _Experts.apply(permuted_local_hidden_states, permuted_probs, products, self.weight1, self.weight2)
        return output, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Under the names that megatron-core gives to the weights of each expert (0.16.1, moe/experts.py:935)."""
        return {
            f"{prefix}weight{i}": ShardedTensorFactory(
                f"{prefix}experts.linear_fc{i}.weight",
                weight,
                build_fn=lambda *part, i=i: self._parts(i, sharded_offsets, *part),
                merge_fn=lambda parts, shape=weight.shape: torch.cat([part.flatten() for part in parts]).view(shape),
                replica_id=(0, 0, self.dp_group.rank()),
            )
            for i, weight in ((1, self.weight1), (2, self.weight2))
        }

    def _parts(
        self, i: int, sharded_offsets: tuple, key: str, weight: Tensor, replica_id: ReplicaId, _: Any
    ) -> list[ShardedTensor]:
        """Each expert's own, of `weight1` the gate and the up projection for themselves."""
        first, count = self.ep_group.rank() * len(weight), self.ep_group.size() * len(weight)
        parts = []
        for expert, matrix in enumerate(weight.detach(), start=first):
            offsets = (*sharded_offsets, (len(sharded_offsets), expert, count))
            axis = len(offsets) + i - 1
            cut = (axis, self.tp_group.rank(), self.tp_group.size())
            part = ShardedTensor.from_rank_offsets(
                key, matrix, *offsets, cut, replica_id=replica_id, prepend_axis_num=len(offsets)
            )
            parts += apply_swiglu_sharded_factory(part, offsets).build() if i == 1 else [part]
        return parts


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, tokens: Tensor, probs: Tensor, products: Products, weight1: Parameter, weight2: Parameter
    ) -> Tensor:
        hidden = products.multiply(products.pad(tokens), weight1.mT)
        ctx.save_for_backward(tokens, probs, hidden)
        ctx.products, ctx.weights = products, (weight1, weight2)
        gate, up = hidden.chunk(2, dim=-1)
        gated = (F.silu(gate).mul_(up) * products.pad_probs(probs)).to(tokens.dtype)
        return products.unpad(products.multiply(gated, weight2.mT))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, probs, hidden = ctx.saved_tensors
        products, (weight1, weight2) = ctx.products, ctx.weights
        gradient, probs = products.pad(gradient), products.pad_probs(probs)
        gate, up = hidden.chunk(2, dim=-1)
        activated = F.silu(gate)
        swiglu = activated * up
        of_weight2 = _weight_gradient(products, gradient, (swiglu * probs).to(tokens.dtype), weight2)
        of_gated = products.multiply(gradient, weight2)
        of_probs = (of_gated.to(probs.dtype) * swiglu).sum(-1)
        of_swiglu = (of_gated * probs).to(tokens.dtype)
        of_hidden = torch.empty_like(hidden)
        of_gate, of_up = of_hidden.chunk(2, dim=-1)
        torch.mul(of_swiglu, activated, out=of_up)
        torch.ops.aten.silu_backward(of_swiglu.mul_(up), gate, grad_input=of_gate)
        of_weight1 = _weight_gradient(products, of_hidden, products.pad(tokens), weight1)
        of_tokens = products.unpad(products.multiply(of_hidden, weight1))
        return of_tokens, products.unpad(of_probs), None, of_weight1, of_weight2


def _weight_gradient(products: Products, outputs: Tensor, inputs: Tensor, weight: Parameter) -> Tensor:
    """From the gradients of the experts' outputs and their inputs, both padded.

    It is added to `main_grad`, if there is one; what is returned is then to be ignored.
    """
    has_main = hasattr(weight, "main_grad")
    total = weight.main_grad if has_main else torch.empty_like(weight)
    products.add_weight_gradient(total, outputs, inputs, is_stale=weight.main_grad_is_stale or not has_main)
    weight.grad_added_to_main_grad, weight.main_grad_is_stale = has_main, False
    return torch.empty_like(weight) if has_main else total
