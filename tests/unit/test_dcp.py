import itertools
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe.checkpoint import dcp
from megatron_moe.checkpoint.dcp import NewTensor, Rows, SavedTensors, write_checkpoint
from megatron_moe.config.errors import ConfigError
from tests.helpers.canary import Canary

HARMFUL = Canary(Path("harm"))
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def save_cut(folder: Path, whole: torch.Tensor, cuts: list[list[int]], kept: int | None = None) -> None:
    """Save a tensor cut into a grid of chunks, of which the first `kept` are there."""
    index = Metadata({}, storage_data={})
    chunks = []
    edges = [sorted({0, n, *(c % n for c in cut)}) for cut, n in zip(cuts, whole.shape, strict=True)]
    with (folder / dcp.DATA_FILE).open("wb") as file:
        for box in list(itertools.product(*(itertools.pairwise(e) for e in edges)))[:kept]:
            offsets, sizes = torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box)
            place = dcp._append(file, whole[tuple(slice(a, b) for a, b in box)].clone())
            index.storage_data[MetadataIndex("x", offsets)] = place
            chunks.append(ChunkStorageMetadata(offsets, sizes))
    index.state_dict_metadata["x"] = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    dcp._data_offset.cache_clear()


@settings(max_examples=60)
@given(shape=SHAPES, data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_across_chunks(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], data: st.DataObject, dtype: torch.dtype
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = torch.randn(shape).to(dtype)
    save_cut(folder, whole, [data.draw(st.lists(st.integers(0, 4), max_size=3)) for _ in shape])
    expert = data.draw(st.integers(0, shape[0] - 1)) if len(shape) == 3 else None
    matrix = whole if expert is None else whole[expert]
    first = data.draw(st.integers(0, matrix.shape[0] - 1))
    count = data.draw(st.integers(1, matrix.shape[0] - first))
    read = SavedTensors(folder).read("x", Rows(expert, first, count))
    assert torch.equal(read, matrix[first : first + count])


def test_what_was_never_saved_is_missed(tmp_path: Path) -> None:
    save_cut(tmp_path, torch.randn(4, 3), [[2], []], kept=1)
    assert SavedTensors(tmp_path).read("x", Rows(None, 0, 2)).shape == (2, 3)
    with pytest.raises(ConfigError, match=r"x: 3 values of rows .* were never saved"):
        SavedTensors(tmp_path).read("x", Rows(None, 0, 3))


def test_torch_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "PIECE_BYTES", 24)
    wholes = {"matrix": torch.randn(7, 3), "experts": torch.randn(2, 5, 3).bfloat16(), "norm": torch.randn(9)}
    tensors = [NewTensor(k, t.dtype, tuple(t.shape), t.dim() == 3, (f"{k}_too",)) for k, t in wholes.items()]

    def read(key: str, rows: Rows) -> torch.Tensor:
        matrix = wholes[key] if rows.index is None else wholes[key][rows.index]
        return matrix[rows.first : rows.first + rows.count]

    write_checkpoint(tmp_path, tensors, ["x._extra_state/shard_0_1"], read)
    loaded = {name: torch.zeros_like(t) for k, t in wholes.items() for name in (k, f"{k}_too")}
    load(loaded, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    for key, whole in wholes.items():
        assert torch.equal(loaded[key], whole)
        assert torch.equal(loaded[f"{key}_too"], whole)
    assert len(SavedTensors(tmp_path).tensors["matrix"].chunks) == 4


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(HARMFUL),
        pickle.dumps(Metadata({"x": HARMFUL})),
        pickle.dumps(3),
        b"",
        b"garbage",
        b"\x80\x04.",
    ],
    ids=["call", "nested", "number", "empty", "garbage", "cut"],
)
def test_an_index_runs_no_code(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(ConfigError, match="no index of a checkpoint"):
        SavedTensors(tmp_path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"\0" * len(data), lambda data: b""])
def test_damaged_data_is_refused(tmp_path: Path, damage) -> None:
    save_cut(tmp_path, torch.randn(4, 3), [[], []])
    file = tmp_path / dcp.DATA_FILE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=r"byte 0: not a tensor as torch saves it|x: is said to end at"):
        SavedTensors(tmp_path).read("x", Rows(None, 0, 4))


@pytest.mark.parametrize("value", [torch.randn(3, 4).t(), torch.randn(5, 3)[1:], torch.randn(3, 3), [HARMFUL]])
def test_chunks_that_are_not_what_the_index_says_are_refused(tmp_path: Path, value: object) -> None:
    save_cut(tmp_path, torch.randn(4, 3), [[], []])
    index = dcp.read_index(tmp_path)
    place = index.storage_data[MetadataIndex("x", (0, 0))]
    with (tmp_path / dcp.DATA_FILE).open("wb") as file:
        written = dcp._append(file, value)
    place.length = written.length
    index.storage_data = {MetadataIndex("x", (0, 0)): place}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    dcp._data_offset.cache_clear()
    with pytest.raises(ConfigError, match="not a tensor as torch saves it"):
        SavedTensors(tmp_path).read("x", Rows(None, 0, 4))
