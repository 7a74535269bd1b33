"""From texts to token ids. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megatron_moe.data.indexed import id_type
from megatron_moe.data.tokenizer import num_ids

BATCH_CHARACTERS = 2**19  # encoded at once; an encoding takes about 100 bytes a token
PIECE_CHARACTERS = 2**20  # of a long document
# Where common pre-tokenizers split anyway: between a line and the next, or between two words.
LINE_END = re.compile(r"(?<=\S\n)(?=\w)")
WORD_END = re.compile(r"(?<=\S)(?= \S)")


class Piece(NamedTuple):
    """Of the document of a number."""

    document: int
    text: str
    is_last: bool


class Encoder:
    """A tokenizer that ends each document with a token, and takes special tokens in a text for text.

    A document of more than PIECE_CHARACTERS is encoded in pieces, cut where pre-tokenizers split anyway: after a line,
    before a word, and only where there is neither, anywhere. Not by a tokenizer that joins what is cut there, of which
    a probe tells.

    Args:
        tokenizer: its way with special tokens is changed.
        end_of_document: id after each document; None: nothing.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_document: int | None) -> None:
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.vocab_size = num_ids(tokenizer)
        self.dtype = id_type(self.vocab_size)
        self.tail = np.array([] if end_of_document is None else [end_of_document], dtype=self.dtype)
        whole, *pieces = self._encode(["a b\nc d", "a", " b\n", "c", " d"])
        self.takes_pieces = tokenizer.pre_tokenizer is not None and np.array_equal(whole, np.concatenate(pieces))

    def __call__(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all documents, [tokens], and their lengths with the token that ends them, [documents] int32.

        Documents without any token have length 0.
        """
        ids = [np.zeros(0, self.dtype)]
        lengths = np.zeros(len(documents), dtype=np.int32)
        for batch in _batches(self._pieces(documents)):
            for piece, encoded in zip(batch, self._encode([piece.text for piece in batch]), strict=True):
                tail = self.tail if piece.is_last else self.tail[:0]
                ids += (encoded, tail)
                lengths[piece.document] += len(encoded) + len(tail)
        return np.concatenate(ids), lengths

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def _pieces(self, documents: Sequence[str]) -> Iterator[Piece]:
        for document, text in enumerate(documents):
            start = 0
            while self.takes_pieces and len(text) - start > PIECE_CHARACTERS:
                # Two characters more, for the patterns to see what follows.
                piece = text[start : start + _last_break(text[start : start + PIECE_CHARACTERS + 2])]
                yield Piece(document, piece, is_last=False)
                start += len(piece)
            yield Piece(document, text[start:], is_last=True)


def _last_break(text: str) -> int:
    """Where to cut: within PIECE_CHARACTERS, at the end of a line, else of a word, else anywhere."""
    for pattern in (LINE_END, WORD_END):
        for start in (PIECE_CHARACTERS - 2**12, PIECE_CHARACTERS // 2):
            breaks = [place for match in pattern.finditer(text, start) if (place := match.start()) <= PIECE_CHARACTERS]
            if breaks:
                return breaks[-1]
    return PIECE_CHARACTERS


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
