"""The datasets of a run: what belongs together, what is held out, and what a run goes on with."""

import itertools
import json
import math
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.checkpoint.compatibility import check_same_data, check_same_run
from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.checkpoint.state import TrainState
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import compose_config
from megatron_moe.config.schema import Config
from megatron_moe.data import dataset as dataset_module
from megatron_moe.data.corpus import write_indexed
from megatron_moe.data.dataset import PackedDataset
from megatron_moe.data.indexed import IndexedWriter
from megatron_moe.data.sources import build_datasets
from megatron_moe.data.tokenizer import load_tokenizer
from megatron_moe.train import loop
from tests.helpers.text import TEXTS, overwrite, small_tokenizer


def manifest(prefix: str, **changes: object) -> None:
    path = Path(f"{prefix}.manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def blend_config(folder: Path, *overrides: str) -> Config:
    return compose_config(["data=blend", "data.sequence_length=16", f"data.cache_dir={folder}/cache", *overrides])


def problems_of(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        build_datasets(blend_config(folder, *overrides))
    return str(error.value)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the datasets a and b."""
    write_indexed(TEXTS * 2, small_tokenizer(), tmp_path / "a")
    write_indexed(TEXTS[:30] * 3, small_tokenizer(), tmp_path / "b")
    return tmp_path


def train_on(folder: Path, a: str = "", b: str = "") -> str:
    return f"data.train=[{{path: {folder}/a{a}}}, {{path: {folder}/b{b}}}]"


def test_a_manifest_must_belong(two: Path) -> None:
    manifest(f"{two}/a", tokens=7)
    manifest(f"{two}/b", documents=8)
    found = problems_of(two, train_on(two))
    assert "a.manifest.json: tells of 124 documents and 7 tokens" in found
    assert "b.manifest.json: tells of 8 documents" in found


@pytest.mark.parametrize("change", [{"tokens": "7"}, {"tokenizer_sha256": None}, {"skipped": None}, {"sources": 3}])
def test_a_manifest_has_values_of_the_right_type(change: dict, two: Path) -> None:
    path = Path(f"{two}/a.manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert f"a.manifest.json: is no manifest of a dataset (wrong type of {next(iter(change))})" in problems_of(
        two, train_on(two)
    )


def test_a_share_that_takes_all_documents_leaves_none(two: Path) -> None:
    tokenizer = load_tokenizer(Path(f"{two}/a.tokenizer.json"))
    write_indexed([TEXTS[0] * 50], tokenizer, two / "one")
    found = problems_of(two, f"data.train=[{{path: {two}/one}}]", "data.valid_fraction=0.05")
    assert "one: 0 of its 1 documents, with 0 tokens, are fewer than one sequence of data.sequence_length=16" in found
    assert "data.valid_fraction, data.test_fraction deal out" in found


def test_orders_are_copied_to_the_node(two: Path, tmp_path: Path) -> None:
    config = blend_config(two, train_on(two), f"data.local_cache_dir={tmp_path}/local")
    first = build_datasets(config).train[0]
    copied = sorted(path.name for path in (tmp_path / "local").iterdir() if path.is_dir())
    shared = {path.name for path in Path(config.data.cache_dir).iterdir()}
    assert copied
    assert shared >= set(copied)
    shutil.rmtree(config.data.cache_dir)
    assert build_datasets(config).train[0].tolist() == first.tolist()
    assert not Path(config.data.cache_dir).exists()


def test_a_finished_run_is_evaluated_on_its_test_sets(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = blend_config(two, train_on(two), "data.test_fraction=0.2", "train.train_steps=4")
    monkeypatch.setattr(loop, "held_out_loss", lambda *_: 2.0)
    context = SimpleNamespace(is_main=True, device=None, say=print)
    loop._summarize(
        loop.Run(config, context, build_datasets(config), None, None, None, TrainState(4, 0), [], None, None, None), {}
    )
    said = capsys.readouterr().out
    assert "test/lm_loss 2.0000" in said
    assert "held-out loss" not in said


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", "{}", "\udcff"])
def test_what_is_no_manifest_is_named(text: str, two: Path) -> None:
    Path(f"{two}/a.manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "a.manifest.json: is no manifest of a dataset" in problems_of(two, train_on(two))


def test_ids_come_from_one_tokenizer(two: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    found = problems_of(two, train_on(two), f"data.tokenizer={tmp_path}/other.json")
    assert found.count("made by another tokenizer") == 2
    same = blend_config(two, train_on(two), f"data.tokenizer={two}/b.tokenizer.json")
    assert build_datasets(same).tokenizer == two / "b.tokenizer.json"
    manifest(f"{two}/b", tokenizer_sha256="0" * 64)
    found = problems_of(two, train_on(two))
    assert f"b.manifest.json: its ids were made by another tokenizer (sha256 000000000000...) than {two}/a" in found
    Path(f"{two}/b.manifest.json").unlink()
    assert build_datasets(blend_config(two, train_on(two))).tokenizer == two / "a.tokenizer.json"


def test_a_large_id_is_found_by_the_manifest_or_in_the_bytes_or_when_it_is_read(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest(f"{two}/a", largest_id=10**6)
    config = blend_config(two, train_on(two))
    with pytest.raises(ConfigError, match="a: holds token id 1000000"):
        build_datasets(config)
    Path(f"{two}/a.manifest.json").unlink()
    size = Path(f"{two}/a.bin").stat().st_size
    overwrite(Path(f"{two}/a.bin"), size - 2, struct.pack("<H", 65000))
    with pytest.raises(ConfigError, match="a: holds token id 65000"):
        build_datasets(config)
    monkeypatch.setattr(dataset_module, "LOOKED_AT", 0)
    (source, _) = build_datasets(config).train.datasets
    assert source[0].max() < 300
    with pytest.raises(ConfigError, match="a: holds token id 65000"):
        [source[i] for i in range(len(source))]


def test_a_negative_id_is_found(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", np.int32)
    writer.append(np.array([1, 2, -3, *range(100)]), np.array([103]))
    writer.finish()
    assert "a: holds token id -3" in problems_of(tmp_path, f"data.train=[{{path: {tmp_path}/a}}]")


def test_shares_of_the_documents_are_held_out_of_each_source(two: Path) -> None:
    config = blend_config(two, train_on(two, ", weight: 3"), "data.valid_fraction=0.2", "data.test_fraction=0.1")
    datasets = build_datasets(config)
    assert (
        [(s.name, s.weight) for s in datasets.valid]
        == [("a", 3.0), ("b", 1.0)]
        == [(s.name, s.weight) for s in datasets.test]
    )
    for i, total in enumerate((124, 90)):
        parts = [datasets.train.datasets[i], datasets.valid[i].sequences, datasets.test[i].sequences]
        documents = [set(part._documents.tolist()) for part in parts]
        assert [len(d) for d in documents[1:]] == [round(0.2 * total), round(0.1 * total)]
        assert sorted(itertools.chain(*documents)) == list(range(total))
    other = build_datasets(blend_config(two, train_on(two), "data.valid_fraction=0.2", "data.seed=5"))
    assert other.valid[0].sequences._documents.tolist() != datasets.valid[0].sequences._documents.tolist()
    assert not other.test


def test_held_out_datasets_of_their_own_are_whole(two: Path) -> None:
    held_out = [f"data.valid=[{{path: {two}/b, name: code}}]", f"data.test=[{{path: {two}/a}}, {{path: {two}/b}}]"]
    datasets = build_datasets(blend_config(two, train_on(two), *held_out))
    assert [s.name for s in datasets.valid] == ["code"]
    assert [s.name for s in datasets.test] == ["a", "b"]
    indexed = IndexedDataset(f"{two}/b")
    tokens = int(indexed.sequence_lengths.sum())
    assert datasets.valid[0].sequences.num_tokens == tokens
    text_bytes = 3 * sum(len(text.encode()) for text in TEXTS[:30])
    assert datasets.valid[0].tokens_per_byte == tokens / text_bytes
    Path(f"{two}/b.manifest.json").unlink()
    datasets = build_datasets(blend_config(two, train_on(two), held_out[0], "data.test_fraction=0.1"))
    assert datasets.valid[0].tokens_per_byte is None
    assert datasets.valid[0].sequences.num_tokens == tokens
    assert datasets.test[1].sequences.num_tokens < tokens


def test_a_share_that_never_comes_up_is_an_error(two: Path) -> None:
    found = problems_of(two, train_on(two, ", weight: 1e-7"))
    assert "less than one sample in a million" in found
    build_datasets(blend_config(two, train_on(two, ", weight: 1e-6")))


def test_losses_by_source_and_their_weighted_mean(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Path(f"{two}/b.manifest.json").unlink()
    options = [train_on(two, ", weight: 3"), "data.valid_fraction=0.2", "data.test_fraction=0.1"]
    config = blend_config(two, *options, "train.train_steps=4", "evaluation.num_samples=3")
    datasets = build_datasets(config)
    losses = {
        id(s.sequences): loss for s, loss in zip([*datasets.valid, *datasets.test], (1.0, 2.0, 3.0, 4.0), strict=True)
    }
    counted = []

    def loss_of(_: object, sequences: PackedDataset, count: int, *__: object) -> float:
        counted.append(min(count, len(sequences)) == count <= 3)
        return losses[id(sequences)]

    monkeypatch.setattr(loop, "held_out_loss", loss_of)
    context = SimpleNamespace(is_main=True, device=None, say=print)
    run = loop.Run(config, context, datasets, None, None, None, TrainState(2, 0), [], None, None, None)
    per_byte = json.loads(Path(f"{two}/a.manifest.json").read_text())
    factor = per_byte["tokens"] / per_byte["text_bytes"] / math.log(2)
    valid = {
        "valid/a/lm_loss": 1.0,
        "valid/a/bits_per_byte": pytest.approx(factor),
        "valid/b/lm_loss": 2.0,
        "valid/lm_loss": 1.25,
    }
    assert loop._evaluate(run) == valid
    assert "step 2 | valid/lm_loss 1.2500 | valid/a/lm_loss 1.0000 | valid/a/bits_per_byte" in capsys.readouterr().out
    run.state.advance(0)
    run.state.advance(0)
    test = {
        "test/a/lm_loss": 3.0,
        "test/a/bits_per_byte": pytest.approx(3 * factor),
        "test/b/lm_loss": 4.0,
        "test/lm_loss": 3.25,
    }
    assert loop._evaluate(run) == valid | test
    assert all(counted)


def test_a_run_goes_on_with_the_same_data_only(two: Path) -> None:
    config = blend_config(two, train_on(two))
    before = build_datasets(config).fingerprints
    saved = plain(config)
    elsewhere = two / "moved"
    elsewhere.mkdir()
    for path in [*two.glob("a.*"), *two.glob("b.*")]:
        path.rename(elsewhere / path.name)
    moved = blend_config(two, train_on(elsewhere))
    check_same_run(saved, moved)
    check_same_data(before, build_datasets(moved).fingerprints, two)
    overwrite(elsewhere / "b.bin", 10, struct.pack("<H", 5))
    with pytest.raises(ConfigError, match=r"data b: holds other documents than when") as error:
        check_same_data(before, build_datasets(moved).fingerprints, two)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    "train",
    [
        "[{path: F/a, weight: 2}, {path: F/b}]",
        "[{path: F/a}]",
        "[{path: F/b}, {path: F/a}]",
        "[{path: F/a, name: c}, {path: F/b}]",
    ],
    ids=["weight", "fewer", "order", "name"],
)
def test_a_run_goes_on_with_the_same_mix_only(train: str, two: Path) -> None:
    saved = plain(blend_config(two, train_on(two)))
    with pytest.raises(ConfigError, match=r"data\.train weights .* was trained with"):
        check_same_run(saved, blend_config(two, f"data.train={train.replace('F', str(two))}"))
