"""A checkpoint that an attacker wrote, manifest and all, runs nothing and reads nothing outside of its folder."""

import contextlib
import io
import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_moe.checkpoint.dcp import read_index
from megatron_moe.checkpoint.manifest import MANIFEST, entry_of, read_manifest, write_manifest
from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.config.errors import ConfigError
from tests.helpers.canary import Canary
from tests.helpers.checkpoints import sign
from tests.helpers.cli import ROOT
from tests.helpers.ranks import run_ranks
from tests.helpers.saving import replace_folder, small_run

EMBEDDING = "embedding.word_embeddings.weight"
MOMENT = f"optimizer.state.exp_avg.{EMBEDDING}"
CANARY = "canary"  # in the working directory


# --- What an attacker writes


def change_index(checkpoint: Path, change: Callable[[Metadata], None]) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(index)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def put(checkpoint: Path, name: str, value: object, *, legacy: bool = False) -> None:
    """Save a value as that of a tensor or object."""
    file = checkpoint / "__0_0.distcp"
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    start = file.stat().st_size
    file.write_bytes(file.read_bytes() + buffer.getvalue())
    place = _StorageInfo(file.name, start, len(buffer.getvalue()))

    def change(index: Metadata) -> None:
        keys = [key for key in index.storage_data if key.fqn == name]
        assert keys
        index.storage_data |= dict.fromkeys(keys, place)

    change_index(checkpoint, change)


def name_of_object(checkpoint: Path) -> str:
    entries = read_index(checkpoint).state_dict_metadata
    return next(name for name, entry in entries.items() if isinstance(entry, BytesStorageMetadata))


HARMFUL_TENSOR = [Canary(Path(CANARY)), torch.zeros(10_000)]  # at least as many bytes as the index says
PAYLOADS: dict[str, Callable[[Path], None]] = {
    "index": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Canary(Path(CANARY)))),
    "within the index": lambda folder: change_index(
        folder, lambda index: index.state_dict_metadata.update({"x": Canary(Path(CANARY))})
    ),
    "common.pt": lambda folder: torch.save(Canary(Path(CANARY)), folder / "common.pt"),
    "tensor": lambda folder: put(folder, EMBEDDING, HARMFUL_TENSOR),
    "tensor, old format": lambda folder: put(folder, EMBEDDING, HARMFUL_TENSOR, legacy=True),
    "moment": lambda folder: put(folder, MOMENT, HARMFUL_TENSOR),
    "object": lambda folder: put(folder, name_of_object(folder), Canary(Path(CANARY))),
    "object, old format": lambda folder: put(folder, name_of_object(folder), Canary(Path(CANARY)), legacy=True),
    "state.json": lambda folder: (folder / "state.json").write_bytes(pickle.dumps(Canary(Path(CANARY)))),
    MANIFEST: lambda folder: (folder / MANIFEST).write_bytes(pickle.dumps(Canary(Path(CANARY)))),
}
# What a reader does not read is no reason to refuse the rest.
UNREAD = {
    "resume": {"common.pt"},
    "init_from": {"common.pt", "moment"},
    "restore": {"common.pt", "moment"},
    "export": {"common.pt", "moment", "object", "object, old format"},
    "inspect": {"common.pt", "moment", "object", "object, old format", "tensor", "tensor, old format"},
}


def craft(template: Path, run: Path, payload: str) -> None:
    replace_folder(template, run)
    checkpoint = run / "checkpoints" / "step_00000001"
    if payload:
        PAYLOADS[payload](checkpoint)
        if payload != MANIFEST:
            sign(checkpoint)


# --- Who reads it


@contextlib.contextmanager
def resuming(run_folder: Path):
    with small_run("single", run_folder) as (run, _):
        yield run.checkpointer.load_latest


@contextlib.contextmanager
def initializing(run_folder: Path):
    with small_run("single", run_folder.with_name("new")) as (run, _):
        run.config.checkpoint.init_from = str(run_folder)
        yield run.checkpointer.load_latest


@contextlib.contextmanager
def restoring(run_folder: Path):
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_moe.train.restore import restored

    def read() -> None:
        try:
            with restored(run_folder):
                pass
        finally:
            if dist.is_initialized():
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()

    yield read


@contextlib.contextmanager
def exporting(run_folder: Path):
    from megatron_moe.hugging_face.exporter import export_run

    def read() -> None:
        output = run_folder.with_name("exported")
        shutil.rmtree(output, ignore_errors=True)
        export_run(run_folder, output)

    yield read


@contextlib.contextmanager
def inspecting(run_folder: Path):
    spec = spec_from_file_location("inspect_checkpoint", ROOT / "tools" / "inspect_checkpoint.py")
    tool = module_from_spec(spec)
    spec.loader.exec_module(tool)

    def read() -> None:
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            codes = [tool.main([str(run_folder), option]) for option in ("--verify", "--tensors")]
        assert "Traceback" not in out.getvalue() + error.getvalue()
        if any(codes):
            assert set(codes) <= {0, 1, 2}
            raise ConfigError(error.getvalue() + out.getvalue())

    yield read


READERS = {
    "resume": resuming,
    "init_from": initializing,
    "restore": restoring,
    "export": exporting,
    "inspect": inspecting,
}


def attack(reader: str, folder: str, payloads: list[str]) -> dict[str, tuple[str, bool]]:
    """In a rank: the error of a reader, or "", and whether the canary is there, for each payload."""
    template, run_folder, found = Path(folder) / "template", Path(folder) / "run", {}
    os.chdir(folder)
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger().addHandler(handler)
    replace_folder(template, run_folder)
    with READERS[reader](run_folder) as read:
        for payload in payloads:
            craft(template, run_folder, payload)
            error = ""
            try:
                read()
            except ConfigError as caught:
                error = str(caught)
            found[payload] = (error, Path(CANARY).exists())
            Path(CANARY).unlink(missing_ok=True)
            assert not logged, payload  # torch tells with a traceback of an index that it cannot read
    return found


def save(folder: str) -> None:
    with small_run("single", folder) as (run, step):
        step()
        run.checkpointer.save(run.state)
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(plain(run.config)))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crafted") / "template"
    run_ranks(save, 1, str(folder))
    return folder


@pytest.fixture
def checkpoint(template: Path, tmp_path: Path) -> Path:
    replace_folder(template, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step_00000001"


@pytest.mark.parametrize("reader", READERS)
def test_nothing_is_run(reader: str, template: Path) -> None:
    ((found),) = run_ranks(attack, 1, reader, str(template.parent), ["", *PAYLOADS])
    assert found.pop("") == ("", False)
    for payload, (error, harmed) in found.items():
        assert not harmed, payload
        assert bool(error) == (payload not in UNREAD[reader]), (payload, error)
        assert not error or "checkpoints/step_00000001" in error


def test_the_canary_would_be_there(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as torch and megatron-core read it, each payload does harm."""
    monkeypatch.chdir(checkpoint)
    for payload in ("within the index", "index"):
        PAYLOADS[payload](checkpoint)
        pickle.loads((checkpoint / ".metadata").read_bytes())
        assert Path(CANARY).exists(), payload
        Path(CANARY).unlink()
    PAYLOADS["common.pt"](checkpoint)
    torch.load("common.pt", weights_only=False)
    Path(CANARY).unlink()


# --- Places outside of the folder


def move_to(checkpoint: Path, path: str) -> None:
    """The index says that a tensor lies in another file."""

    def change(index: Metadata) -> None:
        key = next(key for key in index.storage_data if key.fqn == EMBEDDING)
        index.storage_data[key] = replace(index.storage_data[key], relative_path=path)

    change_index(checkpoint, change)


@pytest.mark.parametrize("place", ["../__0_0.distcp", "absolute", "linked.distcp", "none.distcp", ".", "", "sub/x"])
def test_places_outside_of_the_folder(place: str, checkpoint: Path) -> None:
    data = checkpoint / "__0_0.distcp"
    shutil.copy(data, checkpoint.parent / data.name)  # what is there could be read
    (checkpoint / "linked.distcp").symlink_to(checkpoint.parent / data.name)
    place = str(checkpoint.parent / data.name) if place == "absolute" else place
    move_to(checkpoint, place)
    sign(checkpoint)
    (checkpoint / "sub").mkdir()
    shutil.copy(data, checkpoint / "sub" / "x")
    with pytest.raises(ConfigError, match=r"\.metadata: .*is said to be in .*, which is no file of the checkpoint"):
        read_index(checkpoint)
    ((found),) = run_ranks(try_to_resume, 1, str(checkpoint.parent.parent))
    assert "is said to be in" in found or "linked.distcp: is a link" in found


def try_to_resume(folder: str) -> str:
    try:
        with small_run("single", folder):
            return ""
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/x", ".", "..", ""])
def test_a_manifest_names_files_of_its_folder_only(name: str, checkpoint: Path) -> None:
    (checkpoint.parent / "outside").write_text("x")
    write_manifest(checkpoint, {name: entry_of(checkpoint.parent / "outside")})
    with pytest.raises(ConfigError, match=r"manifest\.json: names .*, which is not a file of"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("name", [".metadata", "state.json"])
def test_a_manifest_names_what_is_read(name: str, checkpoint: Path) -> None:
    """What it does not name could be anything."""
    files = read_manifest(checkpoint)
    del files[name]
    hidden = (checkpoint / name).rename(checkpoint.parent / "hidden")
    write_manifest(checkpoint, files)
    hidden.rename(checkpoint / name)
    ((found),) = run_ranks(try_to_resume, 1, str(checkpoint.parent.parent))
    assert f"{checkpoint / name}: the manifest does not name it" in found


@pytest.mark.soak("crafted checkpoints")
@pytest.mark.parametrize("seed", range(4))
def test_a_garbled_index_is_refused_or_read(seed: int, checkpoint: Path, record_property) -> None:
    """Bits flipped, parts lost or moved: an index or a ConfigError, nothing else."""
    generator, content = random.Random(seed), (checkpoint / ".metadata").read_bytes()
    refused = 0
    for _ in range(500):
        data = bytearray(content)
        for _ in range(generator.choice([1, 1, 2, 8])):
            start, size = generator.randrange(len(data)), generator.choice([1, 1, 4, 64])
            data[start : start + size] = generator.randbytes(generator.choice([size, 0]))
        (checkpoint / ".metadata").write_bytes(data)
        try:
            read_index(checkpoint)
        except ConfigError:
            refused += 1
    assert refused > 250
    record_property("indices", 500)


# --- An index that does not fit the model


def drop(index: Metadata) -> None:
    del index.state_dict_metadata[EMBEDDING]
    for key in [key for key in index.storage_data if key.fqn == EMBEDDING]:
        del index.storage_data[key]


def reshape(index: Metadata) -> None:
    entry = index.state_dict_metadata[EMBEDDING]
    half = torch.Size((entry.size[0] // 2, *entry.size[1:]))
    entry.size, entry.chunks[0].sizes = half, half


@pytest.mark.parametrize("change", [drop, reshape])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(change: Callable, checkpoint: Path) -> None:
    change_index(checkpoint, change)
    sign(checkpoint)
    ((found),) = run_ranks(try_to_resume, 1, str(checkpoint.parent.parent))
    assert found.startswith(f"{checkpoint}: ")
    assert EMBEDDING in found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recent_losses": None}, "lacks 'recent_losses'"),
        ({"step": None}, "lacks 'step'"),
        ({"step": "two"}, "step='two'"),
        ({"skipped_steps": -1}, "skipped_steps=-1"),
        ({"consumed_samples": 1.5}, "consumed_samples=1.5"),
        ({"recent_losses": [1.0, "x"]}, "recent_losses="),
    ],
)
def test_a_state_of_another_version(changes: dict, expected: str, checkpoint: Path) -> None:
    file = checkpoint / "state.json"
    state = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in state.items() if value is not None}))
    sign(checkpoint)
    ((found),) = run_ranks(try_to_resume, 1, str(checkpoint.parent.parent))
    assert found.startswith(f"{file}: {expected}")
