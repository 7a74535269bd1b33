"""What the inspection tool says of datasets and runs."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.config.load import compose_config
from megatron_moe.data.corpus import write_indexed
from megatron_moe.data.sources import build_datasets
from megatron_moe.data.tokenizer import train_tokenizer
from tests.helpers.cli import ROOT

TEXTS = {
    "numbers": [f"The number {i} is followed by {i + 1}.\n" for i in range(200)],
    "code": [f"def add_{i}(x):\n    return x + {i}\n" for i in range(100)],
}
spec = spec_from_file_location("inspect_data", ROOT / "tools" / "inspect_data.py")
tool = module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two datasets, and a run on both."""
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer([text for texts in TEXTS.values() for text in texts], 300)
    for name, texts in TEXTS.items():
        write_indexed(texts, tokenizer, tmp_path / name)
    blend = ["data=blend", "data.train=[{path: numbers, weight: 3}, {path: code}]", "data.valid_fraction=0.1"]
    sizes = ["data.sequence_length=64", "train.train_steps=50", "train.global_batch_size=8", "run.name=x"]
    (tmp_path / "run").mkdir()
    options = plain(compose_config([*blend, *sizes, f"data.cache_dir={tmp_path}/cache"]))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert tool.main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_a_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "numbers", "--verify")
    size = sum(map(len, TEXTS["numbers"]))
    for part in ("numbers: as its manifest says", "documents          200\n", f"bytes of text      {size:,};"):
        assert part in text
    bars = [line.split() for line in text.split("at most\n")[1].splitlines()]
    assert sum(int(count) for _, count, _ in bars) == 200
    assert max(len(bar) for _, _, bar in bars) == 40
    assert "def add_99(x):\n    return x + 99\n<｜end▁of▁sentence｜>" in said(capsys, "code", "--sample", "99")


def test_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split() for line in said(capsys, "run", "--verify").splitlines()]
    assert ["numbers:", "as", "its", "manifest", "says"] in rows
    (numbers,) = [row for row in rows if row[:1] == ["numbers"]]
    tokens = 64 * 8 * 50 * 3 // 4
    assert (numbers[1], numbers[3], numbers[4]) == ("180", "75.00%", f"{tokens:,}")
    config = tool_config(folder)
    train = build_datasets(config).train
    assert float(numbers[5]) == pytest.approx(tokens / 64 / len(train.datasets[0]), abs=0.01)


def tool_config(folder: Path):
    from megatron_moe.train.restore import read_config

    return read_config(folder / "run")


def test_a_sample_is_what_the_model_sees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "run", "--sample", "7")
    shown = "".join(line + "\n" for line in text.splitlines()[1:] if not line.startswith("--- document"))
    train = build_datasets(tool_config(folder)).train
    tokenizer = tool.load_tokenizer(folder / "code.tokenizer.json")
    expected = tokenizer.decode(train[7].tolist(), skip_special_tokens=False)
    assert shown.replace("\n", "") == expected.replace("\n", "")
    assert text.count("--- document") == len(train.document_lengths(7)) > 1


@pytest.mark.parametrize(
    ("damage", "arguments", "expected"),
    [
        ("numbers.bin", ["numbers", "--verify"], "numbers.bin: is not the file that numbers.manifest.json describes"),
        ("code.tokenizer.json", ["run", "--verify"], "code.tokenizer.json: is not the file"),
        (None, ["numbers", "--sample", "200"], "--sample=200: numbers has documents 0 to 199"),
        (None, ["numbers", "--sample", "-1"], "--sample=-1: must not be negative"),
        (None, ["nowhere"], "nowhere: no such file"),
        (None, ["numbers", "--sample", "1", "--tokenizer", "none.json"], "none.json: no such file"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_errors(damage: str | None, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    if damage:
        data = bytearray(Path(damage).read_bytes())
        data[100] ^= 1
        Path(damage).write_bytes(data)
    assert tool.main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_dataset_wins_over_a_folder_of_its_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "code").mkdir()
    assert "documents          100\n" in said(capsys, "code")


def test_a_dataset_without_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "code.manifest.json").unlink()
    assert "bytes of text" not in said(capsys, "code")
    assert tool.main(["code", "--verify"]) == 2
    assert "code.manifest.json: no such file; there is nothing to compare with" in capsys.readouterr().err


def test_random_tokens_are_no_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "run" / "config.yaml"
    options = yaml.safe_load(file.read_text())
    options["data"] |= {"kind": "mock", "train": [], "valid_fraction": 0.05}
    file.write_text(json.dumps(options))
    assert tool.main(["run"]) == 2
    assert "was trained on random tokens" in capsys.readouterr().err
