"""Training a tokenizer, and tokenizers of others."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_moe.data.corpus import _stdlib_documents
from megatron_moe.data.tokenizer import BEGIN_OF_SENTENCE, END_OF_SENTENCE
from tests.helpers.cli import run_cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [json.dumps({"text": text}) for _, text in _stdlib_documents()[:60]]
    (folder / "docs.jsonl").write_text("\n".join([*lines, "{", ""]))
    return folder


def train(folder: Path, *arguments: str, **environment: str):
    command = ["tools/train_tokenizer.py", "--input", "docs.jsonl", "--on-error", "skip"]
    return run_cli(*command, *arguments, cwd=folder, **environment)


def test_it_is_the_same_for_any_number_of_threads(folder: Path) -> None:
    for threads in ("1", "2"):
        result = train(folder, "--vocab-size", "1000", "--output", f"t{threads}", RAYON_NUM_THREADS=threads)
        assert result.stdout == f"t{threads}/tokenizer.json: 1,000 entries; left out: 1 broken JSON\n", result.stderr
        assert result.stderr == ""
    files = ("tokenizer.json", "tokenizer_config.json")
    assert all((folder / "t1" / file).read_bytes() == (folder / "t2" / file).read_bytes() for file in files)
    assert "exists; remove it" in train(folder, "--vocab-size", "1000", "--output", "t1").stderr


def test_transformers_loads_it(folder: Path) -> None:
    train(folder, "--vocab-size", "500", "--output", "small")
    tokenizer = AutoTokenizer.from_pretrained(folder / "small")
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BEGIN_OF_SENTENCE, END_OF_SENTENCE)
    text = "def f(x):\n    return 'naïve ☃ 𝛼\x00' + x"
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_little_text_and_errors(folder: Path) -> None:
    (folder / "one.txt").write_text("abc abc")
    few = train(folder, "--input", "one.txt", "--vocab-size", "5000", "--output", "few")
    assert "entries, all that the text holds" in few.stdout
    result = train(folder, "--vocab-size", "257", "--output", "none")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--vocab-size=257: must be at least 258: 256 bytes and the special tokens" in result.stderr
    result = train(folder, "--vocab-size", "300", "--output", "none", "--on-error", "stop")
    assert "docs.jsonl:61: broken JSON" in result.stderr
    assert not (folder / "none").exists()
