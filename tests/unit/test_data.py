"""Documents to samples, without processes."""

import itertools
import re
import struct
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import compose_config
from megatron_moe.data import corpus
from megatron_moe.data.cache import ArrayCache
from megatron_moe.data.corpus import prepare_python_stdlib, write_indexed
from megatron_moe.data.dataset import BlendedDataset, PackedDataset, examine, unigram_entropy
from megatron_moe.data.sources import build_datasets, held_out_sources
from megatron_moe.data.tokenizer import END_OF_SENTENCE, end_of_document, load_tokenizer, train_tokenizer
from tests.helpers.text import TEXTS, overwrite, small_tokenizer


@pytest.fixture
def tokenizer():
    return small_tokenizer()


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
