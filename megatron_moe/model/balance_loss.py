"""The balance losses of DeepSeekMoE and DeepSeek-V2: pure functions of affinities and selections.

A rank may hold only a slice of each sequence (sequence or context parallelism). Selections are counted over the whole
sequence and affinities over the slice; the losses are linear in the affinities, so the ranks' losses and gradients add
up to those of the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingStatistics:
    """What the losses are made of, for each sequence.

    Attributes:
        load: f of equation 13: share of the sequence's selections on each expert, 1 if uniform, [b, num_experts].
        affinity: P of equation 14: mean affinity of the sequence to each expert, [b, num_experts]; of a slice, that
            slice's part of the mean.
        sequence_length: tokens of the whole sequence (T).
    """

    load: Tensor
    affinity: Tensor
    sequence_length: int


def selections_per_sequence(routing_map: Tensor) -> Tensor:
    """Selections of each expert by each sequence, [b, num_experts] float32, of a routing map [s, b, num_experts]."""
    return routing_map.sum(dim=0, dtype=torch.float32)


def tokens_sent_per_sequence(routing_map: Tensor, num_groups: int) -> Tensor:
    """Tokens of each sequence with at least one expert on each device, [b, d] float32, of [s, b, num_experts]."""
    on_device = routing_map.unflatten(-1, (num_groups, -1)).any(dim=-1)
    return on_device.sum(dim=0, dtype=torch.float32)


def routing_statistics(affinities: Tensor, selections: Tensor, *, topk: int, sequence_length: int) -> RoutingStatistics:
    """Load and affinity of each expert, for each sequence.

    Args:
        affinities: softmax over all routed experts, [s, b, num_experts], float32; s may be a slice of the sequence.
        selections: tokens of the whole sequence that selected each expert, [b, num_experts], float32.
        topk: routed experts per token (K').
        sequence_length: tokens of the whole sequence (T).

    Returns:
        Gradient flows through `affinity` only: selections are counts.

    Raises:
        ValueError: affinities and selections are of different sequences or experts.

    Source: DeepSeekMoE, arXiv:2401.06066, equations 13 and 14.
    """
    if affinities.shape[1:] != selections.shape:
        raise ValueError(f"affinities {tuple(affinities.shape)} do not match selections {tuple(selections.shape)}")
    num_experts = selections.shape[-1]
    return RoutingStatistics(
        load=selections * (num_experts / (topk * sequence_length)),
        affinity=affinities.sum(dim=0) / sequence_length,
        sequence_length=sequence_length,
    )


def expert_balance_loss(statistics: RoutingStatistics) -> Tensor:
    """Expert-level balance loss without its factor: mean over sequences. It is 1 for uniform routing.

    Source: DeepSeekMoE, arXiv:2401.06066, equation 12.
    """
    return (statistics.load * statistics.affinity).sum(dim=-1).mean()


def device_balance_loss(statistics: RoutingStatistics, *, num_groups: int) -> Tensor:
    """Device-level balance loss without its factor: mean over sequences. It is 1 for uniform routing.

    Args:
        statistics: of routing_statistics.
        num_groups: D, contiguous groups of experts; it divides the number of experts.

    Source: DeepSeekMoE, arXiv:2401.06066, equations 15 to 17.
    """
    load = statistics.load.unflatten(-1, (num_groups, -1)).mean(dim=-1)  # [b, d]
    affinity = statistics.affinity.unflatten(-1, (num_groups, -1)).sum(dim=-1)  # [b, d]
    return (load * affinity).sum(dim=-1).mean()


def communication_balance_loss(statistics: RoutingStatistics, sent: Tensor, *, limit: int) -> Tensor:
    """Communication balance loss without its factor: mean over sequences.

    It is 1 for uniform routing with each token on exactly `limit` devices.

    Args:
        statistics: of routing_statistics.
        sent: tokens of the whole sequence that were sent to each device, [b, d], float32.
        limit: M, the devices a token may go to.

    Source: DeepSeek-V2, arXiv:2405.04434, equations 29 to 31.
    """
    num_groups = sent.shape[-1]
    load = sent * (num_groups / (limit * statistics.sequence_length))  # [b, d]
    affinity = statistics.affinity.unflatten(-1, (num_groups, -1)).sum(dim=-1)  # [b, d]
    return (load * affinity).sum(dim=-1).mean()
