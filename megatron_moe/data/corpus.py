"""From documents to megatron-core's indexed files, and the corpus that every Python brings along."""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
from tokenizers import Tokenizer

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import DataConfig
from megatron_moe.data.tokenizer import end_of_document, train_tokenizer

FORMAT = 1  # of the cache; raised when the same sources would give other files
ENCODE_BATCH = 256  # documents; bounds memory


def write_indexed(documents: Iterable[str], tokenizer: Tokenizer, prefix: Path) -> tuple[int, int]:
    """Tokenize documents, each ended by the end-of-sentence token, into `prefix`.bin and `prefix`.idx.

    The files get their names when they are whole; until then they are `prefix`.partial.

    Returns:
        Documents and tokens written.

    Source of the format: mcore 0.16.1, datasets/indexed_dataset.py; 16-bit ids when the vocabulary allows.
    """
    dtype = DType.optimal_dtype(tokenizer.get_vocab_size())
    partial = f"{prefix}.partial"
    builder = IndexedDatasetBuilder(get_bin_path(partial), dtype=dtype)
    end = end_of_document(tokenizer)
    num_documents = num_tokens = 0
    for batch in _batched(documents, ENCODE_BATCH):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids = np.array([*encoding.ids, end], dtype=dtype)
            builder.add_document(torch.from_numpy(ids.astype(np.int64)), [len(ids)])
            num_documents, num_tokens = num_documents + 1, num_tokens + len(ids)
    builder.finalize(get_idx_path(partial))
    for path_of in (get_bin_path, get_idx_path):
        Path(path_of(partial)).replace(path_of(str(prefix)))
    return num_documents, num_tokens


def prepare_python_stdlib(data: DataConfig) -> Path:
    """The standard library's sources, split by document, tokenized once into a folder of the cache.

    The split follows `data.seed`; the tokenizer learns from the training part only. Runs that start together share
    the folder: one builds it, the others wait.

    Returns:
        A folder with tokenizer.json and the indexed files train and valid.
    """
    documents = _stdlib_documents()
    folder = Path(data.cache_dir) / f"python_stdlib-{_digest(documents, data)[:16]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache_dir={data.cache_dir}: cannot be made: {error.strerror}") from None
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _build(documents, data, folder)
    return folder


def _build(documents: list[tuple[str, str]], data: DataConfig, folder: Path) -> None:
    held_out = [_is_held_out(name, data) for name, _ in documents]
    train = [text for (_, text), held in zip(documents, held_out, strict=True) if not held]
    valid = [text for (_, text), held in zip(documents, held_out, strict=True) if held]
    tokenizer = train_tokenizer(train, data.tokenizer_vocab_size)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        tokenizer.save(str(partial / "tokenizer.json"))
        write_indexed(train, tokenizer, partial / "train")
        write_indexed(valid, tokenizer, partial / "valid")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stdlib_documents() -> list[tuple[str, str]]:
    """Name and text of each module. Tests are left out: some distributions do not ship them."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not skipped.intersection(name.parts[:-1]):
            documents.append((name.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    return documents


def _is_held_out(name: str, data: DataConfig) -> bool:
    digest = hashlib.sha256(f"{data.seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < data.valid_fraction * 2**64


def _digest(documents: list[tuple[str, str]], data: DataConfig) -> str:
    digest = hashlib.sha256(f"{FORMAT}/{data.seed}/{data.valid_fraction}/{data.tokenizer_vocab_size}".encode())
    for name, text in documents:
        digest.update(f"\0{name}\0{len(text)}\0".encode())
        digest.update(text.encode("utf-8", errors="replace"))
    return digest.hexdigest()


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
