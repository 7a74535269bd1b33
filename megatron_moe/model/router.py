"""Routers: megatron-core's top-k with DeepSeek's balance losses, device limit and dropping; and a fixed hash."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.config.derived import num_device_groups
from megatron_moe.config.schema import Config, ForcedRouting, ModelConfig, Routing
from megatron_moe.model.balance_loss import (
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    routing_statistics,
    selections_per_sequence,
    tokens_sent_per_sequence,
)
from megatron_moe.model.micro_batch import OfMicroBatch
from megatron_moe.model.selection import (
    forced_experts,
    hash_table,
    is_undropped,
    kept_within_budget,
    within_device_limit,
    without_top_experts,
)

BALANCE_LOSSES = ("expert", "device", "communication")
Batch = dict[str, Tensor]  # of data/sampler.py


class RoutingCounters:
    """What was routed since `reset_counters`, of training forwards only; no buffers, which a bf16 model would round.

    Attributes:
        tokens_per_expert: selections of each expert by this rank's tokens, before dropping, [num_experts], float32.
        dropped: selections that were dropped, scalar, float32.
        balance_losses: this rank's BALANCE_LOSSES with their factors, summed over micro batches, [3], float32. Summed
            over the tensor- and context-parallel ranks they are the losses of whole sequences.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.tokens_per_expert = torch.zeros(num_experts, device=device)
        self.dropped = torch.zeros((), device=device)
        self.balance_losses = torch.zeros(len(BALANCE_LOSSES), device=device)


class ExpertSelection:
    """Which experts a token selects, where megatron-core's plain top-k is not enough.

    It takes the place of the object that megatron-core asks for a recorded selection (0.16.1, moe_utils.py:689).

    Attributes:
        num_masked: experts of the highest affinity that each token is kept from, to see what they are worth.
    """

    def __init__(self, options: ModelConfig, num_groups: int, *, num_ranks: int) -> None:
        self.forced_routing = options.forced_routing
        self.num_ranks = num_ranks
        self.device_limit = options.device_limit
        self.num_groups = num_groups
        self.num_masked = 0

    def get_replay_topk(
        self, affinities: Tensor, topk: int, num_groups: None, group_topk: None, select: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """Select experts, [num_tokens, num_experts] affinities to [num_tokens, topk] affinities and indices."""
        if self.forced_routing is not None:  # `moe_router_force_load_balancing` is balanced on average only
            experts = forced_experts(
                *affinities.shape, topk, num_ranks=self.num_ranks, is_skewed=self.forced_routing is ForcedRouting.skewed
            ).to(affinities.device)
            return affinities.gather(1, experts), experts
        if self.num_masked:
            affinities = without_top_experts(affinities, self.num_masked)
        if self.device_limit is not None:
            affinities = within_device_limit(affinities, num_groups=self.num_groups, limit=self.device_limit)
        return select(affinities, topk)


class DeepSeekMoERouter(TopKRouter):
    """Softmax over all routed experts, then top-k, with the balance losses added to the gradient.

    The losses are per sequence and count the experts that a token selects, dropped or not.

    Attributes:
        counters: of training.
        selection: how experts are selected.

    Source: DeepSeekMoE, arXiv:2401.06066, equations 9 to 17; DeepSeek-V2, arXiv:2405.04434, 2.2.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        options: ModelConfig,
        num_groups: int,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.options = options
        self.num_groups = num_groups
        self.tp_ep_group = pg_collection.tp_ep
        self.selection = self.router_replay = ExpertSelection(
            options, num_groups, num_ranks=config.expert_model_parallel_size
        )
        self.sample_ids = OfMicroBatch()
        self.reset_counters()

    def reset_counters(self) -> None:
        """Forget what was routed so far."""
        self.counters = RoutingCounters(self.num_experts, self.weight.device)

    def begin_micro_batch(self, batch: Batch) -> None:
        """Take note of which sequences come next, [b]."""
        self.sample_ids.begin(batch["sample_ids"])

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Select experts, [s, b, num_experts] logits to [s * b, num_experts] probs and routing map."""
        probs, routing_map = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            probs = self._add_balance_losses(probs, logits, routing_map.view_as(logits))
        if self.training and self.options.device_capacity_factor is not None:
            probs, routing_map = self._drop(probs, routing_map, sequence_length=logits.shape[0])
        return probs, routing_map

    def _add_balance_losses(self, probs: Tensor, logits: Tensor, routing_map: Tensor) -> Tensor:
        options = self.options
        selections = selections_per_sequence(routing_map)  # [b, e]
        self.counters.tokens_per_expert += selections.sum(dim=0)
        counts = torch.cat((selections, tokens_sent_per_sequence(routing_map, self.num_groups)), dim=-1)
        dist.all_reduce(counts, group=self.tp_cp_group)
        selections, sent = counts.split((self.num_experts, self.num_groups), dim=-1)
        statistics = routing_statistics(
            logits.softmax(dim=-1, dtype=torch.float32),
            selections,
            topk=self.topk,
            sequence_length=logits.shape[0] * self.tp_cp_group.size(),
        )
        losses = [
            options.expert_balance_factor * expert_balance_loss(statistics),
            options.device_balance_factor * device_balance_loss(statistics, num_groups=self.num_groups),
            options.communication_balance_factor
            * communication_balance_loss(statistics, sent, limit=options.device_limit or self.num_groups),
        ]
        self.counters.balance_losses += torch.stack(losses).detach()
        return MoEAuxLossAutoScaler.apply(probs, sum(losses))

    def _drop(self, probs: Tensor, routing_map: Tensor, *, sequence_length: int) -> tuple[Tensor, Tensor]:
        """Drop each device's lowest affinities beyond its budget, of all tokens that are dispatched together."""
        affinity, experts = probs.detach().topk(self.topk)  # [t, k]
        token = self._token_numbers(sequence_length)
        affinity, experts, token = (self._gather(x) for x in (affinity, experts, token))
        order = token.argsort()  # the same in every layout, for equal affinities
        mean_load = affinity.numel() / self.num_groups
        keep = kept_within_budget(
            affinity[order].flatten(),
            experts[order].flatten() // (self.num_experts // self.num_groups),
            is_undropped(token[order] >> 32, self.options.undropped_fraction).repeat_interleave(self.topk),
            budget=int(self.options.device_capacity_factor * mean_load),
            num_devices=self.num_groups,
        )
        kept = torch.empty_like(experts, dtype=torch.bool)
        kept[order] = keep.view(-1, self.topk)
        mine = slice(self.tp_ep_group.rank() * len(probs), (self.tp_ep_group.rank() + 1) * len(probs))
        mask = torch.zeros_like(routing_map).scatter(1, experts[mine], kept[mine])
        if torch.is_grad_enabled():  # once, where the layer is computed again
            self.counters.dropped += (routing_map.sum() - mask.sum()).float()
        return probs * mask, routing_map & mask

    def _token_numbers(self, sequence_length: int) -> Tensor:
        """A number for each token of this rank, its sequence's in the upper and its position in the lower half, [t]."""
        first = sequence_length * self.tp_group.rank()
        sample_ids = self.sample_ids.get(training=self.training)
        positions = torch.arange(first, first + sequence_length, device=sample_ids.device)
        return ((sample_ids << 32) + positions[:, None]).flatten()  # [s, b]

    def _gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks that dispatch to the same devices."""
        size = self.tp_ep_group.size()
        if size == 1:
            return x
        gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=self.tp_ep_group)
        return gathered


class HashRouter(MegatronModule):
    """Sends each token to one expert by a fixed random table from token id to expert, another in each layer.

    The gate is 1 and nothing is learned or balanced.

    Source: Hash Layers, arXiv:2106.04426; the baseline of DeepSeekMoE, arXiv:2401.06066, table 1.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        options: ModelConfig,
    ) -> None:
        super().__init__(config=config)
        self.options = options
        self.device = torch.get_default_device()
        self.tp_group = pg_collection.tp
        self.token_ids = OfMicroBatch()
        self.reset_counters()

    def set_layer_number(self, layer_number: int) -> None:
        """Draw the layer's table, [vocab_size]; layers count from 1."""
        self.layer_number = layer_number
        table = hash_table(
            self.options.vocab_size, self.options.num_experts, seed=self.options.hash_seed, layer=layer_number
        )
        self.table = table.to(self.device)

    def reset_counters(self) -> None:
        """Forget what was routed so far."""
        self.counters = RoutingCounters(self.options.num_experts, self.device)

    def begin_micro_batch(self, batch: Batch) -> None:
        """Take note of the token ids that come next, [b, s]."""
        self.token_ids.begin(batch["tokens"])

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Select experts, [s, b, h] to [s * b, num_experts] probs and routing map."""
        token_ids = self.token_ids.get(training=self.training)
        token_ids = token_ids.T.chunk(self.tp_group.size())[self.tp_group.rank()]  # [s, b]
        experts = self.table[token_ids.flatten()]
        routing_map = torch.nn.functional.one_hot(experts, self.options.num_experts).bool()
        if self.training and torch.is_grad_enabled():
            self.counters.tokens_per_expert += routing_map.sum(dim=0)
        return routing_map.float(), routing_map


Router = DeepSeekMoERouter | HashRouter


def router_builder(config: Config) -> partial[Router]:
    """What megatron-core's `MoESubmodules.router` takes."""
    if config.model.routing is Routing.hash:
        return partial(HashRouter, options=config.model)
    return partial(DeepSeekMoERouter, options=config.model, num_groups=num_device_groups(config.model, config.parallel))
