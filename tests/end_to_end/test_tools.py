"""The tools, and training on what they write."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.data.dataset import examine
from megatron_moe.data.tokenizer import train_tokenizer
from tests.helpers.cli import metrics_of, run_cli
from tests.helpers.training import TINY

TEXTS = [f"The number {i} is followed by {i + 1}, and {i * i} is its square.\n" for i in range(300)]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/docs, preprocessed."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer(TEXTS, 270).save(str(folder / "tokenizer.json"))
    command = ["--input", "docs.jsonl", "--tokenizer", "tokenizer.json", "--output", "data/docs"]
    result = run_cli("tools/preprocess_data.py", *command, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("data/docs: 300 documents, ")
    assert result.stderr == ""
    return folder


def test_train_on_preprocessed_documents(documents: Path) -> None:
    sources = ["data=blend", "data.train=[{path: data/docs, weight: 1.0}]", "data.valid=[{path: data/docs}]"]
    tiny = [option for option in TINY if not option.startswith(("data=", "model.vocab_size"))]
    run = ["model.vocab_size=512", "train.train_steps=2", "evaluation.num_samples=8", "run.name=docs"]
    result = run_cli("pretrain.py", *tiny, *sources, *run, cwd=documents)
    assert result.returncode == 0, result.stderr
    assert "valid/lm_loss" in metrics_of(documents / "runs" / "docs")[-1]
    result = run_cli("pretrain.py", *tiny, *sources, "model.vocab_size=128", "run.name=small", cwd=documents)
    assert result.returncode == 2
    assert "model.vocab_size=128 must be larger than every id" in result.stderr


@pytest.mark.parametrize("damage", [lambda data: data[:-2], lambda data: b"garbage", lambda data: b""])
@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_damaged_datasets_are_refused(documents: Path, tmp_path: Path, damage, ending: str) -> None:
    shutil.copytree(documents / "data", tmp_path, dirs_exist_ok=True)
    file = tmp_path / f"docs.{ending}"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=r"docs\.(bin|idx)"):
        examine(str(tmp_path / "docs"))
