"""Matrix products of experts that have different numbers of tokens."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a product in bf16 on a CPU: oneDNN compiles each shape once, in milliseconds, and keeps the code.
GRID = torch.tensor([*range(0, 256, 16), *(step << power for power in range(5, 24) for step in range(8, 16))])
ROWS_OF_A_CALL = 128  # that take as long as what else the products of a single expert cost
NUMBERS_CONVERTED = 2**22  # of a product, before it is added to fp32
ROWS_OF_MEMORY = 1024  # a multiple of them is allocated, as memory of ever new sizes falls into pieces


class Products(Protocol):
    """How tokens of local experts are padded, and multiplied with the experts' matrices."""

    def pad(self, values: Tensor) -> Tensor:
        """[n, ...] of the experts' tokens one after the other, with padding of any values: [padded, ...]."""

    def pad_probs(self, probs: Tensor) -> Tensor:
        """[padded, 1] of gate values [n], 0 for padding, so that nothing comes of it."""

    def unpad(self, padded: Tensor) -> Tensor:
        """[n, ...] of [padded, ...]."""

    def multiply(self, padded: Tensor, matrices: Tensor) -> Tensor:
        """Of each expert's rows of [padded, in] with its matrix of [experts, in, out]: [padded, out]."""

    def add_weight_gradient(self, total: Tensor, outputs: Tensor, inputs: Tensor, *, is_stale: bool) -> None:
        """Add to [experts, out, in] the transposed rows of [padded, out] times those of [padded, in] of each expert.

        Args:
            total: to add to, perhaps of another type.
            outputs: gradients of the experts' outputs.
            inputs: that they are of; of padding, one of both is 0.
            is_stale: what is in `total` does not count.
        """


def products_of(tokens_per_expert: Tensor, tokens: Tensor) -> Products:
    """What is fastest for tokens [n, h] of the local experts, whose numbers are [experts]."""
    if tokens.is_cuda and tokens.dtype is torch.bfloat16:
        return GroupedProducts(tokens_per_expert.to(tokens.device))
    if tokens.dtype is torch.float32 or len(tokens) == 0:
        return SingleProducts(tokens_per_expert)
    return PaddedProducts(tokens_per_expert.cpu(), tokens.device)


class _UnpaddedProducts:
    """Tokens stay as they are."""

    def pad(self, values: Tensor) -> Tensor:
        """See `Products`."""
        return values

    unpad = pad

    def pad_probs(self, probs: Tensor) -> Tensor:
        """See `Products`."""
        return probs[:, None]


class SingleProducts(_UnpaddedProducts):
    """A product for each expert: in fp32 as fast as any, with nothing copied."""

    def __init__(self, tokens_per_expert: Tensor) -> None:
        self.counts = tokens_per_expert.tolist()

    def multiply(self, padded: Tensor, matrices: Tensor) -> Tensor:
        """See `Products`."""
        result = padded.new_empty(len(padded), matrices.shape[-1])
        for rows, matrix, out in zip(padded.split(self.counts), matrices, result.split(self.counts), strict=True):
            torch.mm(rows, matrix, out=out)
        return result

    def add_weight_gradient(self, total: Tensor, outputs: Tensor, inputs: Tensor, *, is_stale: bool) -> None:
        """See `Products`."""
        for matrix, left, right in zip(total, outputs.split(self.counts), inputs.split(self.counts), strict=True):
            _add_product(matrix, left.T, right, is_stale=is_stale)


class GroupedProducts(_UnpaddedProducts):
    """One kernel for all experts, of PyTorch: without Transformer Engine the fastest on GPUs."""

    def __init__(self, tokens_per_expert: Tensor) -> None:
        self.ends = tokens_per_expert.cumsum(0, dtype=torch.int32)

    def multiply(self, padded: Tensor, matrices: Tensor) -> Tensor:
        """See `Products`."""
        return F.grouped_mm(padded, matrices, offs=self.ends)

    def add_weight_gradient(self, total: Tensor, outputs: Tensor, inputs: Tensor, *, is_stale: bool) -> None:
        """See `Products`."""
        product = F.grouped_mm(outputs.T, inputs, offs=self.ends)
        if is_stale:
            total.copy_(product)
        else:
            total.add_(product)


class PaddedProducts:
    """Of each expert's tokens as many as suit most in one batched product, the rest of fuller experts by itself.

    Attributes:
        source: [padded], the token that each row is; of padding, any.
        is_token: [padded], whether it is none of the padding.
        place: [n], the row of each token.
        parts: experts, their rows, and the leading axes of these, of each product; that of all experts comes first.
    """

    def __init__(self, tokens_per_expert: Tensor, device: torch.device) -> None:
        counts = tokens_per_expert
        first = counts.cumsum(0) - counts
        batched = _batched_rows(counts)
        end = len(counts) * batched
        self.parts = [(slice(None), slice(0, end), (len(counts), batched))]
        index = torch.arange(batched)
        blocks, valid = [(first[:, None] + index).flatten()], [(index < counts[:, None]).flatten()]
        for expert in (counts > batched).nonzero().flatten().tolist():
            rest = int(counts[expert]) - batched
            index = torch.arange(_rounded(rest))
            blocks.append(first[expert] + batched + index)
            valid.append(index < rest)
            self.parts.append((expert, slice(end, end + len(index)), (len(index),)))
            end += len(index)
        unused = torch.zeros(-end % ROWS_OF_MEMORY, dtype=torch.long)
        source, is_token = torch.cat([*blocks, unused]), torch.cat([*valid, unused.bool()])
        place = torch.empty(int(counts.sum()), dtype=torch.long)
        place[source[is_token]] = is_token.nonzero().flatten()
        source.clamp_(max=len(place) - 1)
        self.source, self.is_token, self.place = (part.to(device) for part in (source, is_token, place))

    def pad(self, values: Tensor) -> Tensor:
        """See `Products`."""
        return values.index_select(0, self.source)

    def pad_probs(self, probs: Tensor) -> Tensor:
        """See `Products`."""
        return self.pad(probs).mul_(self.is_token)[:, None]

    def unpad(self, padded: Tensor) -> Tensor:
        """See `Products`."""
        return padded.index_select(0, self.place)

    def multiply(self, padded: Tensor, matrices: Tensor) -> Tensor:
        """See `Products`."""
        result = padded.new_empty(len(padded), matrices.shape[-1])
        for expert, rows, shape in self.parts:
            torch.matmul(padded[rows].view(*shape, -1), matrices[expert], out=result[rows].view(*shape, -1))
        return result

    def add_weight_gradient(self, total: Tensor, outputs: Tensor, inputs: Tensor, *, is_stale: bool) -> None:
        """See `Products`."""
        for expert, rows, shape in self.parts:
            left, right = (padded[rows].view(*shape, -1) for padded in (outputs, inputs))
            _add_product(total[expert], left.mT, right, is_stale=is_stale)
            is_stale = False


def _batched_rows(counts: Tensor) -> int:
    """Rows of each expert in the batched product that make for the least work."""
    choices = GRID[1 : torch.searchsorted(GRID, int(counts.max())) + 1]
    beyond = (counts - choices[:, None]).clamp_min(0)
    work = len(counts) * choices + (beyond + ROWS_OF_A_CALL * (beyond > 0)).sum(1)
    return int(choices[work.argmin()])


def _rounded(rows: int) -> int:
    return int(GRID[torch.searchsorted(GRID, rows)])


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, is_stale: bool) -> None:
    """Of matrices, or of as many as `total` has."""
    if total.dtype is not right.dtype:
        _add_converted(total, left, right, is_stale=is_stale)
    elif is_stale:
        torch.matmul(left, right, out=total)
    elif total.dim() > 2:
        total.baddbmm_(left, right)
    else:
        total.addmm_(left, right)


def _add_converted(total: Tensor, left: Tensor, right: Tensor, *, is_stale: bool) -> None:
    """To another type, of many matrices a few at a time, for which little memory is needed."""
    if total.dim() == 2:
        _put(total, left @ right, is_stale=is_stale)
        return
    count = -(-NUMBERS_CONVERTED // total[0].numel())
    for part, lefts, rights in zip(total.split(count), left.split(count), right.split(count), strict=True):
        _put(part, lefts @ rights, is_stale=is_stale)


def _put(total: Tensor, product: Tensor, *, is_stale: bool) -> None:
    if is_stale:
        total.copy_(product)
        return
    size = total.shape[-2:]
    for matrix, values in zip(total.view(-1, *size), product.view(-1, *size), strict=True):
        matrix.add_(values)  # torch first makes a copy of all that it converts
