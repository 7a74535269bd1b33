"""What the inspection tool says of checkpoints: whole, damaged, crafted, and two side by side."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_moe.checkpoint import dcp
from megatron_moe.checkpoint.manifest import MANIFEST, entry_of, write_manifest
from megatron_moe.plan.params import total_params
from tests.helpers.canary import Canary
from tests.helpers.cli import ROOT
from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_config, tiny_run

HARMFUL = Canary(Path("harm"))
TOOL = ROOT / "tools" / "inspect_checkpoint.py"
LAYOUT = ["parallel=ep2"]
EXPERTS = "decoder.layers.3.mlp.experts.experts.linear_fc2.weight"
spec = spec_from_file_location("inspect_checkpoint", TOOL)
tool = module_from_spec(spec)
spec.loader.exec_module(tool)


def train(folder: str) -> None:
    """Two steps, a checkpoint after each."""
    from megatron_moe.train.step import train_step

    with tiny_run([*LAYOUT, f"run.dir={folder}", "run.name=x"]) as (run, batches, num_micro_batches):
        for _ in range(2):
            train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
            run.state.advance(8)
            run.checkpointer.save(run.state)


def sign(checkpoint: Path) -> None:
    """Write the manifest of what is there."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    write_manifest(checkpoint, {path.name: entry_of(path) for path in checkpoint.iterdir()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("inspect") / "run"
    run_ranks(train, 2, str(folder))
    for step in (1, 2):
        sign(folder / "checkpoints" / f"step_0000000{step}")
    return folder


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of the newest, to be changed."""
    return Path(shutil.copytree(trained / "checkpoints" / "step_00000002", tmp_path / "step_00000002"))


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What the tool prints; its errors where it ends with 2."""
    capsys.readouterr()
    assert tool.main(list(map(str, arguments))) == code
    out = capsys.readouterr()
    assert bool(out.err) == (code == 2)
    return out.err if code == 2 else out.out


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def change_index(checkpoint: Path, change: Callable[[Metadata], None]) -> None:
    """Another index, with a manifest that says that it is right."""
    file = checkpoint / ".metadata"
    index = pickle.loads(file.read_bytes())
    change(index)
    file.write_bytes(pickle.dumps(index))
    sign(checkpoint)


def test_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, trained, "--verify")
    parameters = total_params(tiny_config(*LAYOUT, world_size=2).model)
    for line in (
        f"checkpoint         {trained}/checkpoints/step_00000002\n",
        "state              whole: a finished save\n",
        "step               2\n",
        "trained on         16 sequences, 512 tokens\n",
        "skipped steps      0\n",
        "saved by           2 ranks: expert 2, data 2\n",
        "precision          fp32\n",
        f"model              deepseekmoe_nano, {parameters:,} parameters\n",
        "verified: every file is as its manifest says, and no part of the model is missing\n",
    ):
        assert line in text
    table = rows(text)
    for kind in ("model weights", "main parameters", "first moments", "second moments"):
        assert [*kind.split(), "36", f"{parameters:,}", "1.1", "MB"] in table
    listed = [row[:2] for row in table if row and row[0].startswith("step_")]
    assert listed == [["step_00000001", "whole"], ["step_00000002", "whole"]]
    assert "step               2\n" in said(capsys, trained / "checkpoints")


def test_json(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, trained, "--verify", "--json", "--tensors", "*router*"))
    assert found["description"]["layout"]["expert"] == 2
    assert found["problems"] == []
    assert [entry["name"] for entry in found["checkpoints"]] == ["step_00000001", "step_00000002"]
    newest = trained / "checkpoints" / "step_00000002"
    assert found["entry"]["nbytes"] == sum(path.stat().st_size for path in newest.iterdir())
    assert len(found["tensors"]) == 3 * 4
    expected = {"name": "decoder.layers.1.mlp.router.weight", "shape": [8, 64], "dtype": "float32"}
    assert found["tensors"][0] == expected | {"nbytes": 2048, "chunks": 1}


def test_tensors(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(said(capsys, trained, "--tensors", f"*exp_avg.{EXPERTS}"))
    assert [f"optimizer.state.exp_avg.{EXPERTS}", "[8,", "64,", "32]", "float32", "65,536", "8"] in table
    assert "--tensors=routr: no tensor of" in said(capsys, trained, "--tensors", "routr", code=2)


def test_differences(trained: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = trained / "checkpoints" / "step_00000002"
    text = said(capsys, before, checkpoint, "--values")
    for line in ("the same options", "the same tensors, shapes and types", "the same values, bit for bit"):
        assert line in text
    file = checkpoint / "state.json"
    state = json.loads(file.read_text())
    state["config"]["optimizer"]["lr"] = 0.5
    state["config"]["data"]["train"] = [{"path": "x"}]
    file.write_text(json.dumps(state))

    def change(index: Metadata) -> None:
        entries = index.state_dict_metadata
        entries["more"] = entries["output_layer.weight"]
        places = {key.offset: place for key, place in index.storage_data.items() if key.fqn == "output_layer.weight"}
        index.storage_data |= {MetadataIndex("more", offset): place for offset, place in places.items()}
        entries["embedding.word_embeddings.weight"].size = (256, 65)

    change_index(checkpoint, change)
    text = said(capsys, before, checkpoint)
    assert '2 options\n  data.train: [] -> [{"path": "x"}]\n  optimizer.lr: 0.001 -> 0.5\n' in text
    assert "2 tensors\n" in text
    assert "  embedding.word_embeddings.weight: [256, 64] float32 -> [256, 65] float32\n" in text
    assert f"  more: only in {checkpoint}\n" in text
    text = said(capsys, checkpoint, before)
    assert "  optimizer.lr: 0.5 -> 0.001\n" in text
    assert f"  more: only in {checkpoint}\n" in text


def test_other_values_are_found(trained: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of one expert."""
    saved = dcp.SavedTensors(checkpoint)
    place = saved._places[MetadataIndex(EXPERTS, (5, 0, 0))]
    file = checkpoint / place.relative_path
    start = dcp._data_offset(file, place.offset, place.length, 64 * 32 * 4)
    data = bytearray(file.read_bytes())
    data[start + 4000] ^= 1
    file.write_bytes(data)
    text = said(capsys, trained, checkpoint, "--values")
    assert f"1 tensor\n  {EXPERTS}: other values\n" in text
    found = json.loads(said(capsys, trained, trained / "checkpoints" / "step_00000001", "--values", "--json"))
    assert f"{EXPERTS}: other values" in found["differences"]["values"]
    assert "--values: compares two checkpoints" in said(capsys, trained, "--values", code=2)


def test_values_are_read_in_the_folder_only(
    trained: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link(checkpoint / "__1_0.distcp")
    assert "'__1_0.distcp', which is no file of" in said(capsys, trained, checkpoint, "--values", code=2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def link(path: Path) -> None:
    other = path.parent.parent / "elsewhere"
    path.rename(other)
    path.symlink_to(other)


DAMAGES = [
    *itertools.product([".metadata", "state.json", "common.pt", "__1_0.distcp"], [flip, truncate, Path.unlink, link]),
    *itertools.product([MANIFEST], [flip, truncate, Path.unlink]),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_damaged_files_are_named(
    name: str, damage: Callable, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoint / name)
    problems = json.loads(said(capsys, checkpoint, "--verify", "--json", code=1))["problems"]
    assert problems[0].startswith(f"{checkpoint / name}: ")


def place_of(index: Metadata):
    return index.storage_data[MetadataIndex(EXPERTS, (5, 0, 0))]


def outside(index: Metadata) -> None:
    place_of(index).relative_path = "../secret"


def unnamed(index: Metadata) -> None:
    place_of(index).relative_path = "x.distcp"


def beyond(index: Metadata) -> None:
    place_of(index).offset += 10**9


def negative(index: Metadata) -> None:
    place_of(index).offset = -1


def short(index: Metadata) -> None:
    place_of(index).length = 9


def unplaced(index: Metadata) -> None:
    del index.storage_data[MetadataIndex(EXPERTS, (5, 0, 0))]


def lose_expert(index: Metadata) -> None:
    index.state_dict_metadata[EXPERTS].chunks.pop(next(_chunks_of(index, expert=6)))


def double_expert(index: Metadata) -> None:
    chunks = index.state_dict_metadata[EXPERTS].chunks
    chunks.append(chunks[next(_chunks_of(index, expert=6))])


def lose_all_experts(index: Metadata) -> None:
    del index.state_dict_metadata[f"optimizer.state.param.{EXPERTS}"]


def _chunks_of(index: Metadata, expert: int):
    chunks = index.state_dict_metadata[EXPERTS].chunks
    return (number for number, chunk in enumerate(chunks) if chunk.offsets[0] == expert)


def malformed(index: Metadata) -> None:
    index.state_dict_metadata[EXPERTS].chunks = 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (outside, "'../secret', which is no file of"),
        (unnamed, "'x.distcp', which is no file of"),
        (beyond, ": is said to end at byte 1,000,"),
        (negative, ": is said to be at byte -1 of "),
        (unplaced, f"{EXPERTS}: chunk [5:6, 0:64, 0:32] is in no file"),
        (short, " does not fit into 9 bytes"),
        (lose_expert, f"{EXPERTS}: layer 3, expert 6: 2,048 of 16,384 values were not saved"),
        (double_expert, f"{EXPERTS}: layer 3, expert 6: 2,048 of 16,384 values were saved more than once"),
        (lose_all_experts, f"optimizer.state.param.{EXPERTS}: layer 3, experts 0 to 7: was not saved"),
        (malformed, "the index is malformed: "),
    ],
)
def test_an_index_that_is_wrong(
    change: Callable, expected: str, checkpoint: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though its digest is the manifest's. Its values are not read then, wherever they are said to be."""
    assert said(capsys, checkpoint, "--verify")
    change_index(checkpoint, change)
    text = said(capsys, checkpoint, "--verify", code=1)
    assert "1 problem\n" in text
    assert expected in text
    if change is not lose_all_experts:
        assert "error: " in said(capsys, trained, checkpoint, "--values", code=2)


@pytest.mark.parametrize("content", [HARMFUL, Metadata({"x": HARMFUL})], ids=["call", "nested"])
def test_an_index_runs_no_code(
    content: object, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
    sign(checkpoint)
    assert "is not of an index" in said(capsys, checkpoint, "--verify", code=1)
    assert "is not of an index" in said(capsys, checkpoint, "--tensors", code=2)
    assert not (checkpoint / "harm").exists()
    pickle.loads(pickle.dumps(content))
    assert (checkpoint / "harm").exists()


def test_unfinished_and_damaged_ones(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint.parent
    checkpoint.rename(damaged := folder / "step_00000002.damaged")
    (partial := folder / "step_00000003.partial").mkdir()
    text = said(capsys, folder, code=2)
    assert "no whole checkpoint in it, only step_00000002.damaged, step_00000003.partial; name one" in text
    text = said(capsys, damaged)
    assert "state              damaged: it was found damaged and passed over" in text
    assert "step               2\n" in text
    text = said(capsys, partial)
    assert "state              partial: a save that has not ended or was interrupted" in text
    assert "unreadable         " in text
    assert f"{partial / MANIFEST}: " in said(capsys, partial, "--verify", code=1)
    (damaged / MANIFEST).unlink()
    damaged.rename(checkpoint)
    assert "state              no manifest: " in said(capsys, checkpoint)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("nowhere", "nowhere: neither a run, nor its checkpoints, nor a checkpoint"), (".", ".: neither a run")],
)
def test_what_is_no_checkpoint(
    path: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"error: {expected}" in said(capsys, path, code=2)


def test_a_description_that_is_wrong(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "step": "two"}))
    assert "state.json: step='two': must be a whole number" in said(capsys, checkpoint, code=2)
    file.write_text(json.dumps({**state, "config": {"model": {"layers": 3}}}))
    assert f"{file}: model.layers=3: there is no such option" in said(capsys, checkpoint, code=2)
    state["config"]["model"]["name"] = "\x1b[2J[red]model"
    file.write_text(json.dumps(state))
    text = said(capsys, checkpoint)
    assert "\x1b" not in text
    assert "[red]model" in text


def test_the_tool_is_without_megatron_core(trained: Path) -> None:
    script = (
        f"import runpy, sys\nsys.argv = ['x', {str(trained)!r}, '--verify', '--tensors']\n"
        f"try:\n    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "finally:\n    print([name for name in sys.modules if name.startswith('megatron.')])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert result.stderr == ""
