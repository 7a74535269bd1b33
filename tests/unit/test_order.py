"""Splits, epochs and turns, as pure arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.data.order import FORMAT, LONGEST_PERIOD, draw_epoch, period_of, split_documents, turns


@given(
    num_documents=st.integers(20, 3000),
    valid=st.floats(0, 0.4),
    test=st.floats(0, 0.4),
    seed=st.integers(0, 2**32),
)
def test_a_split_deals_out_every_document_once(num_documents: int, valid: float, test: float, seed: int) -> None:
    shares = {"valid": valid, "test": test}
    parts = split_documents(num_documents, shares, seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(num_documents))
    assert parts.keys() == {"train"} | {name for name, share in shares.items() if share}
    for name in parts.keys() - {"train"}:
        assert len(parts[name]) == max(1, round(shares[name] * num_documents))
    for documents in parts.values():
        assert documents.dtype == np.int32
        assert (np.diff(documents) > 0).all()


def test_a_split_follows_the_seed_and_is_at_random() -> None:
    first, again, other = (split_documents(1000, {"valid": 0.1}, seed)["valid"] for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert 350 < first.mean() < 650
    assert len(np.intersect1d(first, other)) < 30


def test_the_share_of_a_small_part_is_at_least_a_document() -> None:
    assert {k: len(v) for k, v in split_documents(10, {"valid": 0.001, "test": 0.0}, 1).items()} == {
        "train": 9,
        "valid": 1,
    }


@pytest.mark.parametrize(
    ("weights", "period"),
    [
        ([0.7, 0.3], [7, 3]),
        ([7, 3], [7, 3]),
        ([0.7, 0.295, 0.005], [140, 59, 1]),
        ([2, 1], [2, 1]),
        ([1e-6, 0.999999], [1, 999_999]),
        ([5.0], [1]),
    ],
)
def test_the_period_is_the_shortest_that_holds_the_shares(weights: list[float], period: list[int]) -> None:
    assert period_of(weights) == period


weight_lists = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=60)


@given(weights=weight_lists)
def test_a_period_rounds_by_less_than_one_in_a_million(weights: list[float]) -> None:
    counts = period_of(weights)
    period = sum(counts)
    assert period <= LONGEST_PERIOD
    total = sum(Fraction(str(weight)) for weight in weights)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(Fraction(count, period) - Fraction(str(weight)) / total) < Fraction(1, LONGEST_PERIOD)


def furthest_from_share(counts: list[int], periods: int) -> Fraction:
    """Over all prefixes and sources, in samples, by exact arithmetic."""
    period = sum(counts)
    order = np.tile(turns(counts), periods).astype(np.int64)
    prefix = np.arange(1, len(order) + 1)
    worst = 0
    for source, count in enumerate(counts):
        worst = max(worst, int(np.abs(np.cumsum(order == source) * period - prefix * count).max()))
    return Fraction(worst, period)


@settings(max_examples=100)
@given(counts=st.lists(st.integers(1, 50), min_size=2, max_size=60), periods=st.integers(1, 3))
def test_every_source_is_within_a_sample_of_its_share_at_any_prefix(counts: list[int], periods: int) -> None:
    order = turns(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    assert furthest_from_share(counts, periods) < 1


@settings(max_examples=3)
@given(weights=weight_lists)
def test_shares_that_no_short_period_holds_are_kept_as_well(weights: list[float]) -> None:
    counts = [count for count in period_of(weights) if count]
    assert furthest_from_share(counts, 1) < 1


def test_turns_are_the_same_every_time() -> None:
    counts = [140, 59, 1]
    assert turns(counts).tolist() == turns(counts).tolist()
    assert turns([2, 1]).tolist() == [0, 0, 1]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=4, max_size=60),
    sequence_length=st.integers(1, 30),
    epoch=st.integers(0, 5),
    data=st.data(),
)
def test_an_epoch_goes_through_its_documents_only_and_each_token_once(
    lengths: list[int], sequence_length: int, epoch: int, data: st.DataObject
) -> None:
    documents = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True).map(sorted))
    num_tokens = sum(lengths[d] for d in documents)
    if num_tokens <= sequence_length:
        return
    drawn = draw_epoch(np.array(lengths, np.int32), np.array(documents, np.int32), sequence_length, seed=1, epoch=epoch)
    assert sorted(drawn["documents"].tolist()) == documents
    num_sequences = (num_tokens - 1) // sequence_length
    assert sorted(drawn["sequences"].tolist()) == list(range(num_sequences))
    stream = [(d, i) for d in drawn["documents"].tolist() for i in range(lengths[d])]
    starts = np.cumsum([0, *(lengths[d] for d in drawn["documents"])])
    places = [int(starts[index] + offset) for index, offset in drawn["cuts"].tolist()]
    assert places == [i * sequence_length for i in range(num_sequences + 1)]
    assert len(stream) == num_tokens > places[-1]


def test_each_epoch_has_its_own_order() -> None:
    lengths, documents = np.full(50, 9, np.int32), np.arange(0, 50, 2, dtype=np.int32)
    drawn = [draw_epoch(lengths, documents, 16, seed=seed, epoch=epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for name in ("documents", "sequences"):
        assert len({tuple(order[name].tolist()) for order in drawn}) == 3


def test_the_order_is_the_one_that_runs_under_way_have() -> None:
    """Where this must change, `FORMAT` must too."""
    assert FORMAT == 1
    dealt = split_documents(10, {"valid": 0.2, "test": 0.1}, 7)
    assert {name: part.tolist() for name, part in dealt.items()} == {
        "train": [0, 1, 3, 4, 5, 6, 9],
        "valid": [7, 8],
        "test": [2],
    }
    lengths, documents = np.array([5, 3, 9, 4], np.int32), np.array([0, 2, 3], np.int32)
    epoch = draw_epoch(lengths, documents, 4, seed=7, epoch=1)
    assert {name: array.tolist() for name, array in epoch.items()} == {
        "documents": [0, 3, 2],
        "cuts": [[0, 0], [0, 4], [1, 3], [2, 3], [2, 7]],
        "sequences": [2, 3, 1, 0],
    }
    assert turns([5, 3, 2]).tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
