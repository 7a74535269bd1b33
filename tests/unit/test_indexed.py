"""What is written is what megatron-core writes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_moe.config.errors import ConfigError
from megatron_moe.data import indexed
from megatron_moe.data.indexed import IndexedWriter, Manifest, id_type, read_manifest, sha256_of, with_ending

MANIFEST = Manifest(
    documents=1,
    tokens=2,
    text_bytes=3,
    largest_id=4,
    vocab_size=5,
    end_of_document=None,
    tokenizer_sha256="a",
    bin_sha256="b",
    idx_sha256="c",
    sources=[{"path": "ü.jsonl", "bytes": 3, "sha256": "d"}],
    options={"field": "text"},
    skipped={"broken JSON": 1},
)


def documents_of(largest: int) -> list[list[int]]:
    numbers = np.random.default_rng(1)
    return [[*numbers.integers(0, largest, numbers.integers(1, 9)).tolist(), largest] for _ in range(20)]


def groups(documents: list[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(documents), 3):
        group = documents[start : start + 3]
        yield np.concatenate(group), np.array([len(ids) for ids in group])


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint16, 65_499), (np.int32, 200_000)])
@pytest.mark.parametrize("chunk", [2**20, 20, 7, 1])
def test_files_are_those_of_megatron(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type, largest: int, chunk: int
) -> None:
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    documents = documents_of(largest)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    writer = IndexedWriter(tmp_path / "ours", dtype)
    for ids, lengths in groups(documents):
        writer.append(ids, lengths)
    writer.finish()
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("ours*")) == ["ours.bin", "ours.idx"]


@pytest.mark.parametrize("vocab_size", [2, 65_499, 65_500, 65_536, 200_000])
def test_ids_are_as_wide_as_in_megatron(vocab_size: int) -> None:
    assert id_type(vocab_size) == DType.optimal_dtype(vocab_size)


def test_a_writer_goes_on_where_it_is_told(tmp_path: Path) -> None:
    documents = documents_of(99)
    writer = IndexedWriter(tmp_path / "a", np.uint16)
    for ids, lengths in groups(documents):
        writer.append(ids, lengths)
    writer.write_index()
    writer = IndexedWriter(tmp_path / "a", np.uint16, 2, sum(map(len, documents[:2])))
    writer.append(np.array([5, 6]), np.array([2]))
    writer.finish()
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [*documents[:2], [5, 6]]


@pytest.mark.parametrize(("num_documents", "num_tokens", "ending"), [(1, 3, "bin"), (2, 2, "lengths")])
def test_files_shorter_than_promised_are_refused(
    tmp_path: Path, num_documents: int, num_tokens: int, ending: str
) -> None:
    writer = IndexedWriter(tmp_path / "a", np.uint16)
    writer.append(np.array([5, 6]), np.array([2]))
    writer.sync()
    with pytest.raises(ConfigError, match=rf"a\.{ending}: is damaged"):
        IndexedWriter(tmp_path / "a", np.uint16, num_documents, num_tokens)


def test_points_in_a_name_are_no_ending() -> None:
    assert with_ending("data/v1.5", "bin") == Path("data/v1.5.bin")


def test_a_manifest_survives_the_round_trip(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "a") is None
    MANIFEST.write(tmp_path / "a.manifest.json")
    assert read_manifest(tmp_path / "a") == MANIFEST


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"documents": 1}'])
def test_what_is_no_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"a\.manifest\.json: is no manifest"):
        read_manifest(tmp_path / "a")


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
