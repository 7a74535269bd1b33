"""Routed experts as few large matrix products instead of a loop over experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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

ALIGNMENT = 16  # of an expert's rows, by padding: oneDNN compiles each shape once, and remembers some
ROWS_OF_A_CALL = 64  # rows that take as long as what else a product of a single expert costs


class GroupedExperts(MegatronModule):
    """The local experts of a layer, without bias, in place of megatron-core's `SequentialMLP`.

    Of each expert's tokens as many as suit most experts go into one batched product; what fuller experts have beyond is
    a product for itself. Gradients of weights are added to `main_grad` where the data-parallel wrapper has made one, as
    in megatron-core's fused accumulation (0.16.1, tensor_parallel/layers.py:560).

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
        rows = Rows.of(tokens_per_expert.cpu(), permuted_probs.device)
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, rows, self.weight1, self.weight2), None

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


@dataclass(frozen=True)
class Rows:
    """Where the experts' tokens lie in a padded tensor.

    Attributes:
        shape: experts, and rows of each, of the batched product, which comes first in the padded tensor.
        singles: expert, and its first and last row, of the products of single experts.
        source: [padded], the token that each row is; of padding, any.
        is_token: [padded], whether it is none of the padding.
        place: [n], the row of each token.
    """

    shape: tuple[int, int]
    singles: list[tuple[int, int, int]]
    source: Tensor
    is_token: Tensor
    place: Tensor

    @classmethod
    def of(cls, tokens_per_expert: Tensor, device: torch.device) -> Rows:
        """Of the local experts' numbers of tokens, [local experts]."""
        counts = tokens_per_expert
        first = counts.cumsum(0) - counts
        batched = _batched_rows(counts)
        index = torch.arange(batched)
        blocks = [(first[:, None] + index).flatten()]
        valid = [(index < counts[:, None]).flatten()]
        singles, end = [], len(counts) * batched
        for expert in (counts > batched).nonzero().flatten().tolist():
            rest = int(counts[expert]) - batched
            index = torch.arange(_rounded(rest))
            blocks.append(first[expert] + batched + index)
            valid.append(index < rest)
            singles.append((expert, end, end + len(index)))
            end += len(index)
        source, is_token = torch.cat(blocks), torch.cat(valid)
        place = torch.empty(int(counts.sum()), dtype=torch.long)
        place[source[is_token]] = is_token.nonzero().flatten()
        source.clamp_(max=max(0, len(place) - 1))
        return cls((len(counts), batched), singles, *(part.to(device) for part in (source, is_token, place)))

    def parts(self) -> Iterator[tuple[slice | int, slice, tuple[int, ...]]]:
        """Experts, their rows, and the leading axes of these, of each product."""
        if self.shape[1]:
            yield slice(None), slice(0, self.shape[0] * self.shape[1]), self.shape
        for expert, start, stop in self.singles:
            yield expert, slice(start, stop), (stop - start,)


def _batched_rows(counts: Tensor) -> int:
    """Rows of each expert in the batched product that make for the least work."""
    fullest = _rounded(int(counts.max()))
    choices = torch.arange(0, fullest + 1, ALIGNMENT)
    beyond = (counts - choices[:, None]).clamp_min(0)
    work = len(counts) * choices + (beyond + ROWS_OF_A_CALL * (beyond > 0)).sum(1)
    return int(choices[work.argmin()])


def _rounded(rows: int) -> int:
    return -(-rows // ALIGNMENT) * ALIGNMENT


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, tokens: Tensor, probs: Tensor, rows: Rows, weight1: Parameter, weight2: Parameter
    ) -> Tensor:
        hidden = _products(rows, _padded(tokens, rows), weight1.mT)
        ctx.save_for_backward(tokens, probs, hidden)
        ctx.rows, ctx.weights = rows, (weight1, weight2)
        gate, up = hidden.chunk(2, dim=-1)
        gated = (F.silu(gate).mul_(up) * _padded_probs(probs, rows)).to(tokens.dtype)
        return _products(rows, gated, weight2.mT).index_select(0, rows.place)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, probs, hidden = ctx.saved_tensors
        rows, (weight1, weight2) = ctx.rows, ctx.weights
        gradient, probs = _padded(gradient, rows), _padded_probs(probs, rows)
        gate, up = hidden.chunk(2, dim=-1)
        activated = F.silu(gate)
        swiglu = activated * up
        of_weight2 = _weight_gradient(rows, gradient, (swiglu * probs).to(tokens.dtype), weight2)
        of_gated = _products(rows, gradient, weight2)
        of_probs = (of_gated.to(probs.dtype) * swiglu).sum(-1)
        of_swiglu = (of_gated * probs).to(tokens.dtype)
        of_hidden = torch.empty_like(hidden)
        of_gate, of_up = of_hidden.chunk(2, dim=-1)
        torch.mul(of_swiglu, activated, out=of_up)
        torch.ops.aten.silu_backward(of_swiglu.mul_(up), gate, grad_input=of_gate)
        of_weight1 = _weight_gradient(rows, of_hidden, _padded(tokens, rows), weight1)
        of_tokens = _products(rows, of_hidden, weight1).index_select(0, rows.place)
        return of_tokens, of_probs.index_select(0, rows.place), None, of_weight1, of_weight2


def _padded(values: Tensor, rows: Rows) -> Tensor:
    return values.index_select(0, rows.source)


def _padded_probs(probs: Tensor, rows: Rows) -> Tensor:
    """[padded, 1]; 0 for padding, so that nothing comes of it."""
    return (_padded(probs, rows) * rows.is_token)[:, None]


def _products(rows: Rows, values: Tensor, matrices: Tensor) -> Tensor:
    """Of each expert's rows of [padded, in] with its matrix of [experts, in, out]: [padded, out]."""
    result = values.new_empty(len(values), matrices.shape[-1])
    for expert, part, shape in rows.parts():
        torch.matmul(values[part].view(*shape, -1), matrices[expert], out=result[part].view(*shape, -1))
    return result


def _weight_gradient(rows: Rows, outputs: Tensor, inputs: Tensor, weight: Parameter) -> Tensor:
    """From the gradients of the experts' outputs [padded, out] and their inputs [padded, in].

    It is added to `main_grad`, if there is one; what is returned is then to be ignored.
    """
    has_main = hasattr(weight, "main_grad")
    total = weight.main_grad if has_main else torch.zeros_like(weight)
    for expert, part, shape in rows.parts():
        gradient, values = outputs[part].view(*shape, -1).mT, inputs[part].view(*shape, -1)
        if total.dtype is not values.dtype:
            _add(total[expert], gradient @ values)
        elif len(shape) > 1:
            total.baddbmm_(gradient, values)
        else:
            total[expert].addmm_(gradient, values)
    weight.grad_added_to_main_grad = has_main
    return torch.empty_like(weight) if has_main else total


def _add(total: Tensor, addend: Tensor) -> None:
    """Of another type: a matrix at a time, as torch first converts all of what it adds."""
    if total.dim() == 2:
        total.add_(addend)
        return
    for matrix, values in zip(total, addend, strict=True):
        matrix.add_(values)
