"""Plain loops written from the equations of DeepSeekMoE (arXiv:2401.06066) and DeepSeek-V2 (arXiv:2405.04434)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor, gate_and_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_and_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def moe(
    u: Tensor, router: Tensor, experts: list[tuple[Tensor, Tensor]], shared: tuple[Tensor, Tensor], topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 9 to 11 without the residual.

    Returns:
        Output like u [s, b, h], affinities s_it [s, b, n] and selections 1(token t selects i) [s, b, n].
    """
    affinity = torch.softmax(u @ router.T, dim=-1)
    selected = torch.zeros_like(affinity)
    output = swiglu(u, *shared)
    for t in range(u.shape[0]):
        for b in range(u.shape[1]):
            for i in affinity[t, b].topk(topk).indices.tolist():
                selected[t, b, i] = 1
                token = swiglu(u[t, b], *experts[i]) * affinity[t, b, i]
                output = output + F.pad(token[None, None], (0, 0, b, u.shape[1] - 1 - b, t, u.shape[0] - 1 - t))
    return output, affinity, selected


def expert_level(affinity: Tensor, selected: Tensor, topk: int) -> Tensor:
    """Equations 12 to 14 without alpha 1, per sequence, mean over sequences."""
    length, batch, experts = affinity.shape
    losses = []
    for b in range(batch):
        total = torch.zeros(())
        for i in range(experts):
            f = experts / (topk * length) * selected[:, b, i].sum()
            p = affinity[:, b, i].sum() / length
            total = total + f * p
        losses.append(total)
    return torch.stack(losses).mean()


def device_level(affinity: Tensor, selected: Tensor, topk: int, groups: int) -> Tensor:
    """Equations 15 to 17 without alpha 2, per sequence, mean over sequences."""
    length, batch, experts = affinity.shape
    size = experts // groups
    losses = []
    for b in range(batch):
        total = torch.zeros(())
        for d in range(groups):
            members = range(d * size, (d + 1) * size)
            f = sum(experts / (topk * length) * selected[:, b, j].sum() for j in members) / size
            p = sum(affinity[:, b, j].sum() / length for j in members)
            total = total + f * p
        losses.append(total)
    return torch.stack(losses).mean()


def communication_level(affinity: Tensor, selected: Tensor, groups: int, limit: int) -> Tensor:
    """DeepSeek-V2, equations 29 to 31 without alpha 3, per sequence, mean over sequences."""
    length, batch, experts = affinity.shape
    size = experts // groups
    losses = []
    for b in range(batch):
        total = torch.zeros(())
        for d in range(groups):
            members = list(range(d * size, (d + 1) * size))
            sent = sum(1 for t in range(length) if any(selected[t, b, j] for j in members))
            total = total + groups / (limit * length) * sent * affinity[:, b, members].sum() / length
        losses.append(total)
    return torch.stack(losses).mean()


def device_limited(affinity: list[float], groups: int, limit: int, topk: int) -> set[int]:
    """DeepSeek-V2, 2.2.2: the experts of one token."""
    size = len(affinity) // groups
    best = [max(affinity[d * size : (d + 1) * size]) for d in range(groups)]
    devices = sorted(range(groups), key=lambda d: best[d], reverse=True)[:limit]
    experts = [i for i in range(len(affinity)) if i // size in devices]
    return set(sorted(experts, key=lambda i: affinity[i], reverse=True)[:topk])


def kept(selections: list[tuple[float, int, bool]], budget: int, groups: int) -> list[bool]:
    """DeepSeek-V2, 2.2.4: of selections (affinity, device, may not be dropped), drop the lowest until within budget."""
    keep = [True] * len(selections)
    for d in range(groups):
        here = [i for i, (_, device, _) in enumerate(selections) if device == d]
        droppable = sorted((i for i in here if not selections[i][2]), key=lambda i: (selections[i][0], -i))
        for i in droppable[: max(len(here) - budget, 0)]:
            keep[i] = False
    return keep
