"""megatron-core's top-k router with the balance losses of DeepSeekMoE."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.model.balance_loss import (
    device_balance_loss,
    expert_balance_loss,
    routing_statistics,
    selections_per_sequence,
)


@dataclass(frozen=True)
class BalanceLossConfig:
    """Factors alpha 1 and alpha 2 of the paper, and the number of device groups D."""

    expert_factor: float
    device_factor: float
    num_device_groups: int


class DeepSeekMoERouter(TopKRouter):
    """Softmax over all routed experts, then top-k, with the balance losses added to the gradient.

    Both losses are per sequence and count the experts that the token is really sent to. What was routed since
    `reset_statistics` is kept for logging, of training forwards only.

    Attributes:
        tokens_per_expert: selections of each expert by this rank's tokens, [num_experts], float32.
        balance_losses: this rank's expert-level and device-level loss with their factors, summed over micro batches,
            [2], float32. Summed over the tensor- and context-parallel ranks they are the losses of whole sequences.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        balance: BalanceLossConfig,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.balance = balance
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Forget what was routed so far. The tensors are no buffers, which a bf16 model would round to bf16."""
        self.tokens_per_expert = torch.zeros(self.num_experts, device=self.weight.device)
        self.balance_losses = torch.zeros(2, device=self.weight.device)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Select experts, [s, b, num_experts] logits to [s * b, num_experts] probs and routing map."""
        probs, routing_map = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            probs = self._add_balance_losses(probs, logits, routing_map.view_as(logits))
        return probs, routing_map

    def _add_balance_losses(self, probs: Tensor, logits: Tensor, routing_map: Tensor) -> Tensor:
        selections = selections_per_sequence(routing_map)
        self.tokens_per_expert += selections.sum(dim=0)
        dist.all_reduce(selections, group=self.tp_cp_group)
        statistics = routing_statistics(
            logits.softmax(dim=-1, dtype=torch.float32),
            selections,
            topk=self.topk,
            sequence_length=logits.shape[0] * self.tp_cp_group.size(),
        )
        expert_loss = self.balance.expert_factor * expert_balance_loss(statistics)
        device_loss = self.balance.device_factor * device_balance_loss(
            statistics, num_groups=self.balance.num_device_groups
        )
        self.balance_losses += torch.stack((expert_loss.detach(), device_loss.detach()))
        return MoEAuxLossAutoScaler.apply(probs, expert_loss + device_loss)


def router_builder(balance: BalanceLossConfig) -> partial[DeepSeekMoERouter]:
    """What megatron-core's `MoESubmodules.router` takes."""
    return partial(DeepSeekMoERouter, balance=balance)
