"""Which documents and sequences come when: splits, the order of an epoch, and the turns of several sources. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from megatron.core.datasets import helpers

FORMAT = 1  # raised when the same seed would give another order: runs do not go on with another one
LONGEST_PERIOD = 10**6  # samples; shares are held exactly if they are multiples of one part in so many


def split_documents(num_documents: int, shares: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Deal documents out at random: each part gets its share, rounded to whole documents, and `train` the rest.

    Args:
        num_documents: to deal out.
        shares: of the parts beside `train`; a part of share 0 is left out, any other gets at least one document.
        seed: of the order.

    Returns:
        Rising numbers of documents by part, int32.
    """
    order = np.random.default_rng((seed, num_documents)).permutation(num_documents).astype(np.int32)
    parts, start = {}, 0
    for name, share in shares.items():
        if share:
            end = start + max(1, round(share * num_documents))
            parts[name] = np.sort(order[start:end])
            start = end
    return {"train": np.sort(order[start:]), **parts}


def draw_epoch(
    lengths: np.ndarray, documents: np.ndarray, sequence_length: int, *, seed: int, epoch: int
) -> dict[str, np.ndarray]:
    """How an epoch goes through documents that are put end to end and cut into sequences.

    Args:
        lengths: of all documents of the dataset, in tokens, [all documents] int32.
        documents: numbers of those to go through, [documents].
        sequence_length: of a sequence, which also has the token after it.
        seed: of all epochs.
        epoch: from 0.

    Returns:
        documents: their order, [documents].
        cuts: (index into that order, offset in tokens) where each sequence begins, [sequences + 1, 2].
        sequences: their order, [sequences].
    """
    random = np.random.default_rng((seed, epoch))
    order = documents[random.permutation(len(documents))].astype(np.int32)
    num_tokens = int(lengths[documents].sum(dtype=np.int64))
    cuts = helpers.build_sample_idx(lengths, order, sequence_length, 1, num_tokens)
    return {"documents": order, "cuts": cuts, "sequences": random.permutation(len(cuts) - 1).astype(np.int32)}


def period_of(weights: Sequence[float]) -> list[int]:
    """How many samples of each source make up a period: in its share exactly, where it is a fraction short enough.

    Shares such as 0.7, 0.295 and 0.005 or 2 and 1 (of 3) give the shortest period that holds them; others are rounded
    to whole samples in LONGEST_PERIOD.
    """
    total = sum(Fraction(str(weight)) for weight in weights)
    shares = [Fraction(str(weight)) / total for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    counts = [math.floor(share * LONGEST_PERIOD) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * LONGEST_PERIOD)
    for i in by_remainder[: LONGEST_PERIOD - sum(counts)]:
        counts[i] += 1
    return counts


def turns(counts: Sequence[int]) -> np.ndarray:
    """Whose turn it is, [sum(counts)], so that after any n samples each source is within one sample of its share.

    Sample j of a source that has c of p turns may come from place j p / c on, and must by (j + 1) p / c; of those that
    may, the one that must first takes the place.

    Source: Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
    """
    period = sum(counts)
    # Moments are multiples of 1 / count of the source; floors and ceilings keep to whole places.
    waiting = [(0, source, 0) for source, count in enumerate(counts) if count]  # (from, source, sample)
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []  # (by, source, sample)
    result = np.empty(period, dtype=np.int16)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source, sample = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(sample + 1) * period // counts[source]), source, sample))
        _, source, sample = heapq.heappop(ready)
        result[place] = source
        if sample + 1 < counts[source]:
            heapq.heappush(waiting, ((sample + 1) * period // counts[source], source, sample + 1))
    return result
