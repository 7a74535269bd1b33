"""How evenly tokens are routed. Pure."""

from __future__ import annotations

from torch import Tensor


def max_violation(load: Tensor) -> Tensor:
    """Largest load over the mean, minus 1, along the last dimension; 0 for uniform load.

    Source: MaxVio of arXiv:2408.15664, equation 5.
    """
    return load.amax(dim=-1) / load.mean(dim=-1) - 1


def device_load(tokens_per_expert: Tensor, num_groups: int) -> Tensor:
    """Tokens on each device group, [..., num_groups], of tokens on each expert, [..., num_experts]."""
    return tokens_per_expert.unflatten(-1, (num_groups, -1)).sum(dim=-1)


def relative(load: Tensor) -> Tensor:
    """Load over the mean load, along the last dimension."""
    return load / load.mean(dim=-1, keepdim=True)
