"""Sequences by number: what sample `i` holds depends on the data and the seed, never on ranks or steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Config, DataKind, DataSource
from megatron_moe.data.corpus import prepare_python_stdlib


class SequenceDataset(Protocol):
    """Numbered sequences of sequence_length + 1 token ids; `len` is one epoch, numbers go on beyond it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


class PackedDataset:
    """The documents of one indexed dataset, put end to end and cut into sequences.

    Each epoch has its own order of documents and then of sequences, so that a sample is a function of seed and number.
    """

    def __init__(self, prefix: str, sequence_length: int, *, seed: int) -> None:
        self.documents = IndexedDataset(prefix)
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_tokens = int(self.documents.sequence_lengths.sum(dtype=np.int64))
        if len(self) < 1:
            raise ConfigError(
                f"{prefix}: holds {self.num_tokens} tokens, fewer than one sequence of data.sequence_length="
                f"{sequence_length} and its target"
            )
        self._epoch = -1

    def __len__(self) -> int:
        return (self.num_tokens - 1) // self.sequence_length

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, position = divmod(index, len(self))
        if epoch != self._epoch:
            self._order(epoch)
        position = self._sequence_order[position]
        (first, start), (last, end) = self._cuts[position], self._cuts[position + 1]
        parts = [
            self.documents.get(
                int(self._document_order[i]),
                offset=int(start) if i == first else 0,
                length=int(end) + 1 - (int(start) if i == first else 0) if i == last else None,
            )
            for i in range(first, last + 1)
        ]
        return np.concatenate(parts).astype(np.int64)

    def _order(self, epoch: int) -> None:
        """Order documents and sequences for an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        lengths = np.array(self.documents.sequence_lengths)
        self._document_order = random.permutation(len(lengths)).astype(np.int32)
        self._sequence_order = random.permutation(len(self))
        # mcore's C++ helper: rows of (index into the document order, offset) where each sequence begins
        self._cuts = helpers.build_sample_idx(lengths, self._document_order, self.sequence_length, 1, self.num_tokens)
        self._epoch = epoch


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


def build_datasets(config: Config) -> tuple[SequenceDataset, SequenceDataset | None]:
    """Training and held-out sequences; the latter None if `data=blend` gives none.

    Raises:
        ConfigError: a dataset is too short, or holds ids beyond the vocabulary.
    """
    data = config.data
    num_train = config.train.train_steps * config.train.global_batch_size
    if data.kind is DataKind.mock:
        vocab_size, length = config.model.vocab_size, data.sequence_length
        return MockDataset(vocab_size, length, seed=data.seed), MockDataset(vocab_size, length, seed=data.seed + 1)
    if data.kind is DataKind.python_stdlib:
        folder = prepare_python_stdlib(data)
        train, valid = [DataSource(path=str(folder / "train"))], [DataSource(path=str(folder / "valid"))]
    else:
        train, valid = data.train, data.valid
    return _blend(config, train, num_train), _held_out(config, valid)


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
