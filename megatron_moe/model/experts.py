"""Routed experts with SwiGLU, a few at a time, forward and backward."""

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

from megatron_moe.model.expert_rows import ExpertRows, Part, expert_rows


class GroupedExperts(MegatronModule):
    """The local experts of a layer, without bias, in place of megatron-core's `SequentialMLP`.

    How the products of experts with different numbers of tokens are computed is up to model/expert_rows.py.
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

    def forward(self, tokens: Tensor, routing: Tensor, gates: Tensor) -> tuple[Tensor, None]:
        """SwiGLU of each expert, times the gate value of each token.

        megatron-core's dispatchers give the tokens of each expert, `LocalDispatcher` tokens as they are.

        Args:
            tokens: [n, h], those of the first local expert, then of the second, ...; or [tokens, h].
            routing: [local experts], how many tokens each has; or [tokens, local experts] bool, who selected whom.
            gates: [n], gate values; or [tokens, local experts].

        Returns:
            [n, h] in the same order; or [tokens, h], the sums over the experts of a token. And no bias.
        """
        width = self.weight2.shape[-1]
        if routing.dim() == 1:
            return _Experts.apply(tokens, gates, expert_rows(tokens, width, routing), self.weight1, self.weight2), None
        selected = routing.T.contiguous()
        token = torch.arange(len(tokens), device=tokens.device).expand_as(selected).masked_select(selected)
        gates = gates.T.contiguous().masked_select(selected)
        rows = expert_rows(tokens, width, selected.sum(1), token)
        return _Experts.apply(tokens, gates, rows, self.weight1, self.weight2), None

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
        ctx: FunctionCtx, tokens: Tensor, gates: Tensor, rows: ExpertRows, weight1: Parameter, weight2: Parameter
    ) -> Tensor:
        hidden, output, gate_of_row = [], rows.new_sums(tokens), rows.gather_gates(gates)
        for part in rows.parts:
            hidden.append(rows.multiply(rows.gather(tokens, part), weight1.mT, part))
            gate, up = hidden[-1].chunk(2, dim=-1)
            gated = (F.silu(gate).mul_(up) * gate_of_row[part.rows]).to(tokens.dtype)
            rows.scatter_add(output, rows.multiply(gated, weight2.mT, part), part)
        ctx.save_for_backward(tokens, gates, *hidden)
        ctx.rows, ctx.weights = rows, (weight1, weight2)
        return output.to(tokens.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, gates, *hidden = ctx.saved_tensors
        rows, (weight1, weight2) = ctx.rows, ctx.weights
        of_weights = [_WeightGradient(rows, weight) for weight in (weight1, weight2)]
        of_tokens, gate_of_row = rows.new_sums(tokens), rows.gather_gates(gates)
        of_gates = torch.empty_like(gate_of_row)
        for part, of_part in zip(rows.parts, hidden, strict=True):
            of_output, gate_values = rows.gather(gradient, part), gate_of_row[part.rows]
            gate, up = of_part.chunk(2, dim=-1)
            activated = F.silu(gate)
            swiglu = activated * up
            of_weights[1].add(of_output, (swiglu * gate_values).to(tokens.dtype), part)
            of_gated = rows.multiply(of_output, weight2, part)
            torch.sum(of_gated.to(gates.dtype) * swiglu, -1, keepdim=True, out=of_gates[part.rows])
            of_swiglu = (of_gated * gate_values).to(tokens.dtype)
            of_hidden = torch.empty_like(of_part)
            of_gate, of_up = of_hidden.chunk(2, dim=-1)
            torch.mul(of_swiglu, activated, out=of_up)
            torch.ops.aten.silu_backward(of_swiglu.mul_(up), gate, grad_input=of_gate)
            of_weights[0].add(of_hidden, rows.gather(tokens, part), part)
            rows.scatter_add(of_tokens, rows.multiply(of_hidden, weight1, part), part)
        returned = (of_weight.finish() for of_weight in of_weights)
        return of_tokens.to(tokens.dtype), rows.scatter_gates(of_gates[:, 0]), None, *returned


class _WeightGradient:
    """Added to `main_grad`, if there is one; what is returned is then to be ignored."""

    def __init__(self, rows: ExpertRows, weight: Parameter) -> None:
        self.rows, self.weight, self.has_main = rows, weight, hasattr(weight, "main_grad")
        self.total = weight.main_grad if self.has_main else torch.empty_like(weight)
        self.is_stale = weight.main_grad_is_stale or not self.has_main

    def add(self, outputs: Tensor, inputs: Tensor, part: Part) -> None:
        """From the gradients of a part's outputs, and its inputs."""
        self.rows.add_weight_gradient(self.total, outputs, inputs, part, is_stale=self.is_stale)

    def finish(self) -> Tensor:
        """What autograd wants."""
        self.weight.grad_added_to_main_grad, self.weight.main_grad_is_stale = self.has_main, False
        return torch.empty_like(self.weight) if self.has_main else self.total
