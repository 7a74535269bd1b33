"""A few documents, a tokenizer for them, and damage to their files."""

from __future__ import annotations

import functools
from pathlib import Path

from tokenizers import Tokenizer

from megatron_moe.data.tokenizer import train_tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)] + ["", "naïve ☃ 𝛼"]


@functools.cache
def small_tokenizer() -> Tokenizer:
    """With 300 entries."""
    return train_tokenizer(TEXTS, 300)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Other bytes at a place of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
