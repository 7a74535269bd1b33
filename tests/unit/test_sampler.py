"""Micro batches: whose they are, and what keeps documents apart."""

import functools
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.derived import batch_size, num_micro_batches
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import compose_config
from megatron_moe.config.schema import Config, DataConfig
from megatron_moe.data.cache import ArrayCache
from megatron_moe.data.dataset import BlendedDataset, PackedDataset, examine
from megatron_moe.data.indexed import IndexedWriter
from megatron_moe.data.sampler import by_document, micro_batches

END = 0


class Group:
    """Stands in for a process group."""

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


class Groups:
    def __init__(self, dp: Group) -> None:
        self.dp, self.cp = dp, Group()


def write_documents(prefix: Path, lengths: list[int], seed: int) -> list[np.ndarray]:
    """Random documents, each ended by END, which comes nowhere else."""
    random = np.random.default_rng(seed)
    documents = [np.append(random.integers(1, 100, length - 1), END).astype(np.uint16) for length in lengths]
    writer = IndexedWriter(prefix, np.uint16)
    writer.append(np.concatenate(documents), np.array(lengths))
    writer.finish()
    return documents


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> BlendedDataset:
    """Of a long and a short source, which begins its second epoch at sample 40."""
    folder = tmp_path_factory.mktemp("blend")
    random = np.random.default_rng(0)
    for name, num_documents in (("long", 100), ("short", 15)):
        write_documents(folder / name, random.integers(1, 30, num_documents).tolist(), num_documents)
    cache = ArrayCache(folder / "cache")
    options = {"sequence_length": 16, "vocab_size": 100, "seed": 1, "cache": cache}
    sources = [PackedDataset(examine(str(folder / name)), None, **options) for name in ("long", "short")]
    assert len(sources[1]) < 20
    assert len(sources[0]) > 80
    return BlendedDataset(sources, [0.7, 0.3])


def numbers_and_tokens(blend: BlendedDataset, first: int, count: int, micro_batch_size: int, groups: Groups) -> list:
    batches = micro_batches(
        blend,
        first_sample=first,
        micro_batch_size=micro_batch_size,
        options=DataConfig(),
        pg_collection=groups,
        device=torch.device("cpu"),
    )
    return [
        [(i, tuple(row)) for i, row in zip(batch["sample_ids"].tolist(), batch["tokens"].tolist(), strict=True)]
        for batch in itertools.islice(batches, count)
    ]


@functools.cache
def ramped(micro_batch_size: int, ramp: bool) -> Config:
    options = [f"train.micro_batch_size={micro_batch_size}", "train.global_batch_size=16", "data.sequence_length=16"]
    if ramp:
        options += ["train.batch_ramp.start=8", "train.batch_ramp.increment=8", "train.batch_ramp.tokens=600"]
    return compose_config(options)


@settings(max_examples=60)
@given(
    data=st.data(),
    ramp=st.booleans(),
    segments=st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3)), min_size=1, max_size=4),
)
def test_samples_come_in_one_order_however_they_are_shared(
    blend: BlendedDataset, data: st.DataObject, ramp: bool, segments: list[tuple[int, int]]
) -> None:
    """The run stops and goes on with other ranks and other micro batches after some steps."""
    consumed, seen = 0, []
    for dp_size, steps in segments:
        micro_batch_size = data.draw(st.sampled_from([size for size in (1, 2, 4, 8) if size * dp_size <= 8]))
        config = ramped(micro_batch_size, ramp)
        sizes = [consumed]
        for _ in range(steps):
            sizes.append(sizes[-1] + batch_size(config, sizes[-1]))
        counts = [num_micro_batches(config, dp_size, before) for before in sizes[:-1]]
        ranks = [
            numbers_and_tokens(blend, consumed, sum(counts), micro_batch_size, Groups(Group(dp_size, rank)))
            for rank in range(dp_size)
        ]
        for count in counts:  # a global batch is a range of samples, whoever has which
            step = [sample for rank in ranks for batch in rank[:count] for sample in batch]
            seen += sorted(step)
            ranks = [rank[count:] for rank in ranks]
        consumed = sizes[-1]
        assert len(seen) == consumed
    assert seen == [(i, tuple(blend[i][:-1])) for i in range(consumed)]


def test_a_source_goes_on_into_its_next_epoch_among_the_others(blend: BlendedDataset) -> None:
    places = [blend.place(i) for i in range(100)]
    epochs = [number // len(blend.datasets[source]) for source, number in places]
    assert {epoch for (source, _), epoch in zip(places, epochs, strict=True) if source == 1} >= {0, 1}
    assert {epoch for (source, _), epoch in zip(places, epochs, strict=True) if source == 0} == {0}
    for index, (source, number) in enumerate(places):
        assert blend[index].tolist() == blend.datasets[source][number].tolist()
        assert blend.document_lengths(index).tolist() == blend.datasets[source].document_lengths(number).tolist()


@given(
    rows=st.integers(1, 20).flatmap(
        lambda total: st.lists(
            st.lists(st.integers(0, total), max_size=5).map(lambda cuts: sorted({0, *cuts, total})),
            min_size=1,
            max_size=3,
        )
    ),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_documents_are_kept_apart_as_far_as_asked(rows: list[list[int]], options: tuple[bool, bool, bool]) -> None:
    lengths = [np.diff(cuts) for cuts in rows]
    length = rows[0][-1] - 1
    mask_loss, reset_positions, reset_attention = options
    found = by_document(
        lengths,
        DataConfig(eod_mask_loss=mask_loss, reset_position_ids=reset_positions, reset_attention_mask=reset_attention),
    )
    names = ("loss_mask", "position_ids", "attention_mask")
    assert found.keys() == {name for name, wanted in zip(names, options, strict=True) if wanted}
    for b, row in enumerate(lengths):
        document = [number for number, n in enumerate(row.tolist()) for _ in range(n)]
        for i in range(length):
            if mask_loss:
                assert found["loss_mask"][b, i] == float(document[i] == document[i + 1])
            if reset_positions:
                assert found["position_ids"][b, i] == i - document.index(document[i])
            if reset_attention:
                allowed = [document[j] == document[i] and j <= i for j in range(length)]
                assert (~found["attention_mask"][b, 0, i]).tolist() == allowed
    shapes = {"loss_mask": (length,), "position_ids": (length,), "attention_mask": (1, length, length)}
    types = {"loss_mask": torch.float32, "position_ids": torch.int64, "attention_mask": torch.bool}
    for name, tensor in found.items():
        assert (tuple(tensor.shape[1:]), tensor.dtype) == (shapes[name], types[name])


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 40), min_size=3, max_size=60), sequence_length=st.integers(1, 24))
def test_pieces_follow_the_documents_and_the_token_that_ends_them(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int
) -> None:
    if sum(lengths) <= sequence_length:
        return
    folder = tmp_path_factory.mktemp("pieces")
    documents = [tuple(d.tolist()) for d in write_documents(folder / "a", lengths, len(lengths))]
    cache = ArrayCache(folder / "cache")
    options = {"sequence_length": sequence_length, "vocab_size": 100, "seed": 1, "cache": cache}
    dataset = PackedDataset(examine(str(folder / "a")), None, **options)
    everything = DataConfig(eod_mask_loss=True, reset_position_ids=True)
    for index in range(2 * len(dataset)):
        row = dataset.document_lengths(index)
        assert row.sum() == sequence_length + 1
        assert row.min() > 0
        ids = dataset[index].tolist()
        ends = np.cumsum(row).tolist()
        pieces = [tuple(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for piece in pieces[1:-1]:
            assert piece in documents
        if len(pieces) > 1:
            assert any(document[-len(pieces[0]) :] == pieces[0] for document in documents)
            assert any(document[: len(pieces[-1])] == pieces[-1] for document in documents)
        found = by_document([row], everything)
        since_end = list(itertools.accumulate(ids[:-2], lambda n, token: 0 if token == END else n + 1, initial=0))
        assert found["position_ids"][0].tolist() == since_end
        assert found["loss_mask"][0].tolist() == [float(token != END) for token in ids[:-1]]


def test_empty_documents_leave_no_piece(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", np.uint16)
    writer.append(np.r_[50:60, 1:21], np.array([0, 10, 0, 0, 20, 0]))
    writer.finish()
    options = {"sequence_length": 4, "vocab_size": 100, "seed": 1, "cache": ArrayCache(tmp_path / "cache")}
    dataset = PackedDataset(examine(str(tmp_path / "a")), None, **options)
    for index in range(3 * len(dataset)):
        row = dataset.document_lengths(index)
        assert row.min() > 0
        begins = (np.cumsum(row) - row).tolist()
        ids = dataset[index]
        assert [i for i in range(1, 5) if ids[i] != ids[i - 1] + 1] == begins[1:]


def test_samples_beyond_the_end_do_not_count(blend: BlendedDataset) -> None:
    batches = micro_batches(
        blend,
        first_sample=0,
        end=5,
        micro_batch_size=2,
        options=DataConfig(eod_mask_loss=True),
        pg_collection=Groups(Group(2, 0)),
        device=torch.device("cpu"),
    )
    masks = {
        i: mask
        for batch in itertools.islice(batches, 2)
        for i, mask in zip(batch["sample_ids"].tolist(), batch["loss_mask"], strict=True)
    }
    assert sorted(masks) == [0, 1, 4, 5]
    assert [bool(masks[i].any()) for i in (0, 1, 4, 5)] == [True, True, True, False]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_cannot_be_read_is_told_without_a_traceback(blend: BlendedDataset, num_workers: int) -> None:
    source = blend.datasets[0]
    options = {"sequence_length": 16, "vocab_size": 50, "seed": 1, "cache": source._cache}
    batches = micro_batches(
        BlendedDataset([PackedDataset(source.files, None, **options)], [1.0]),
        first_sample=0,
        micro_batch_size=8,
        options=DataConfig(sequence_length=16, num_workers=num_workers),
        pg_collection=Groups(Group()),
        device=torch.device("cpu"),
    )
    with pytest.raises(ConfigError) as error:
        next(batches)
    assert re.fullmatch(r"\S+long: holds token id \d+; model.vocab_size=50 must be larger .*", str(error.value))
