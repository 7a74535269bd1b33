"""Byte-level BPE with Hugging Face tokenizers, as in the paper (4.1.1). Only `tokenizer.json` is read: no code runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_moe.config.errors import ConfigError

BEGIN_OF_SENTENCE = "<｜begin▁of▁sentence｜>"
END_OF_SENTENCE = "<｜end▁of▁sentence｜>"  # names of the released tokenizer (deepseek-moe-16b-base)

SMALLEST_VOCABULARY = 256 + 2  # bytes and special tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries, fewer if the texts hold no more; the same for the same texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN_OF_SENTENCE, END_OF_SENTENCE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_file(path: Path) -> Path:
    """`tokenizer.json`, given itself or its folder."""
    return path / "tokenizer.json" if path.is_dir() else path


def load_tokenizer(path: Path) -> Tokenizer:
    """Load `tokenizer.json`, given itself or its folder; code beside it is not run.

    Raises:
        ConfigError: there is none, or it is not a tokenizer.
    """
    file = tokenizer_file(path)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"tokenizer {file}: is no tokenizer.json of Hugging Face tokenizers: {error}") from None


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which can be more than there are entries."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def end_of_document(tokenizer: Tokenizer, token: str | None = None) -> int:
    """Id of the token that ends a document: `token`, or the tokenizer's end of sentence.

    Raises:
        ConfigError: the tokenizer has no such token, or of none given no end of sentence of a known name.
    """
    names = [token] if token is not None else [END_OF_SENTENCE, "</s>", "<|endoftext|>", "<|end_of_text|>"]
    for name in names:
        if (number := tokenizer.token_to_id(name)) is not None:
            return number
    raise ConfigError(f"tokenizer: has no end-of-sentence token {', '.join(names)}; --end-of-document names another")
