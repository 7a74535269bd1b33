"""What all ranks must agree on: before the first step, and, in one small reduction, before each update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Dtype


@dataclass(frozen=True)
class Agreement:
    """The same on all ranks.

    Attributes:
        loss: mean language-model loss in nats per target; nan if no target counts.
        finite: whether the loss, and the gradient on every rank, are finite.
        stop: whether any rank was asked to stop.
        saved: whether every rank is ready for what comes next of the save under way.
    """

    loss: float
    finite: bool
    stop: bool
    saved: bool


def agree(loss: Tensor, *, finite_gradient: bool, stop: bool, saved: bool) -> Agreement:
    """Sum over all ranks; what is not finite in one number hides none of the others.

    Args:
        loss: of this rank, as `Pipeline.run` returns it.
        finite_gradient: of this rank.
        stop: whether this rank was asked to stop.
        saved: whether this rank is ready for what comes next of the save under way.
    """
    flags = torch.tensor([not finite_gradient, stop, not saved], dtype=torch.float64, device=loss.device)
    sums = torch.cat((loss.double(), flags))
    dist.all_reduce(sums)
    total, num_targets = sums[:2].float()
    mean, (not_finite, to_stop, unsaved) = (total / num_targets).item(), sums[2:].tolist()
    return Agreement(loss=mean, finite=not not_finite and math.isfinite(mean), stop=to_stop > 0, saved=unsaved == 0)


def check_same_dtype(dtype: Dtype) -> None:
    """Whether `precision=auto` chose the same type on all ranks.

    Raises:
        ConfigError: on all of them: it did not.
    """
    everywhere: list[Dtype] = [dtype] * dist.get_world_size()
    dist.all_gather_object(everywhere, dtype)
    if other := next((rank for rank, found in enumerate(everywhere) if found is not everywhere[0]), None):
        raise ConfigError(
            f"precision=auto: rank 0 chose {everywhere[0].value} and rank {other} {everywhere[other].value}, as their "
            "machines differ; choose precision=bf16 or precision=fp32 for all"
        )
