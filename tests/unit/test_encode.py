"""Texts to ids and back."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megatron_moe.data import encode
from megatron_moe.data.encode import Encoder
from megatron_moe.data.indexed import IndexedWriter
from megatron_moe.data.text_files import Format, Problem, Reader, Reading, TextFile, text_of
from megatron_moe.data.tokenizer import END_OF_SENTENCE, train_tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(60)] + ["naïve ☃ 𝛼", "it's 12 o'clock -- isn't it?"]
END = 1
SEQUENCE_LENGTH = 512

parts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.text(st.characters(max_codepoint=0xA0), max_size=20),
    st.sampled_from(
        [END_OF_SENTENCE, END_OF_SENTENCE[:-1], "\r\n", "\n\n", "\0", "\u2028", "\ufeff", "\U0010fffd", " "]
    ),
)
texts = st.tuples(st.lists(parts, max_size=4).map("".join), st.sampled_from([1, 1, 1, 1, SEQUENCE_LENGTH + 1])).map(
    lambda text: text[0] * text[1]
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer, END)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Path]]:
    """Paths without end, on a disk that need not be waited for."""
    folder = tmp_path_factory.mktemp("round_trips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield (folder / str(i) for i in itertools.count())


def read(path: Path) -> list[str | Problem]:
    reader = Reader([TextFile(path, Format.jsonl)], Reading())
    return [text_of(record, Format.jsonl, "text") for record in reader.records()]


@settings(max_examples=1000, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@example([""], True, "\n")
@example(["".join(map(chr, itertools.chain(range(0xD800), range(0xE000, 0x110000, 97))))], False, "\r\n")
@example(["x y\r\n" * SEQUENCE_LENGTH, END_OF_SENTENCE, ""], True, "\n")
@given(st.lists(texts, min_size=1, max_size=4), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_documents_survive_the_round_trip(
    encoder: Encoder, files: Iterator[Path], documents: list[str], ascii_only: bool, line_end: str
) -> None:
    path = next(files)
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in documents]
    path.write_bytes((line_end.join(lines) + line_end).encode())
    ids, lengths = encoder(read(path))
    writer = IndexedWriter(path, encoder.dtype)
    writer.append(ids, lengths)
    writer.finish()
    dataset = IndexedDataset(str(path))
    stored = [dataset[i].tolist() for i in range(len(dataset))]
    assert [ids[-1] for ids in stored] == [END] * len(documents)
    assert all(END not in ids[:-1] for ids in stored)
    assert [encoder.tokenizer.decode(ids[:-1]) for ids in stored] == documents


@settings(max_examples=200, derandomize=True)
@given(st.text(st.one_of(st.characters(min_codepoint=0xD7F0, max_codepoint=0xE010), st.just("a")), max_size=6))
def test_surrogates_are_read_in_pairs_or_refused(files: Iterator[Path], text: str) -> None:
    path = next(files)
    path.write_text(json.dumps({"text": text}))
    [found] = read(path)
    try:
        expected = text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        assert found.kind == "not UTF-8"
        assert "half of a surrogate pair" in found.reason
    else:
        assert found == expected


def test_documents_end_as_asked(tokenizer: Tokenizer) -> None:
    ids, lengths = Encoder(tokenizer, END)(["a", "", "b"])
    assert lengths.tolist() == [2, 1, 2]
    assert ids[[1, 2, 4]].tolist() == [END] * 3
    ids, lengths = Encoder(tokenizer, None)(["a", "", "b"])
    assert lengths.tolist() == [1, 0, 1]
    assert END not in ids
    ids, lengths = Encoder(tokenizer, END)([])
    assert (len(ids), len(lengths)) == (0, 0)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_large_vocabularies_need_wide_ids(vocab_size: int, dtype: type) -> None:
    words = models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids, _ = Encoder(tokenizer, 0)([f"1 {vocab_size - 1}"])
    assert ids.dtype == dtype
    assert ids.tolist() == [1, vocab_size - 1, 0]


def test_what_a_tokenizer_would_cut_off_or_fill_up_is_kept_as_it_is(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(3)
    other.enable_padding(length=50)
    whole = Encoder(tokenizer, END)(TEXTS)
    assert all(map(np.array_equal, Encoder(other, END)(TEXTS), whole))


LONG = [
    "".join(TEXTS),
    "one line " * 100,
    "short",
    "",
    "naïve ☃ it's 12 " * 50,
    "(see).\n/usr/bin, 1234;\nor_so;\n" * 50,
    "\n\n  \n" * 3 + "the end\r\n" * 50,
]


# Newlines and slashes after punctuation belong to it, as with o200k; three digits are a word.
O200K = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module", params=["gpt2", "o200k"])
def byte_level(request: pytest.FixtureRequest) -> Encoder:
    """An encoder of pairs of bytes that would merge whatever it sees together."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    entries = [*sorted(letters), *(a + b for a in sorted(letters) for b in sorted(letters))]
    pairs = [(a, b) for a in sorted(letters) for b in sorted(letters)]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=request.param == "gpt2")
    split = [pre_tokenizers.Split(Regex(O200K), "isolated")] if request.param == "o200k" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    return Encoder(tokenizer, END)


@pytest.mark.parametrize("size", [*range(40, 72), 500])
def test_pieces_give_the_ids_of_the_whole(byte_level: Encoder, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    whole = byte_level(LONG)
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", size)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 3 * size)
    assert max(len(piece.text) for piece in byte_level._pieces(LONG)) <= size
    assert sum(1 for _ in byte_level._pieces(LONG)) > sum(map(len, LONG)) / size
    assert all(map(np.array_equal, byte_level(LONG), whole))


def test_text_without_a_word_end_is_cut_all_the_same(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 100)
    text = "x" * 1050
    encoder = Encoder(tokenizer, END)
    assert sum(1 for _ in encoder._pieces([text])) == 11
    assert tokenizer.decode(encoder([text])[0].tolist()) == text


def test_where_pieces_begin_like_documents_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 10)
    letters = [*"abcdefghijklmnopqrstuvwxyz\n", "▁", "▁a", "▁b"]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, [("▁", "a"), ("▁", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    encoder = Encoder(tokenizer, None)
    assert not encoder.takes_pieces
    assert len(list(encoder._pieces(["a b " * 50]))) == 1
