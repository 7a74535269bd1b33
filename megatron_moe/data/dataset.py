"""Sequences by number: what sample `i` holds depends on the data and the seed, never on ranks or steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Protocol

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.config.derived import samples_before
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Config, DataKind, DataSource
from megatron_moe.data.corpus import prepare_python_stdlib


class SequenceDataset(Protocol):
    """Numbered sequences of sequence_length + 1 token ids; `len` is one epoch, numbers go on beyond it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class EpochOrder:
    """How an epoch goes through the data.

    Attributes:
        documents: their order, [documents].
        cuts: (index into that order, offset in tokens) where each sequence begins, [sequences + 1, 2].
        sequences: their order, [sequences].
    """

    documents: np.ndarray
    cuts: np.ndarray
    sequences: np.ndarray


class PackedDataset:
    """The documents of one indexed dataset, put end to end and cut into sequences.

    Each epoch has its own order of documents and then of sequences, so that a sample is a function of seed and number.
    The order is held in memory, 24 bytes a sequence and 4 a document.

    Raises:
        ConfigError: the files are no indexed dataset, or too short for one sequence.
    """

    def __init__(self, prefix: str, sequence_length: int, *, seed: int) -> None:
        self.documents = open_indexed(prefix)
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_tokens = int(self.documents.sequence_lengths.sum(dtype=np.int64))
        if len(self) < 1:
            raise ConfigError(
                f"{prefix}: holds {self.num_tokens} tokens, fewer than one sequence of data.sequence_length="
                f"{sequence_length} and its target"
            )
        self._orders: dict[int, EpochOrder] = {}

    def __len__(self) -> int:
        return (self.num_tokens - 1) // self.sequence_length

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, position = divmod(index, len(self))
        order = self._order(epoch)
        position = order.sequences[position]
        (first, start), (last, end) = order.cuts[position], order.cuts[position + 1]
        parts = [
            self.documents.get(
                int(order.documents[i]),
                offset=int(start) if i == first else 0,
                length=int(end) + 1 - (int(start) if i == first else 0) if i == last else None,
            )
            for i in range(first, last + 1)
        ]
        return np.concatenate(parts).astype(np.int64)

    def _order(self, epoch: int) -> EpochOrder:
        """Of an epoch; two are kept, for readers on both sides of a boundary."""
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
            self._orders[epoch] = self._draw_order(epoch)
        return self._orders[epoch]

    def _draw_order(self, epoch: int) -> EpochOrder:
        random = np.random.default_rng((self.seed, epoch))
        lengths = np.array(self.documents.sequence_lengths)
        documents = random.permutation(len(lengths)).astype(np.int32)
        cuts = helpers.build_sample_idx(lengths, documents, self.sequence_length, 1, self.num_tokens)
        return EpochOrder(documents, cuts, random.permutation(len(self)))


class BlendedDataset:
    """Several datasets in fixed shares: after any number of samples each has its share to within one sample."""

    def __init__(self, datasets: Sequence[SequenceDataset], weights: Sequence[float], num_samples: int) -> None:
        self.datasets = datasets
        self.source = np.zeros(num_samples, dtype=np.int16)
        self.position = np.zeros(num_samples, dtype=np.int64)
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        helpers.build_blending_indices(self.source, self.position, shares, len(datasets), num_samples, False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        index %= len(self)  # an evaluation may be rounded up to whole micro batches
        return self.datasets[self.source[index]][int(self.position[index])]


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


def open_indexed(prefix: str) -> IndexedDataset:
    """Open `prefix`.bin and `prefix`.idx, once their sizes agree with what the index says.

    Raises:
        ConfigError: they are damaged, empty, or do not belong together.

    Source of the format: mcore 0.16.1, datasets/indexed_dataset.py, _IndexWriter.
    """
    header = Struct("<9sQBQQ")  # magic, version, type of the ids, sequences, document boundaries
    index, ids = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if missing := [str(path) for path in (index, ids) if not path.is_file()]:
        raise ConfigError(f"{prefix}: no such file: {', '.join(missing)}")
    with index.open("rb") as file:
        start = file.read(header.size)
    if len(start) < header.size or not start.startswith(b"MMIDIDX"):
        raise ConfigError(f"{index}: is no index of an indexed dataset")
    *_, sequences, boundaries = header.unpack(start)
    _check_size(index, header.size + 12 * sequences + 8 * boundaries)
    if ids.stat().st_size == 0:
        raise ConfigError(f"{ids}: holds no tokens")
    dataset = IndexedDataset(prefix)
    num_tokens = int(dataset.sequence_lengths.sum(dtype=np.int64))
    _check_size(ids, num_tokens * np.dtype(dataset.index.dtype).itemsize)
    return dataset


def _check_size(path: Path, expected: int) -> None:
    if path.stat().st_size != expected:
        raise ConfigError(
            f"{path}: has {path.stat().st_size} bytes where its index describes {expected}; it is damaged"
        )


def build_datasets(config: Config) -> tuple[SequenceDataset, SequenceDataset | None]:
    """Training and held-out sequences; the latter None if `data=blend` gives none.

    Raises:
        ConfigError: a dataset is too short, or holds ids beyond the vocabulary.
    """
    data = config.data
    num_train = samples_before(config, config.train.train_steps)
    if data.kind is DataKind.mock:
        vocab_size, length = config.model.vocab_size, data.sequence_length
        return MockDataset(vocab_size, length, seed=data.seed), MockDataset(vocab_size, length, seed=data.seed + 1)
    if data.kind is DataKind.python_stdlib:
        folder = prepare_python_stdlib(data)
        train, valid = [DataSource(path=str(folder / "train"))], [DataSource(path=str(folder / "valid"))]
    else:
        train, valid = data.train, data.valid
    return _blend(config, train, num_train), _held_out(config, valid)


def held_out_sources(config: Config, paths: dict[str, str]) -> dict[str, SequenceDataset]:
    """Held-out sequences by source: the indexed datasets at `paths`, by default those of a run.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    if not paths and config.data.kind is DataKind.python_stdlib:
        _, held_out = build_datasets(config)
        return {config.data.kind.value: held_out}
    sources = paths or {source.path: source.path for source in config.data.valid}
    if not sources:
        raise ConfigError(f"data.kind={config.data.kind.value}: there is no held-out text; name indexed datasets")
    return {name: _blend(config, [DataSource(path=path)], 0) for name, path in sources.items()}


def tokenizer_file(config: Config) -> Path | None:
    """The tokenizer that made the ids, where it is known."""
    data = config.data
    if data.kind is DataKind.python_stdlib:
        return prepare_python_stdlib(data) / "tokenizer.json"
    return Path(data.tokenizer) if data.tokenizer else None


def _blend(config: Config, sources: Sequence[DataSource], num_samples: int) -> SequenceDataset:
    data = config.data
    datasets = [PackedDataset(s.path, data.sequence_length, seed=data.seed) for s in sources]
    for source, dataset in zip(sources, datasets, strict=True):
        _check_vocabulary(config.model.vocab_size, source.path, dataset)
    if len(datasets) == 1:
        return datasets[0]
    return BlendedDataset(datasets, [s.weight for s in sources], num_samples)


def _held_out(config: Config, sources: Sequence[DataSource]) -> SequenceDataset | None:
    if not sources:
        return None
    num_samples = config.evaluation.num_samples or sum(
        len(PackedDataset(s.path, config.data.sequence_length, seed=0)) for s in sources
    )
    return _blend(config, sources, num_samples)


def _check_vocabulary(vocab_size: int, path: str, dataset: PackedDataset) -> None:
    """Look at the first sequences only: reading a whole corpus at start-up would take hours."""
    largest = max(int(dataset[i].max()) for i in range(min(len(dataset), 64)))
    if largest >= vocab_size:
        raise ConfigError(
            f"{Path(path)}: holds token id {largest}; model.vocab_size={vocab_size} must be larger than every id"
        )


def unigram_entropy(dataset: SequenceDataset, num_samples: int) -> float:
    """Entropy in nats of the targets of the first samples: the loss of a model that knows only token frequencies."""
    counts: np.ndarray = np.zeros(0, dtype=np.int64)
    for index in range(num_samples):
        new = np.bincount(dataset[index][1:], minlength=len(counts))
        new[: len(counts)] += counts
        counts = new
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
