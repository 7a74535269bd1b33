import json
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from megatron_moe.config.errors import ConfigError
from megatron_moe.hugging_face.safetensors import INDEX, TensorToWrite, open_folder, read_header, write_folder

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "c": torch.ones(3),
}
VALID = save(TENSORS, {"format": "pt"})
EDITS = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=3)


def write(folder: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder / "model.safetensors"


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"x": entry(offsets=[0, 16], shape=[4])}, "its tensors take 16 bytes, the file holds 8"),
        ({"x": entry(offsets=[4, 12])}, "x: begins at byte 4"),
        ({"x": entry(offsets=[8, 0])}, "another number"),
        ({"x": entry(offsets=[0, 4])}, "F32 of shape .2. takes 8 bytes"),
        ({"x": entry(shape=[3])}, "takes 12 bytes"),
        ({"x": entry(shape=[-2])}, "integers from 0"),
        ({"x": entry(shape=[2.0])}, "integers from 0"),
        ({"x": entry(shape=[True, 2])}, "integers from 0"),
        ({"x": entry(shape="2")}, "integers from 0"),
        ({"x": entry(offsets=[0])}, "integers from 0"),
        ({"x": entry(dtype="C64")}, "no tensor of a known type"),
        ({"x": 3}, "no tensor of a known type"),
        ({"x": entry(), "y": entry()}, "y: begins at byte 0 of the data, the one before ends at 8"),
        ({"x": entry(), "y": entry(shape=[1], offsets=[4, 8])}, "y: begins at byte 4"),
        ({}, "its tensors take 0 bytes"),
        ([], "a JSON object is needed"),
        (b"{", "header: "),
        (b"\xff{}", "header: "),
        (b'{"x": 1, "x": 2}', "stands in it twice"),
        (b"[" * 100_000, "header: "),
    ],
)
def test_wrong_headers_are_refused(tmp_path: Path, header: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_header(write(tmp_path, header))


@pytest.mark.parametrize("data", [b"", b"\0\0\0", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", VALID[:20]])
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ConfigError, match="not a safetensors file, or cut off"):
        read_header(tmp_path / "x")


@settings(max_examples=300)
@given(edits=EDITS, end=st.integers(1, 2 * len(VALID)))
def test_what_is_accepted_is_valid(tmp_path_factory: pytest.TempPathFactory, edits: list, end: int) -> None:
    """The package's own check is the judge: damaged or cut files are refused wherever it refuses them."""
    damaged = bytearray(VALID)
    for place, value in edits:
        damaged[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(damaged[:end]))
    try:
        found = read_header(path)
    except ConfigError:
        return
    theirs = dict(safetensors.deserialize(bytes(damaged[:end])))
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {n: t["shape"] for n, t in theirs.items()}


def to_write(tensors: dict[str, torch.Tensor]) -> list[TensorToWrite]:
    return [TensorToWrite(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.mark.parametrize(("max_bytes", "files"), [(10**9, 1), (44, 1), (43, 2), (1, 3)])
def test_written_files_are_read_by_the_package(tmp_path: Path, max_bytes: int, files: int) -> None:
    written = write_folder(tmp_path, to_write(TENSORS), lambda t: TENSORS[t.name].split(1), max_bytes)
    assert written == files == len(list(tmp_path.glob("*.safetensors")))
    assert (tmp_path / INDEX).exists() == (files > 1)
    theirs = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert theirs.keys() == TENSORS.keys()
    for name, stored in open_folder(tmp_path).items():
        assert torch.equal(theirs[name], TENSORS[name])
        rows = torch.empty_like(TENSORS[name])[1:]
        stored.read_rows(1, rows)
        assert torch.equal(rows, TENSORS[name][1:])


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"a": "../model.safetensors"}, "must be the name of a .safetensors file"),
        ({"a": "/etc/passwd"}, "must be the name of a .safetensors file"),
        ({"a": "part.bin"}, "must be the name of a .safetensors file"),
        ({"a": 3}, "must be the name of a .safetensors file"),
        ({"a": "gone.safetensors"}, "gone.safetensors: no such file"),
        ({"a": "part.safetensors"}, "disagrees with its files on 2 tensors; b of part.safetensors is only in the file"),
        (dict.fromkeys("abcd", "part.safetensors"), "1 tensors; d of part.safetensors is only in the index"),
        ([], "no index with a weight_map"),
        ({"a": []}, "no index with a weight_map"),
    ],
)
def test_wrong_indices_are_refused(tmp_path: Path, index: object, expected: str) -> None:
    (tmp_path / "part.safetensors").write_bytes(VALID)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ConfigError, match=expected):
        open_folder(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin: pickles can run code; only safetensors"):
        open_folder(tmp_path)
