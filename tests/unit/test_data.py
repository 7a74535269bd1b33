"""Documents to samples, without processes."""

import itertools
import json
import math
import re
import shutil
import struct
import threading
from collections import Counter
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
from megatron_moe.data import corpus
from megatron_moe.data import dataset as dataset_module
from megatron_moe.data.cache import ArrayCache
from megatron_moe.data.corpus import prepare_python_stdlib, write_indexed
from megatron_moe.data.dataset import BlendedDataset, PackedDataset, examine, unigram_entropy
from megatron_moe.data.indexed import IndexedWriter
from megatron_moe.data.sources import build_datasets, held_out_sources
from megatron_moe.data.tokenizer import END_OF_SENTENCE, end_of_document, load_tokenizer, train_tokenizer
from megatron_moe.train import loop

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)] + ["", "naïve ☃ 𝛼"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def prefix(tokenizer, tmp_path: Path) -> str:
    write_indexed(TEXTS, tokenizer, tmp_path / "tokens")
    return str(tmp_path / "tokens")


def packed(prefix: str, sequence_length: int = 16, *, seed: int = 1, documents: np.ndarray | None = None):
    cache = ArrayCache(Path(prefix).parent / "cache")
    options = {"sequence_length": sequence_length, "vocab_size": 300, "seed": seed, "cache": cache}
    return PackedDataset(examine(prefix), documents, **options)


def test_documents_survive_the_round_trip(tokenizer, prefix: str) -> None:
    dataset = IndexedDataset(prefix)
    end = tokenizer.token_to_id(END_OF_SENTENCE)
    documents = [dataset[i] for i in range(len(dataset))]
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in documents] == TEXTS
    assert {int(ids[-1]) for ids in documents} == {end}
    assert dataset.index.dtype == np.uint16


def test_the_tokenizer_is_reproducible_and_loads(tokenizer, tmp_path: Path) -> None:
    assert train_tokenizer(TEXTS, 300).to_str() == tokenizer.to_str()
    assert tokenizer.get_vocab_size() == 300
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert end_of_document(load_tokenizer(tmp_path)) == end_of_document(tokenizer)


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_an_epoch_holds_every_token_once(prefix: str) -> None:
    dataset = packed(prefix)
    stream = np.concatenate([dataset[i][:-1] for i in range(len(dataset))])
    indexed = IndexedDataset(prefix)
    documents = np.concatenate([indexed[i] for i in range(len(indexed))])
    missing = Counter(documents.tolist()) - Counter(stream.tolist())
    assert not Counter(stream.tolist()) - Counter(documents.tolist())
    assert sum(missing.values()) == len(documents) - len(stream) <= 16


def test_a_sample_is_a_function_of_its_number(prefix: str) -> None:
    one, other = (packed(prefix) for _ in range(2))
    numbers = [0, 5, 3 * len(one) + 2, 5, len(one)]
    first = [one[i].tolist() for i in numbers]
    assert [other[i].tolist() for i in reversed(numbers)] == first[::-1]
    assert all(len(sample) == 17 for sample in first)
    assert one[0].tolist() != one[len(one)].tolist()  # another epoch, another order
    assert packed(prefix, seed=2)[0].tolist() != first[0]


def test_too_few_tokens_are_an_error(prefix: str) -> None:
    with pytest.raises(ConfigError, match="fewer than one sequence"):
        packed(prefix, 100_000)


def test_a_blend_holds_its_shares_at_every_prefix(prefix: str) -> None:
    sources = [packed(prefix, seed=seed) for seed in (1, 2)]
    blend = BlendedDataset(sources, [3.0, 1.0])
    places = [blend.place(i) for i in range(400)]
    counts = np.cumsum([source == 0 for source, _ in places])
    assert np.abs(counts - 0.75 * np.arange(1, 401)).max() <= 1
    for source in (0, 1):  # each goes through its own samples in order
        numbers = [number for of, number in places if of == source]
        assert numbers == list(range(len(numbers)))
    assert blend[399].tolist() == sources[places[399][0]][places[399][1]].tolist()


def test_ids_beyond_the_vocabulary_are_found(prefix: str) -> None:
    options = ["data=blend", f"data.train=[{{path: {prefix}}}]", "data.sequence_length=16"]
    config = compose_config([*options, f"data.cache_dir={Path(prefix).parent}/cache"])
    config.model.vocab_size = 200
    with pytest.raises(ConfigError, match="holds token id"):
        build_datasets(config)


def test_unigram_entropy_of_two_equally_likely_tokens() -> None:
    class Two:
        def __getitem__(self, index: int) -> np.ndarray:
            return np.array([9, 3, 7, 3, 7])

    assert unigram_entropy([(Two(), 3, 1.0)]) == pytest.approx(np.log(2))


@pytest.fixture
def small_stdlib(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [(f"module{i}.py", text * 5) for i, text in enumerate(TEXTS)]
    monkeypatch.setattr(corpus, "_stdlib_documents", lambda: documents)


def stdlib_config(tmp_path: Path, *overrides: str):
    options = [f"data.cache_dir={tmp_path}/cache", "data.tokenizer_vocab_size=300", "data.valid_fraction=0.2"]
    return compose_config([*options, *overrides]).data


@pytest.mark.usefixtures("small_stdlib")
def test_the_split_shares_no_document_and_follows_the_seed(tmp_path: Path) -> None:
    folders = [prepare_python_stdlib(stdlib_config(tmp_path, f"data.seed={seed}")) for seed in (1, 2)]
    sizes = []
    for folder in folders:
        train, valid = (IndexedDataset(str(folder / name)) for name in ("train", "valid"))
        assert len(train) + len(valid) == len(TEXTS)
        sizes.append(sorted(valid.sequence_lengths.tolist()))
    assert sizes[0] != sizes[1]


@pytest.mark.usefixtures("small_stdlib")
def test_concurrent_runs_share_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = itertools.count()
    build = corpus._build
    monkeypatch.setattr(corpus, "_build", lambda *args: (next(builds), build(*args)))
    data = stdlib_config(tmp_path)
    threads = [threading.Thread(target=prepare_python_stdlib, args=(data,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert next(builds) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_the_standard_library_is_real_text_without_its_tests() -> None:
    documents = dict(corpus._stdlib_documents())
    assert "import" in documents["argparse.py"]
    assert not any("/test/" in f"/{name}" for name in documents)
    assert sum(map(len, documents.values())) > 5_000_000


def test_random_tokens_are_no_held_out_text() -> None:
    with pytest.raises(ConfigError, match=r"data\.kind=mock: there is no held-out text"):
        held_out_sources(compose_config(["data=mock"]), {})


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_files_that_do_not_fit_together_are_damaged(prefix: str) -> None:
    ids, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    whole_ids, whole_index, n = ids.read_bytes(), index.read_bytes(), len(TEXTS)
    lengths, pointers, boundaries = 34, 34 + 4 * n, 34 + 12 * n
    cases = {
        "fewer ids": (lambda: ids.write_bytes(whole_ids[:-2]), r"tokens\.bin: has .* damaged"),
        "no ids": (lambda: ids.write_bytes(b""), "holds no tokens"),
        "no file": (ids.unlink, "no such file"),
        "no index": (lambda: index.write_bytes(b"{}"), "is no index"),
        "short index": (lambda: index.write_bytes(whole_index[:-8]), r"tokens\.idx: has .* damaged"),
        "more documents": (lambda: overwrite(index, 18, struct.pack("<Q", 2**40)), r"tokens\.idx: has .* damaged"),
        "other type": (lambda: overwrite(index, 17, b"\6"), "type of ids 6: neither is known"),
        "other version": (lambda: overwrite(index, 9, b"\2"), "version 2"),
        "pointers": (lambda: overwrite(index, pointers + 8, struct.pack("<q", 4)), "one after another"),
        "negative length": (lambda: negative(index, whole_index, lengths), "damaged"),
        "boundaries": (lambda: overwrite(index, boundaries + 8 * n, struct.pack("<q", 3)), "does not end documents"),
        "no boundaries": (lambda: index.write_bytes(without_boundaries(whole_index, n)), "does not end documents"),
    }
    for name, (damage, expected) in cases.items():
        ids.write_bytes(whole_ids)
        index.write_bytes(whole_index)
        examine(prefix)
        damage()
        with pytest.raises(ConfigError) as error:
            examine(prefix)
        assert re.search(expected, str(error.value)), name


def negative(index: Path, whole: bytes, lengths: int) -> None:
    """A length below 0, and another that makes up for it."""
    first, second = struct.unpack_from("<ii", whole, lengths)
    overwrite(index, lengths, struct.pack("<ii", -5, first + second + 5))


def without_boundaries(whole: bytes, n: int) -> bytes:
    return whole[:26] + struct.pack("<Q", 0) + whole[34 : 34 + 12 * n]


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
def two(tokenizer, tmp_path: Path) -> Path:
    """A folder with the datasets a and b."""
    write_indexed(TEXTS * 2, tokenizer, tmp_path / "a")
    write_indexed(TEXTS[:30] * 3, tokenizer, tmp_path / "b")
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
        loop.Run(config, context, build_datasets(config), None, None, None, TrainState(4, 0), [], None, None), {}
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
    run = loop.Run(config, context, datasets, None, None, None, TrainState(2, 0), [], None, None)
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
