"""The tools, and training on what they write."""

import json
from pathlib import Path

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.data.dataset import examine
from megatron_moe.data.tokenizer import train_tokenizer
from tests.helpers.cli import metrics_of, run_cli
from tests.helpers.training import TINY

TEXTS = [f"The number {i} is followed by {i + 1}, and {i * i} is its square.\n" for i in range(300)]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer(TEXTS, 270).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def preprocess(folder: Path, *arguments: str):
    command = ["--input", "docs.jsonl", "--tokenizer", "tokenizer.json", "--output", "data/docs", *arguments]
    return run_cli("tools/preprocess_data.py", *command, cwd=folder)


def test_train_on_preprocessed_documents(documents: Path) -> None:
    result = preprocess(documents)
    assert result.returncode == 0, result.stderr
    assert "data/docs: 300 documents" in result.stdout
    assert result.stderr == ""
    sources = ["data=blend", "data.train=[{path: data/docs, weight: 1.0}]", "data.valid=[{path: data/docs}]"]
    tiny = [option for option in TINY if not option.startswith(("data=", "model.vocab_size"))]
    run = ["model.vocab_size=512", "train.train_steps=2", "evaluation.num_samples=8", "run.name=docs"]
    result = run_cli("pretrain.py", *tiny, *sources, *run, cwd=documents)
    assert result.returncode == 0, result.stderr
    assert "valid/lm_loss" in metrics_of(documents / "runs" / "docs")[-1]
    result = run_cli("pretrain.py", *tiny, *sources, "model.vocab_size=128", "run.name=small", cwd=documents)
    assert result.returncode == 2
    assert "model.vocab_size=128 must be larger than every id" in result.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "docs.jsonl:2: no JSON object with the field 'text'"),
        ('{"body": "x"}', "docs.jsonl:2: no JSON object with the field 'text'"),
        ('{"text": 3}', "docs.jsonl:2: field 'text' is int, not text"),
        ("[]", "docs.jsonl:2: no JSON object with the field 'text'"),
        ('{"text": "\\ud800"}', "docs.jsonl:2: no JSON object with the field 'text'"),
        ('{"text": "\xff"}', "docs.jsonl:2: no JSON object with the field 'text'"),
    ],
)
def test_a_wrong_line_is_named(documents: Path, line: str, expected: str) -> None:
    (documents / "docs.jsonl").write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b"\n")
    result = preprocess(documents)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert not (documents / "data" / "docs.idx").exists()


def test_blank_lines_are_no_documents_and_nothing_is_an_error(documents: Path) -> None:
    (documents / "docs.jsonl").write_text('\n{"text": "one"}\n  \n')
    assert "1 documents" in preprocess(documents).stdout
    (documents / "docs.jsonl").write_text("")
    assert "docs.jsonl: no documents" in preprocess(documents).stderr


@pytest.mark.parametrize("damage", [lambda data: data[:-2], lambda data: b"garbage", lambda data: b""])
@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_damaged_datasets_are_refused(documents: Path, damage, ending: str) -> None:
    preprocess(documents)
    file = documents / "data" / f"docs.{ending}"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=r"docs\.(bin|idx)"):
        examine(str(documents / "data" / "docs"))


def test_missing_files_are_named(documents: Path) -> None:
    (documents / "docs.jsonl").unlink()
    assert "docs.jsonl" in preprocess(documents).stderr
    result = preprocess(documents, "--tokenizer", "nowhere.json")
    assert result.returncode == 2
    assert "nowhere.json" in result.stderr
