"""Gradients and weights sent without copies, on CPUs.

gloo copies whole buffers to scatter sums and to gather parts. megatron-core's data-parallel wrapper does both within
one buffer (0.16.1, distributed/param_and_grad_buffer.py). There a sum on all ranks gives the same bits as a scattered
one, and a broadcast of each part the same as gathering them; for 240 MB, two ranks and two cores the first took half as
long and the second a seventh, and one rank has nothing to do.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor

SCATTER = param_and_grad_buffer.dist_reduce_scatter_func
GATHER = param_and_grad_buffer.dist_all_gather_func
COALESCED = param_and_grad_buffer._coalescing_manager


def install() -> None:
    """Send so from now on, but for what is sent in the background. Idempotent."""
    param_and_grad_buffer.dist_reduce_scatter_func = _reduce
    param_and_grad_buffer.dist_all_gather_func = _broadcast
    param_and_grad_buffer._coalescing_manager = _one_by_one


def _reduce(part: Tensor, whole: Tensor, *, op: Any, group: dist.ProcessGroup, async_op: bool) -> Any:
    """`part` is this rank's of `whole`."""
    if async_op or not _is_within(part, whole):
        return SCATTER(part, whole, op=op, group=group, async_op=async_op)
    if group.size() > 1:
        dist.all_reduce(whole, op=op, group=group)
    return None


def _broadcast(whole: Tensor, part: Tensor, *, group: dist.ProcessGroup, async_op: bool) -> Any:
    if async_op or not _is_within(part, whole):
        return GATHER(whole, part, group=group, async_op=async_op)
    if group.size() > 1:
        for rank, values in enumerate(whole.view(group.size(), -1)):
            dist.broadcast(values, group=group, group_src=rank)
    return None


def _one_by_one(group: dist.ProcessGroup, async_ops: bool = False, **options: Any) -> Any:
    """Not collected to be sent together, for which gloo would copy them into one buffer."""
    return COALESCED(group, async_ops=async_ops, **options) if async_ops else contextlib.nullcontext()


def _is_within(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
