"""Sequences by number: what sample `i` holds depends on the data and the seed, never on ranks or steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.config.errors import ConfigError
from megatron_moe.data.cache import ArrayCache
from megatron_moe.data.indexed import HEADER, MAGIC, TYPE_CODES, Manifest, read_manifest, with_ending
from megatron_moe.data.order import FORMAT, draw_epoch, period_of, turns

LOOKED_AT = 64 * 2**20  # bytes of the ids that a fingerprint covers, spread over the file


class SequenceDataset(Protocol):
    """Numbered sequences of sequence_length + 1 token ids; `len` is one epoch, numbers go on beyond it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...

    def document_lengths(self, index: int) -> np.ndarray:
        """Tokens of a sequence that come from one document, in order; they add up to sequence_length + 1."""
        ...


@dataclass(frozen=True)
class IndexedFiles:
    """An indexed dataset that was looked at, by one process for all.

    Attributes:
        prefix: its path without ending.
        fingerprint: of its lengths, of LOOKED_AT bytes of its ids (all where it has no more), of the digest of all ids
            that its manifest tells, and of FORMAT.
        num_documents: in it.
        smallest_id: of the bytes looked at, at most 0.
        largest_id: of these, or by its manifest.
        manifest: None if it has none.
    """

    prefix: str
    fingerprint: str
    num_documents: int
    smallest_id: int
    largest_id: int
    manifest: Manifest | None

    @property
    def tokens_per_byte(self) -> float | None:
        """Of its text in UTF-8; None where no manifest says how long that was."""
        known = self.manifest is not None and self.manifest.text_bytes
        return self.manifest.tokens / self.manifest.text_bytes if known else None


def examine(prefix: str) -> IndexedFiles:
    """Look at a dataset before use.

    Raises:
        ConfigError: it is damaged, empty, or its files do not belong together.
    """
    dataset = open_indexed(prefix)
    itemsize = np.dtype(dataset.index.dtype).itemsize
    ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64) * itemsize
    starts = np.concatenate(([0], ends[:-1]))
    if dataset.sequence_lengths.min() < 0 or not np.array_equal(dataset.index.sequence_pointers, starts):
        raise ConfigError(f"{prefix}.idx: does not name documents one after another; it is damaged")
    manifest = read_manifest(prefix)
    num_tokens = int(ends[-1]) // itemsize
    if manifest is not None and (manifest.documents, manifest.tokens) != (len(dataset), num_tokens):
        raise ConfigError(
            f"{prefix}.manifest.json: tells of {manifest.documents:,} documents and {manifest.tokens:,} tokens where "
            f"{prefix}.idx has {len(dataset):,} and {num_tokens:,}; they do not belong together"
        )
    fingerprint, smallest_id, largest_id = _look_at(prefix, dataset.index.dtype, manifest)
    return IndexedFiles(prefix, fingerprint, len(dataset), smallest_id, largest_id, manifest)


def _look_at(prefix: str, dtype: type[np.number], manifest: Manifest | None) -> tuple[str, int, int]:
    """Fingerprint, and smallest and largest id that are known."""
    with with_ending(prefix, "idx").open("rb") as index:
        digest = hashlib.file_digest(index, "sha256")
    digest.update(f"{FORMAT}{manifest.bin_sha256 if manifest else ''}".encode())
    path, block = with_ending(prefix, "bin"), 2**20
    smallest, largest = 0, manifest.largest_id if manifest else 0
    size = path.stat().st_size
    num_blocks = min(-(-size // block), LOOKED_AT // block)
    with path.open("rb") as ids:
        for i in range(num_blocks):
            ids.seek(i * (-(-size // block)) // num_blocks * block)
            data = ids.read(block)
            digest.update(data)
            seen = np.frombuffer(data, dtype)
            smallest, largest = min(smallest, int(seen.min())), max(largest, int(seen.max()))
    return digest.hexdigest(), smallest, largest


def open_indexed(prefix: str) -> IndexedDataset:
    """Open `prefix`.bin and `prefix`.idx, once their sizes agree with what the index says.

    Raises:
        ConfigError: they are damaged, empty, or do not belong together.

    Source of the format: mcore 0.16.1, datasets/indexed_dataset.py, _IndexWriter.
    """
    index, ids = with_ending(prefix, "idx"), with_ending(prefix, "bin")
    if missing := [str(path) for path in (index, ids) if not path.is_file()]:
        raise ConfigError(f"{prefix}: no such file: {', '.join(missing)}; give the path without its ending")
    with index.open("rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size or not start.startswith(MAGIC):
        raise ConfigError(f"{index}: is no index of an indexed dataset")
    _, version, code, sequences, boundaries = HEADER.unpack(start)
    if version != 1 or code not in TYPE_CODES:
        raise ConfigError(f"{index}: version {version}, type of ids {code}: neither is known; it is damaged")
    _check_size(index, HEADER.size + 12 * sequences + 8 * boundaries)
    if ids.stat().st_size == 0 or sequences == 0:
        raise ConfigError(f"{ids}: holds no tokens")
    if boundaries == 0 or np.fromfile(index, "<i8", offset=index.stat().st_size - 8)[0] != sequences:
        raise ConfigError(f"{index}: does not end documents where its sequences end; it is damaged")
    dataset = IndexedDataset(prefix)
    num_tokens = int(dataset.sequence_lengths.sum(dtype=np.int64))
    _check_size(ids, num_tokens * np.dtype(dataset.index.dtype).itemsize)
    return dataset


def _check_size(path: Path, expected: int) -> None:
    if path.stat().st_size != expected:
        raise ConfigError(
            f"{path}: has {path.stat().st_size} bytes where its index describes {expected}; it is damaged: copy it, or "
            "preprocess, again"
        )


class PackedDataset:
    """Documents of one indexed dataset, put end to end and cut into sequences.

    Each epoch has its own order of documents and then of sequences, so that a sample is a function of seed and number.

    Args:
        files: looked at.
        documents: numbers of those that belong to it, rising; None: all.
        sequence_length: of a sample, which has one token more.
        vocab_size: that every id is below.
        seed: of the orders.
        cache: where these lie.

    Raises:
        ConfigError: there is not enough for one sequence; and, at a sample, an id is too large.
    """

    def __init__(
        self,
        files: IndexedFiles,
        documents: np.ndarray | None,
        *,
        sequence_length: int,
        vocab_size: int,
        seed: int,
        cache: ArrayCache,
    ) -> None:
        self.files = files
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.seed = seed
        self._cache = cache
        self._indexed = open_indexed(files.prefix)
        self._documents = documents
        self._part = "all" if documents is None else hashlib.sha256(documents.tobytes()).hexdigest()
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        if len(self) < 1:
            raise ConfigError(
                f"{files.prefix}: {len(self.lengths):,} of its {files.num_documents:,} documents, with "
                f"{self.num_tokens:,} tokens, are fewer than one sequence of data.sequence_length={sequence_length} "
                "and its target" + ("" if documents is None else "; data.valid_fraction, data.test_fraction deal out")
            )
        self._orders: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.sequence_length

    def __getitem__(self, index: int) -> np.ndarray:
        ids = np.concatenate([self._indexed.get(*part) for part in self.pieces(index)])
        _check_ids(self.files.prefix, int(ids.min()), int(ids.max()), self.vocab_size)
        return ids.astype(np.int64)

    def document_lengths(self, index: int) -> np.ndarray:
        """See SequenceDataset."""
        return np.array([length for _, _, length in self.pieces(index)])

    @property
    def lengths(self) -> np.ndarray:
        """Of its documents, in tokens."""
        lengths = self._indexed.sequence_lengths
        return lengths if self._documents is None else lengths[self._documents]

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """The pieces of documents that make up a sequence: document, offset, length."""
        epoch, position = divmod(index, len(self))
        order = self._order(epoch)
        position = order["sequences"][position]
        (first, start), (last, end) = order["cuts"][position : position + 2].tolist()
        documents = order["documents"][first : last + 1]
        starts = np.zeros(len(documents), dtype=np.int64)
        ends = self._indexed.sequence_lengths[documents].astype(np.int64)
        starts[0], ends[-1] = start, end + 1
        pieces = zip(documents.tolist(), starts.tolist(), (ends - starts).tolist(), strict=True)
        return [piece for piece in pieces if piece[2]]

    def _order(self, epoch: int) -> dict[str, np.ndarray]:
        """Of an epoch; two are kept, for readers on both sides of a boundary."""
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
            key = {
                "format": FORMAT,
                "fingerprint": self.files.fingerprint,
                "documents": self._part,
                "sequence_length": self.sequence_length,
                "seed": self.seed,
                "epoch": epoch,
            }
            self._orders[epoch] = self._cache.get("order", key, lambda: self._draw(epoch))
        return self._orders[epoch]

    def _draw(self, epoch: int) -> dict[str, np.ndarray]:
        lengths = np.array(self._indexed.sequence_lengths)
        documents = np.arange(len(lengths), dtype=np.int32) if self._documents is None else self._documents
        return draw_epoch(lengths, documents, self.sequence_length, seed=self.seed, epoch=epoch)


def check_vocabulary(files: IndexedFiles, vocab_size: int) -> None:
    """Compare what is known of the ids with the model.

    Raises:
        ConfigError: one is too large for it.
    """
    _check_ids(files.prefix, files.smallest_id, files.largest_id, vocab_size)


def _check_ids(prefix: str, smallest: int, largest: int, vocab_size: int) -> None:
    if smallest < 0:
        raise ConfigError(f"{prefix}: holds token id {smallest}; it is damaged")
    if largest >= vocab_size:
        raise ConfigError(
            f"{prefix}: holds token id {largest}; model.vocab_size={vocab_size} must be larger than every id"
        )


class BlendedDataset:
    """Datasets in fixed shares: after any number of samples each has its share, in millionths, to within one sample.

    Raises:
        ConfigError: a share is too small to come up.
    """

    def __init__(self, datasets: Sequence[PackedDataset], weights: Sequence[float]) -> None:
        self.datasets = datasets
        self.counts = period_of(weights)
        if 0 in self.counts:
            raise ConfigError(f"data.train weights {list(weights)}: the smallest is less than one sample in a million")
        self._turns = turns(self.counts)
        self._earlier = np.zeros(len(self._turns), dtype=np.int32)  # samples of the same source before, in the period
        for source, count in enumerate(self.counts):
            self._earlier[self._turns == source] = np.arange(count)

    def __len__(self) -> int:
        """Samples until the first source begins its second epoch."""
        period = len(self._turns)
        return min(len(d) * period // count for d, count in zip(self.datasets, self.counts, strict=True))

    def __getitem__(self, index: int) -> np.ndarray:
        source, number = self.place(index)
        return self.datasets[source][number]

    def document_lengths(self, index: int) -> np.ndarray:
        """See SequenceDataset."""
        source, number = self.place(index)
        return self.datasets[source].document_lengths(number)

    @property
    def shares(self) -> list[float]:
        """Of the samples, by dataset."""
        return [count / len(self._turns) for count in self.counts]

    def place(self, index: int) -> tuple[int, int]:
        """Which source a sample comes from, and its number there."""
        period, position = divmod(index, len(self._turns))
        source = int(self._turns[position])
        return source, period * self.counts[source] + int(self._earlier[position])


class MockDataset:
    """Random token ids, for shapes and speed."""

    def __init__(self, vocab_size: int, sequence_length: int, *, seed: int) -> None:
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.seed = seed

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, index))
        return random.integers(self.vocab_size, size=self.sequence_length + 1)

    def document_lengths(self, index: int) -> np.ndarray:
        """See SequenceDataset."""
        return np.array([self.sequence_length + 1])


def unigram_entropy(samples: Sequence[tuple[SequenceDataset, int, float]]) -> float:
    """Entropy in nats of the targets of a mixture: the loss of a model that knows only token frequencies.

    Args:
        samples: of each source, how many of its first samples to count, and its weight.
    """
    total: np.ndarray = np.zeros(0)
    weights = sum(weight for _, _, weight in samples)
    for dataset, num_samples, weight in samples:
        total = _sum(total, _frequencies(dataset, num_samples) * weight / weights)
    shares = total[total > 0]
    return float(-(shares * np.log(shares)).sum())


def _frequencies(dataset: SequenceDataset, num_samples: int) -> np.ndarray:
    counts: np.ndarray = np.zeros(0)
    for index in range(num_samples):
        counts = _sum(counts, np.bincount(dataset[index][1:]))
    return counts / counts.sum()


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of counts by id, which end at the largest id seen."""
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))
