"""From documents to megatron-core's indexed files, and the corpus that every Python brings along."""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock
from tokenizers import Tokenizer

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import DataConfig
from megatron_moe.data.cache import new_folder_beside
from megatron_moe.data.encode import Encoder
from megatron_moe.data.indexed import IndexedWriter, Manifest, with_ending
from megatron_moe.data.tokenizer import end_of_document, train_tokenizer

FORMAT = 2  # of the cache; raised when the same sources would give other files


def write_indexed(documents: Sequence[str], tokenizer: Tokenizer, prefix: Path) -> None:
    """Tokenize documents, each ended by the end-of-sentence token, into the dataset `prefix` with its manifest."""
    end = end_of_document(tokenizer)
    tokenizer.save(str(with_ending(prefix, "tokenizer.json")))
    encoder = Encoder(tokenizer, end)
    writer = IndexedWriter(prefix, encoder.dtype)
    ids, lengths = encoder(documents)
    writer.append(ids, lengths)
    writer.finish()
    Manifest.of(
        prefix,
        documents=len(lengths),
        tokens=len(ids),
        text_bytes=sum(len(document.encode(errors="replace")) for document in documents),
        largest_id=int(ids.max(initial=0)),
        vocab_size=encoder.vocab_size,
        end_of_document=end,
        sources=[],
        options={},
        skipped={},
    ).write(with_ending(prefix, "manifest.json"))


def prepare_python_stdlib(data: DataConfig) -> Path:
    """The standard library's sources, split by document, tokenized once into a folder of the cache.

    The split follows `data.seed`; the tokenizer learns from the training part only. Runs that start together share
    the folder: one builds it, the others wait.

    Returns:
        A folder with the indexed datasets train and valid.
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
    partial = new_folder_beside(folder)
    try:
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
