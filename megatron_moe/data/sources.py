"""From a configuration to training, validation and test sequences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_moe.config.derived import samples_before, source_name
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Config, DataConfig, DataKind, DataSource
from megatron_moe.data.cache import ArrayCache
from megatron_moe.data.corpus import prepare_python_stdlib
from megatron_moe.data.dataset import (
    BlendedDataset,
    IndexedFiles,
    MockDataset,
    PackedDataset,
    SequenceDataset,
    check_vocabulary,
    examine,
)
from megatron_moe.data.indexed import sha256_of, with_ending
from megatron_moe.data.order import split_documents
from megatron_moe.data.tokenizer import tokenizer_file
from megatron_moe.distributed.context import from_main


@dataclass(frozen=True)
class HeldOut:
    """Held-out sequences of one source.

    Attributes:
        name: in the metrics.
        sequences: all of them.
        weight: of its loss in the mean of all sources.
        tokens_per_byte: of the source's text; None where it is not known.
    """

    name: str
    sequences: SequenceDataset
    weight: float
    tokens_per_byte: float | None


@dataclass(frozen=True)
class Datasets:
    """What a run reads.

    Attributes:
        train: training sequences.
        valid: for the loss at intervals.
        test: for the loss at the end.
        tokenizer: the file that made the ids, where it is known.
        fingerprints: of the training sources, by name; a run goes on with the same ones only.
    """

    train: SequenceDataset
    valid: list[HeldOut]
    test: list[HeldOut]
    tokenizer: Path | None
    fingerprints: dict[str, str]


def build_datasets(config: Config) -> Datasets:
    """Open everything; on all ranks, of which the first looks at the files.

    Raises:
        ConfigError: a dataset is damaged, too short, holds ids beyond the vocabulary, or was made by another tokenizer.
    """
    if config.data.kind is DataKind.mock:
        vocab_size, length, seed = config.model.vocab_size, config.data.sequence_length, config.data.seed
        train, valid = (MockDataset(vocab_size, length, seed=seed + i) for i in range(2))
        return Datasets(train, [HeldOut("mock", valid, 1.0, None)], [], None, {})
    data = _indexed(config.data)
    return _open(data, config.model.vocab_size, from_main(lambda: _examine_all(data, config.model.vocab_size)))


def held_out_sources(config: Config, paths: dict[str, str]) -> dict[str, SequenceDataset]:
    """Held-out sequences by source: the indexed datasets at `paths`, by default those of a run.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    data, vocab_size = config.data, config.model.vocab_size
    held_out = []
    if paths:
        named = [DataSource(path=path, name=name) for name, path in paths.items()]
        data = replace(data, kind=DataKind.blend, train=[], valid=named, test=[], valid_fraction=0.0, test_fraction=0.0)
        held_out = _held_out(data, "valid", vocab_size, _examine_all(data, vocab_size))
    elif data.kind is not DataKind.mock:
        held_out = build_datasets(config).valid
    if not held_out:
        raise ConfigError(f"data.kind={data.kind.value}: there is no held-out text; name indexed datasets")
    return {source.name: source.sequences for source in held_out}


def _indexed(data: DataConfig) -> DataConfig:
    """The same as a blend of indexed datasets, which are made where they are not there yet."""
    if data.kind is DataKind.blend:
        return data
    folder = Path(from_main(lambda: str(prepare_python_stdlib(data))))
    train, valid = (DataSource(path=str(folder / name), name=data.kind.value) for name in ("train", "valid"))
    return replace(data, kind=DataKind.blend, train=[train], valid=[valid], valid_fraction=0.0)


def _examine_all(data: DataConfig, vocab_size: int) -> dict[str, IndexedFiles]:
    found, problems = {}, []
    for path in dict.fromkeys(source.path for source in [*data.train, *data.valid, *data.test]):
        try:
            found[path] = examine(path)
            check_vocabulary(found[path], vocab_size)
        except ConfigError as error:
            problems += error.problems
    problems += _tokenizer_problems(data, found.values())
    if problems:
        raise ConfigError(*problems)
    return found


def _tokenizer_problems(data: DataConfig, files: Iterable[IndexedFiles]) -> list[str]:
    """Where ids that go together were made by different tokenizers."""
    known = {f.prefix: f.manifest.tokenizer_sha256 for f in files if f.manifest is not None}
    if data.tokenizer is not None:
        expected, name = sha256_of(tokenizer_file(Path(data.tokenizer))), f"data.tokenizer={data.tokenizer}"
    elif known:
        name, expected = next(iter(known.items()))
    return [
        f"{prefix}.manifest.json: its ids were made by another tokenizer (sha256 {digest[:12]}...) than {name} "
        f"({expected[:12]}...); preprocess it again"
        for prefix, digest in known.items()
        if digest != expected
    ]


def _open(data: DataConfig, vocab_size: int, files: dict[str, IndexedFiles]) -> Datasets:
    train = [_packed(data, files[source.path], "train", vocab_size) for source in data.train]
    return Datasets(
        train=BlendedDataset(train, [source.weight for source in data.train]),
        valid=_held_out(data, "valid", vocab_size, files),
        test=_held_out(data, "test", vocab_size, files),
        tokenizer=_tokenizer_file(data),
        fingerprints={source_name(source): files[source.path].fingerprint for source in data.train},
    )


def _held_out(data: DataConfig, part: str, vocab_size: int, files: dict[str, IndexedFiles]) -> list[HeldOut]:
    """The datasets of a part, or where it has none the documents of the training sources that are dealt to it."""
    own = getattr(data, part)
    if not own and not getattr(data, f"{part}_fraction"):
        return []
    return [
        HeldOut(
            source_name(source),
            _packed(data, files[source.path], "all" if own else part, vocab_size),
            source.weight,
            files[source.path].tokens_per_byte,
        )
        for source in own or data.train
    ]


def _packed(data: DataConfig, files: IndexedFiles, part: str, vocab_size: int) -> PackedDataset:
    """All documents of a dataset, or those dealt to a part."""
    cache = ArrayCache(Path(data.cache_dir), Path(data.local_cache_dir) if data.local_cache_dir else None)
    shares = {"valid": data.valid_fraction, "test": data.test_fraction}
    documents: np.ndarray | None = None
    if part != "all" and any(shares.values()):
        key = {"fingerprint": files.fingerprint, "shares": shares, "seed": data.seed}
        documents = cache.get("split", key, lambda: split_documents(files.num_documents, shares, data.seed))[part]
    return PackedDataset(
        files,
        documents,
        sequence_length=data.sequence_length,
        vocab_size=vocab_size,
        seed=data.seed,
        cache=cache,
    )


def _tokenizer_file(data: DataConfig) -> Path | None:
    """As given, else the one beside the first training source."""
    if data.tokenizer is not None:
        return tokenizer_file(Path(data.tokenizer))
    path = with_ending(data.train[0].path, "tokenizer.json")
    return path if path.is_file() else None


@dataclass(frozen=True)
class SourceUse:
    """What a run makes of a training source.

    Attributes:
        name: of the source.
        documents: that it trains on.
        tokens: in these.
        share: of the samples.
        samples: in the whole run.
        epochs: passes over its documents in the whole run.
    """

    name: str
    documents: int
    tokens: int
    share: float
    samples: float
    epochs: float


def source_uses(config: Config, datasets: Datasets) -> list[SourceUse]:
    """Of all training sources; none on random tokens."""
    if not isinstance(datasets.train, BlendedDataset):
        return []
    num_samples = samples_before(config, config.train.train_steps)
    return [
        SourceUse(
            name=name,
            documents=len(source.lengths),
            tokens=source.num_tokens,
            share=share,
            samples=num_samples * share,
            epochs=num_samples * share / len(source),
        )
        for name, source, share in zip(
            datasets.fingerprints, datasets.train.datasets, datasets.train.shares, strict=True
        )
    ]
