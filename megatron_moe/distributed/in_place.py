"""Gradients and weights sent, reset and clipped without copies, on CPUs.

gloo copies whole buffers to scatter sums and to gather parts. megatron-core's data-parallel wrapper does both within
one buffer (0.16.1, distributed/param_and_grad_buffer.py). There a sum on all ranks gives the same bits as a scattered
one, and a broadcast of each part the same as gathering them; for 240 MB, two ranks and two cores the first took half as
long and the second a seventh, and one rank has nothing to do.

Gradients are clipped where they lie, their norm is taken on all cores, and those of experts, most of a model's, are not
filled with 0 before each step.

What is freed is used again: glibc gives memory above 32 MiB back to the system, and the next tensor there costs a page
fault for every 4 KiB, 4 % of a step of a 16B layer.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import clip_grads
from torch import Tensor

SCATTER = param_and_grad_buffer.dist_reduce_scatter_func
GATHER = param_and_grad_buffer.dist_all_gather_func
COALESCED = param_and_grad_buffer._coalescing_manager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 2**31 - 1


def install() -> None:
    """Do so from now on, but for what is sent in the background. Idempotent."""
    param_and_grad_buffer.dist_reduce_scatter_func = _reduce
    param_and_grad_buffer.dist_all_gather_func = _broadcast
    param_and_grad_buffer._coalescing_manager = _one_by_one
    param_and_grad_buffer._ParamAndGradBuffer.reset = _reset_gradients
    clip_grads.multi_tensor_scale_impl = _scale
    clip_grads.l2_norm_impl = _norm
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and libc.mallopt(M_MMAP_THRESHOLD, LARGEST):  # older glibc takes no more than 32 MiB
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST)


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


def _reset_gradients(buffer: param_and_grad_buffer._ParamAndGradBuffer) -> None:
    """To 0, but for those that model/experts.py overwrites, which are marked."""
    for param in buffer.params:
        if hasattr(param, "main_grad_is_stale"):
            param.main_grad_is_stale = True
        else:
            param.main_grad.zero_()


def reset_unwritten(parameters: Iterable[Tensor]) -> None:
    """Fill with 0 what no backward pass has overwritten, before it is sent."""
    for param in parameters:
        if getattr(param, "main_grad_is_stale", False):
            param.main_grad.zero_()
            param.main_grad_is_stale = False


def _scale(_size: int, _overflow: Tensor, gradients: tuple[list[Tensor], list[Tensor]], factor: float) -> None:
    """What is clipped, which comes as source and as destination."""
    for gradient in gradients[0]:
        gradient.mul_(factor)


def _norm(_size: int, _overflow: Tensor, gradients: list[list[Tensor]], _per_tensor: bool) -> tuple[Tensor, None]:
    """Of all gradients together, [1]. `torch.norm` is on one core, and its float32 sum of 10 M squares is 5e-4 off."""
    flat = [gradient.flatten().float() for gradient in gradients[0]]
    return torch.stack([gradient.dot(gradient) for gradient in flat]).sum().sqrt()[None], None


def _is_within(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
