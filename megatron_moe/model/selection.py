"""Which experts a token may select, and which selections are dropped: pure functions."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor


def within_device_limit(affinities: Tensor, *, num_groups: int, limit: int) -> Tensor:
    """Affinities with -inf outside the token's `limit` best devices; a device is as good as its best expert.

    Args:
        affinities: [num_tokens, num_experts].
        num_groups: D, contiguous groups of experts; it divides the number of experts.
        limit: M, at most D.

    Source: DeepSeek-V2, arXiv:2405.04434, 2.2.2.
    """
    by_device = affinities.unflatten(-1, (num_groups, -1))  # [t, d, e / d]
    best = by_device.amax(dim=-1).topk(limit, dim=-1).indices  # [t, m]
    allowed = torch.zeros_like(by_device[..., 0], dtype=torch.bool).scatter(-1, best, value=True)  # [t, d]
    return by_device.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)


def forced_experts(num_tokens: int, num_experts: int, topk: int, *, num_ranks: int, is_skewed: bool) -> Tensor:
    """Experts in turn, [num_tokens, topk] int64: whatever is asked for, the loads of those in turn differ by 1 at most.

    Args:
        num_tokens: that are routed together.
        num_experts: all of them.
        topk: of each token, all different.
        num_ranks: that the experts lie on in contiguous groups.
        is_skewed: take turns among the first rank's experts only, and those that follow if they are fewer than `topk`;
            else among all, from rank to rank.
    """
    if is_skewed:
        in_turn = torch.arange(max(topk, num_experts // num_ranks))
    else:
        in_turn = torch.arange(num_experts).view(num_ranks, -1).T.flatten()
    return in_turn[torch.arange(num_tokens * topk) % len(in_turn)].view(num_tokens, topk)


def without_top_experts(affinities: Tensor, count: int) -> Tensor:
    """Affinities [num_tokens, num_experts] with -inf for each token's `count` highest.

    Source: DeepSeekMoE, arXiv:2401.06066, 4.5.
    """
    return affinities.scatter(-1, affinities.topk(count, dim=-1).indices, -torch.inf)


def is_undropped(sample_ids: Tensor, fraction: float) -> Tensor:
    """Whether nothing of a sequence is dropped: the same for a sample in every layout, and spread evenly over samples.

    The multiples of the golden ratio, modulo 1, fill every interval in proportion to its length.

    Args:
        sample_ids: place of the sequence in the data, int64.
        fraction: of the sequences, below 1.

    Source of the fraction: DeepSeek-V2, arXiv:2405.04434, 2.2.4.
    """
    return (sample_ids * 2654435769) % 2**32 < fraction * 2**32


def kept_within_budget(affinity: Tensor, device: Tensor, undropped: Tensor, *, budget: int, num_devices: int) -> Tensor:
    """Which selections stay when each device drops its lowest affinities until it is within budget.

    Selections that may not be dropped count towards the budget first, and stay even if they exceed it.

    Args:
        affinity: of each selection, [n]; of equal ones the earlier is preferred.
        device: of the selected expert, [n] int64.
        undropped: whether the selection may not be dropped, [n] bool.
        budget: selections that a device takes.
        num_devices: D.

    Returns:
        [n] bool.

    Source: DeepSeek-V2, arXiv:2405.04434, 2.2.4.
    """
    order = torch.where(undropped, torch.inf, affinity).sort(descending=True, stable=True).indices
    on_device = F.one_hot(device[order], num_devices)  # [n, d]
    place = (on_device.cumsum(dim=0) * on_device).sum(dim=-1)  # on its device, from 1
    keep = torch.empty_like(undropped)
    keep[order] = (place <= budget) | undropped[order]
    return keep


def hash_table(vocab_size: int, num_experts: int, *, seed: int, layer: int) -> Tensor:
    """A fixed random expert for each token id, [vocab_size] int64; another table for each seed and layer.

    Source: Hash Layers, arXiv:2106.04426, 3.1 (random hash).
    """
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randint(num_experts, (vocab_size,), generator=generator, device="cpu")
