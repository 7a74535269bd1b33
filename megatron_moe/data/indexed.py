"""Writing megatron-core's indexed datasets in bounded memory, and the manifest beside them. Imports no torch.

PREFIX.bin holds the token ids, PREFIX.idx where each document lies in it, PREFIX.manifest.json what they were made of,
PREFIX.tokenizer.json what made them.

Source of the format: mcore 0.16.1, datasets/indexed_dataset.py, _IndexWriter.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np

from megatron_moe.config.errors import ConfigError
from megatron_moe.files import write_json

MAGIC = b"MMIDIDX\0\0"
HEADER = Struct("<9sQBQQ")  # magic, version, code of the type of the ids, sequences, document boundaries
TYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 2**20  # documents


def id_type(vocab_size: int) -> type[np.integer]:
    """The narrowest type that megatron-core takes for a vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


def with_ending(prefix: Path | str, ending: str) -> Path:
    """`prefix`.`ending`, whatever points the prefix has."""
    return Path(f"{prefix}.{ending}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset holds and was made of, in PREFIX.manifest.json.

    Attributes:
        documents: their number.
        tokens: their number, those that end a document included.
        text_bytes: of the documents, in UTF-8.
        largest_id: of all tokens.
        vocab_size: of the tokenizer.
        end_of_document: id of the token after each document; None: there is none.
        tokenizer_sha256: of PREFIX.tokenizer.json.
        bin_sha256: of PREFIX.bin.
        idx_sha256: of PREFIX.idx.
        sources: files that the text came from: path, size in bytes and sha256.
        options: how they were read.
        skipped: records that are no document, by kind of problem.
    """

    documents: int
    tokens: int
    text_bytes: int
    largest_id: int
    vocab_size: int
    end_of_document: int | None
    tokenizer_sha256: str
    bin_sha256: str
    idx_sha256: str
    sources: list[dict[str, Any]]
    options: dict[str, Any]
    skipped: dict[str, int]

    @staticmethod
    def of(prefix: Path, **facts: Any) -> Manifest:
        """The manifest of the files `prefix`.bin, .idx and .tokenizer.json: their digests, and what else is known."""
        return Manifest(
            tokenizer_sha256=sha256_of(with_ending(prefix, "tokenizer.json")),
            bin_sha256=sha256_of(with_ending(prefix, "bin")),
            idx_sha256=sha256_of(with_ending(prefix, "idx")),
            **facts,
        )

    def write(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, asdict(self))


def read_manifest(prefix: Path | str) -> Manifest | None:
    """The manifest of a dataset, None if it has none.

    Raises:
        ConfigError: the file is not a manifest.
    """
    path = with_ending(prefix, "manifest.json")
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = {field.name: values[field.name] for field in fields(Manifest)}
        if wrong := [field.name for field in fields(Manifest) if not isinstance(found[field.name], _kind(field.type))]:
            raise TypeError(f"wrong type of {', '.join(wrong)}")
        return Manifest(**found)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: is no manifest of a dataset ({error}); remove it, or preprocess again") from None


def _kind(annotation: str) -> tuple[type, ...]:
    kinds = {"int": int, "str": str, "list": list, "dict": dict, "None": type(None)}
    return tuple(kinds[name.split("[")[0]] for name in annotation.split(" | "))


def sha256_of(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class IndexedWriter:
    """Appends documents to `prefix`.bin; their lengths wait in `prefix`.lengths for `prefix`.idx to be written.

    Args:
        prefix: path without ending.
        dtype: of the ids.
        num_documents: to keep of what the files hold; the rest is cut off.
        num_tokens: likewise.

    Raises:
        ConfigError: the files hold less.
    """

    def __init__(self, prefix: Path, dtype: type[np.integer], num_documents: int = 0, num_tokens: int = 0) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self._lengths_path = with_ending(prefix, "lengths")
        self._ids = _open_at(with_ending(prefix, "bin"), num_tokens * self.dtype.itemsize)
        self._lengths = _open_at(self._lengths_path, num_documents * 4)

    def append(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents: all their ids, and the number of each."""
        self._ids.write(np.ascontiguousarray(ids, self.dtype).data)
        self._lengths.write(np.ascontiguousarray(lengths, np.int32).data)

    def sync(self) -> None:
        """Have everything on disk."""
        for file in (self._ids, self._lengths):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the index, and forget the lengths."""
        self.write_index()
        self._lengths_path.unlink()

    def write_index(self) -> None:
        """Write the index; another writer can still go on from here."""
        self.sync()
        for file in (self._ids, self._lengths):
            file.close()
        write_index(self.prefix, self.dtype, _map(self._lengths_path))


def _open_at(path: Path, size: int) -> Any:
    path.touch()
    if path.stat().st_size < size:
        raise ConfigError(f"{path}: is damaged, shorter than {size} bytes; remove its folder to start over")
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _map(lengths: Path) -> np.ndarray:
    return np.memmap(lengths, np.int32, mode="r") if lengths.stat().st_size else np.zeros(0, np.int32)


def write_index(prefix: Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write `prefix`.idx for documents of the given lengths, [documents], one sequence each."""
    code = next(code for code, type_ in TYPE_CODES.items() if type_ == dtype)
    with with_ending(prefix, "idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for part in _chunks(lengths):
            file.write(part.data)
        start = 0
        for part in _chunks(lengths):
            ends = start + np.cumsum(part, dtype=np.int64)
            file.write((np.concatenate(([start], ends[:-1])) * dtype.itemsize).data)
            start = int(ends[-1])
        for first in range(0, len(lengths) + 1, CHUNK):
            file.write(np.arange(first, min(first + CHUNK, len(lengths) + 1), dtype=np.int64).data)
        file.flush()
        os.fsync(file.fileno())


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), CHUNK):
        yield np.ascontiguousarray(array[start : start + CHUNK])
