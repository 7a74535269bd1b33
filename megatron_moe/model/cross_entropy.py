"""Cross-entropy without a second copy of the logits, for CPUs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

BLOCK = 2**19  # logits at a time, which stay in a core's cache


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The language-model loss of each token, from logits that lie on the ranks of a tensor-parallel group.

    Its backward pass writes the gradient over the logits. What megatron-core does on several copies of them in float32
    (0.16.1, tensor_parallel/cross_entropy.py) is done a few rows at a time.

    Args:
        logits: [s, b, vocabulary of this rank], contiguous.
        labels: [s, b], ids in the whole vocabulary.
        group: of the ranks that share the vocabulary.

    Returns:
        [s, b], in nats, float32.
    """
    return _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), group).view_as(labels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        label = labels - group.rank() * logits.shape[1]
        is_here = (label >= 0) & (label < logits.shape[1])
        label = label * is_here
        predicted = logits.gather(1, label[:, None])[:, 0].float() * is_here
        log_sum = torch.empty_like(predicted)
        for rows in _blocks(logits):
            torch.logsumexp(logits[rows].float(), dim=-1, out=log_sum[rows])
        if group.size() > 1:
            dist.all_reduce(predicted, group=group)
            log_sum = _over_ranks(log_sum, group)
        ctx.save_for_backward(logits, label, is_here, log_sum)
        return log_sum - predicted

    @staticmethod
    def backward(ctx: FunctionCtx, of_loss: Tensor) -> tuple[Tensor, None, None]:
        logits, label, is_here, log_sum = ctx.saved_tensors
        for rows in _blocks(logits):
            softmax = (logits[rows].float() - log_sum[rows, None]).exp_()
            softmax.scatter_add_(1, label[rows, None], -is_here[rows, None].float())
            torch.mul(softmax, of_loss[rows, None], out=logits[rows])
        return logits, None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of [n, vocabulary] at a time."""
    rows = -(-BLOCK // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


def _over_ranks(log_sum: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The logarithm of all ranks' sums together."""
    largest = log_sum.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (log_sum - largest).exp_()
    dist.all_reduce(total, group=group)
    return largest + total.log_()
