"""Rows of tokens for experts that have different numbers of them, and the matrix products of these rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS_AT_ONCE = 2**20  # of the rows of some experts on a CPU, so that what is between their products stays in a cache
# Rows of a product in bf16 on a CPU: oneDNN compiles each shape once, in milliseconds, and keeps the code.
GRID = torch.tensor([*range(0, 256, 16), *(step << power for power in range(5, 24) for step in range(8, 16))])
GROUPED_MULTIPLE = 8  # numbers in bf16 of the 16 bytes that F.grouped_mm asks rows on a GPU to be multiples of
ROWS_OF_A_CALL = 128  # that take as long as what else the products of a single expert cost


@dataclass(frozen=True)
class Part:
    """Some experts, which come one after the other, and their rows.

    Attributes:
        experts: of the local ones.
        rows: of all.
        is_first: no other part before has the same experts.
    """

    experts: slice
    rows: slice
    is_first: bool = True


class ExpertRows:
    """A row for each token of each local expert, those of the first expert first; how they are multiplied is open.

    Attributes:
        parts: that are computed one after the other.
        token_index: [rows], the token of each; None: the tokens are the rows.
    """

    parts: list[Part]

    def __init__(self, token_index: Tensor | None) -> None:
        self.token_index = token_index

    def gather(self, values: Tensor, part: Part) -> Tensor:
        """A part's rows of [tokens, ...]."""
        return values[part.rows] if self.token_index is None else values.index_select(0, self.token_index[part.rows])

    def new_sums(self, tokens: Tensor) -> Tensor:
        """Where `scatter_add` adds: [tokens, h], in float32 where it adds several rows."""
        return torch.empty_like(tokens) if self.token_index is None else torch.zeros_like(tokens, dtype=torch.float32)

    def scatter_add(self, sums: Tensor, values: Tensor, part: Part) -> None:
        """Add a part's rows to the sums of their tokens."""
        if self.token_index is None:
            sums[part.rows] = values
        else:
            sums.index_add_(0, self.token_index[part.rows], values.to(sums.dtype))

    def gather_gates(self, gates: Tensor) -> Tensor:
        """[rows, 1] of gate values [n]."""
        return gates[:, None]

    def scatter_gates(self, values: Tensor) -> Tensor:
        """[n] of [rows]."""
        return values

    def multiply(self, rows: Tensor, matrices: Tensor, part: Part) -> Tensor:
        """Of each expert's rows of a part, [rows, i], with its matrix of all [experts, i, o]: [rows, o]."""
        raise NotImplementedError

    def add_weight_gradient(
        self, total: Tensor, outputs: Tensor, inputs: Tensor, part: Part, *, is_stale: bool
    ) -> None:
        """Add each expert's transposed rows of [rows, o] times those of [rows, i] to its matrix.

        Args:
            total: [experts, o, i] of all experts, perhaps of another type.
            outputs: a part's gradients of the experts' outputs.
            inputs: that they are of; of padding, one of both is 0.
            part: whose.
            is_stale: what is in `total` does not count.
        """
        raise NotImplementedError


def expert_rows(tokens: Tensor, width: int, tokens_per_expert: Tensor, token: Tensor | None = None) -> ExpertRows:
    """What is fastest for tokens [tokens, h] on their device.

    Args:
        tokens: their type, width and device count.
        width: of an expert on this rank.
        tokens_per_expert: [local experts]; their sum is n.
        token: [n], the token of each; None: there are n tokens, in this order.
    """
    num_rows, hidden_size = len(tokens if token is None else token), tokens.shape[-1]
    at_once = max(1, NUMBERS_AT_ONCE * len(tokens_per_expert) // max(num_rows * hidden_size, 1))
    if tokens.dtype is torch.float32 or num_rows == 0:
        return SingleRows(tokens_per_expert, token, at_once)
    if tokens.is_cuda and hidden_size % GROUPED_MULTIPLE == width % GROUPED_MULTIPLE == 0:
        return GroupedRows(tokens_per_expert.to(tokens.device), token)
    return PaddedRows(tokens_per_expert.cpu(), token, at_once, tokens.device)


class SingleRows(ExpertRows):
    """A product for each expert: in fp32 as fast as any, with nothing copied."""

    def __init__(self, tokens_per_expert: Tensor, token: Tensor | None, at_once: int) -> None:
        self.counts = tokens_per_expert.tolist()
        ends = [0, *accumulate(self.counts)]
        super().__init__(token)
        self.parts = [Part(run, slice(ends[run.start], ends[run.stop])) for run in _runs(len(self.counts), at_once)]

    def multiply(self, rows: Tensor, matrices: Tensor, part: Part) -> Tensor:
        """See `ExpertRows`."""
        result, counts = rows.new_empty(len(rows), matrices.shape[-1]), self.counts[part.experts]
        for of_expert, matrix, out in zip(
            rows.split(counts), matrices[part.experts], result.split(counts), strict=True
        ):
            torch.mm(of_expert, matrix, out=out)
        return result

    def add_weight_gradient(
        self, total: Tensor, outputs: Tensor, inputs: Tensor, part: Part, *, is_stale: bool
    ) -> None:
        """See `ExpertRows`."""
        counts = self.counts[part.experts]
        for matrix, left, right in zip(total[part.experts], outputs.split(counts), inputs.split(counts), strict=True):
            _add_product(matrix, left.T, right, is_stale=is_stale)


class GroupedRows(ExpertRows):
    """One kernel for all experts, of PyTorch: without Transformer Engine the fastest on GPUs."""

    def __init__(self, tokens_per_expert: Tensor, token: Tensor | None) -> None:
        super().__init__(token)
        self.parts = [Part(slice(None), slice(None))]
        self.ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
        self.is_idle = (tokens_per_expert == 0)[:, None, None]

    def multiply(self, rows: Tensor, matrices: Tensor, part: Part) -> Tensor:
        """See `ExpertRows`."""
        return F.grouped_mm(rows, matrices, offs=self.ends)

    def add_weight_gradient(
        self, total: Tensor, outputs: Tensor, inputs: Tensor, part: Part, *, is_stale: bool
    ) -> None:
        """See `ExpertRows`. Of idle experts B200 gives anything (PyTorch issue 172439)."""
        product = F.grouped_mm(outputs.T, inputs, offs=self.ends).masked_fill_(self.is_idle, 0)
        if is_stale:
            total[part.experts].copy_(product)
        else:
            total[part.experts].add_(product)


class PaddedRows(ExpertRows):
    """Of each expert's rows as many as suit most in batched products, the rest of fuller experts by itself.

    Attributes:
        is_token: [rows], whether it is none of the padding, which repeats a row of the same expert.
        place: [n], the row of each.
    """

    def __init__(self, tokens_per_expert: Tensor, token: Tensor | None, at_once: int, device: torch.device) -> None:
        counts = tokens_per_expert
        first = counts.cumsum(0) - counts
        batched = _batched_rows(counts)
        self.parts = [Part(run, slice(run.start * batched, run.stop * batched)) for run in _runs(len(counts), at_once)]
        blocks = [_padded(first[:, None], counts[:, None], batched)]
        end = len(counts) * batched
        for expert in (counts > batched).nonzero().flatten().tolist():
            rest = counts[expert] - batched
            blocks.append(_padded(first[expert] + batched, rest, _rounded(int(rest))))
            rows = slice(end, end := end + blocks[-1][0].numel())
            self.parts.append(Part(slice(expert, expert + 1), rows, is_first=False))
        source, is_token = (torch.cat([part.flatten() for part in parts]) for parts in zip(*blocks, strict=True))
        place = torch.empty(int(counts.sum()), dtype=torch.long)
        place[source[is_token]] = is_token.nonzero().flatten()
        self.is_token, self.place = is_token.to(device), place.to(device)
        self._source = source.clamp_(max=len(place) - 1).to(device)
        self._is_sorted = token is None
        super().__init__(self._source if token is None else token[self._source])

    def new_sums(self, tokens: Tensor) -> Tensor:
        """See `ExpertRows`."""
        return torch.empty_like(tokens) if self._is_sorted else super().new_sums(tokens)

    def scatter_add(self, sums: Tensor, values: Tensor, part: Part) -> None:
        """See `ExpertRows`."""
        if not self._is_sorted:
            super().scatter_add(sums, values, part)
            return
        is_token = self.is_token[part.rows]
        sums[self._source[part.rows][is_token]] = values[is_token]

    def gather_gates(self, gates: Tensor) -> Tensor:
        """See `ExpertRows`; 0 for padding, so that nothing comes of it."""
        return gates.index_select(0, self._source).mul_(self.is_token)[:, None]

    def scatter_gates(self, values: Tensor) -> Tensor:
        """See `ExpertRows`."""
        return values.index_select(0, self.place)

    def multiply(self, rows: Tensor, matrices: Tensor, part: Part) -> Tensor:
        """See `ExpertRows`."""
        of_part = matrices[part.experts]
        return torch.bmm(_by_expert(rows, of_part), of_part).flatten(0, 1)

    def add_weight_gradient(
        self, total: Tensor, outputs: Tensor, inputs: Tensor, part: Part, *, is_stale: bool
    ) -> None:
        """See `ExpertRows`."""
        of_part = total[part.experts]
        left, right = (_by_expert(rows, of_part) for rows in (outputs, inputs))
        _add_product(of_part, left.mT, right, is_stale=is_stale and part.is_first)


def _padded(first: Tensor, count: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """So many rows from the first on, and which of them are none of the padding."""
    index = torch.arange(num_rows)
    return first + index.minimum(count - 1).clamp_min(0), (index < count).expand(*count.shape[:-1], num_rows)


def _by_expert(rows: Tensor, matrices: Tensor) -> Tensor:
    """[rows, i] as [experts, rows of each, i]."""
    return rows.unflatten(0, (len(matrices), -1))


def _runs(count: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]


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
        _put(total, left @ right, is_stale=is_stale)
    elif is_stale:
        torch.matmul(left, right, out=total)
    elif total.dim() > 2:
        total.baddbmm_(left, right)
    else:
        total.addmm_(left, right)


def _put(total: Tensor, product: Tensor, *, is_stale: bool) -> None:
    """Of another type."""
    if is_stale:
        total.copy_(product)
        return
    size = total.shape[-2:]
    for matrix, values in zip(total.view(-1, *size), product.view(-1, *size), strict=True):
        matrix.add_(values)  # on a CPU torch first makes a copy of all that it converts
