"""Arrays are made once, mapped by all, never unpickled, and made anew where they are damaged."""

import json
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.data.cache import ArrayCache, Arrays
from tests.helpers.canary import Canary

KEY = {"seed": 1}
EXPECTED = {"order": list(range(100)), "none": []}


def build() -> Arrays:
    return {"order": np.arange(100, dtype=np.int32), "none": np.zeros(0, np.int32)}


def never() -> Arrays:
    raise AssertionError("it was there")


def plain(arrays: Arrays) -> dict[str, list[int]]:
    return {name: array.tolist() for name, array in arrays.items()}


def the_folder(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def test_arrays_are_made_once_and_mapped_read_only(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path / "deep" / "cache")
    for make in (build, never):
        arrays = cache.get("order", KEY, make)
        assert plain(arrays) == EXPECTED
        assert isinstance(arrays["order"], np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            arrays["order"][0] = 1
    for other in (("order", {"seed": 2}), ("split", KEY)):
        assert plain(cache.get(*other, lambda: {"a": np.ones(1)})) == {"a": [1.0]}


def test_threads_share_one_build(tmp_path: Path) -> None:
    builds, found = [], []

    def slow() -> Arrays:
        builds.append(1)
        time.sleep(0.2)
        return build()

    cache = ArrayCache(tmp_path)
    threads = [threading.Thread(target=lambda: found.append(cache.get("order", KEY, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert [plain(arrays) for arrays in found] == [EXPECTED] * 4


def get_and_note(folder: Path) -> None:
    def slow() -> Arrays:
        (folder / f"built_by_{os.getpid()}").touch()
        time.sleep(0.3)
        return build()

    assert plain(ArrayCache(folder / "cache", folder / "local").get("order", KEY, slow)) == EXPECTED
    (folder / f"got_by_{os.getpid()}").touch()


def test_processes_share_one_build(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=get_and_note, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("built_by_*"))) == 1
    assert len(list(tmp_path.glob("got_by_*"))) == 4
    for name in ("cache", "local"):
        assert len([path for path in (tmp_path / name).iterdir() if path.is_dir()]) == 1


def truncate(folder: Path) -> None:
    path = folder / "order.npy"
    path.write_bytes(path.read_bytes()[:-4])


def only_a_header(folder: Path) -> None:
    path = folder / "order.npy"
    path.write_bytes(path.read_bytes()[:20])


def broken_header(folder: Path) -> None:
    path = folder / "order.npy"
    path.write_bytes(path.read_bytes().replace(b"{'descr'", b"((('descr"))


def zipped(folder: Path) -> None:
    with (folder / "order.npy").open("wb") as file:
        np.savez(file, order=np.arange(100))


def no_zip(folder: Path) -> None:
    (folder / "order.npy").write_bytes(b"PK\x03\x04" + bytes(1000))


def other_shape(folder: Path) -> None:
    np.save(folder / "order.npy", np.arange(99, dtype=np.int32))


def other_type(folder: Path) -> None:
    np.save(folder / "order.npy", np.arange(100, dtype=np.float32))


def missing_array(folder: Path) -> None:
    (folder / "order.npy").unlink()


def missing_shapes(folder: Path) -> None:
    (folder / "shapes.json").unlink()


def shapes(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "shapes.json").write_bytes(text.encode("latin-1"))

    return damage


def garbage(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(np.random.default_rng(1).bytes(500))


DAMAGE = {
    "truncated": truncate,
    "only a header": only_a_header,
    "broken header": broken_header,
    "a zip": zipped,
    "no zip": no_zip,
    "other shape": other_shape,
    "other type": other_type,
    "missing array": missing_array,
    "missing shapes": missing_shapes,
    "garbage": garbage,
    "shapes empty": shapes("{}"),
    "shapes a list": shapes('["order", "none"]'),
    "shapes a number": shapes("3"),
    "shapes null": shapes("null"),
    "shapes half": shapes('{"order": [100'),
    "shapes of other arrays": shapes('{"order": [100, "int64"], "none": [0, "int32"]}'),
    "shapes no text": shapes("\xff\xfe"),
    "shapes of one only": shapes('{"order": [3, "int32"]}'),
    "shapes deep": shapes("[" * 100_000),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_made_anew(name: str, tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path)
    cache.get("order", KEY, build)
    DAMAGE[name](the_folder(tmp_path))
    with pytest.warns(UserWarning, match="is damaged and made anew"):
        assert plain(cache.get("order", KEY, build)) == EXPECTED
    assert plain(cache.get("order", KEY, never)) == EXPECTED


@pytest.mark.parametrize("name", ["order.npy", "shapes.json"])
@pytest.mark.parametrize("form", ["stream", "array", "npz"])
def test_a_pickle_is_not_run(name: str, form: str, tmp_path: Path) -> None:
    cache, canary = ArrayCache(tmp_path / "cache"), Canary(tmp_path / "canary")
    cache.get("order", KEY, build)
    path = the_folder(tmp_path / "cache") / name
    with path.open("wb") as file:
        if form == "stream":
            pickle.dump(canary, file)
        elif form == "array":
            np.save(file, np.array([canary], dtype=object), allow_pickle=True)
        else:
            np.savez(file, order=np.array([canary], dtype=object))
    if form == "stream":
        pickle.loads(path.read_bytes())  # the canary does sing
        canary.path.unlink()
    with pytest.warns(UserWarning, match="is damaged and made anew"):
        assert plain(cache.get("order", KEY, build)) == EXPECTED
    assert not canary.path.exists()
    assert plain(cache.get("order", KEY, never)) == EXPECTED


def test_an_array_of_objects_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle=False"):
        ArrayCache(tmp_path).get("order", KEY, lambda: {"a": np.array([{}], dtype=object)})
    assert not any(path.is_dir() for path in tmp_path.iterdir())


@pytest.mark.parametrize("local", [False, True])
def test_without_a_place_to_write_arrays_stay_in_memory(local: bool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "cache"
    cache = ArrayCache(tmp_path / "cache", nowhere) if local else ArrayCache(nowhere)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert plain(cache.get("order", KEY, build)) == EXPECTED


def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.warns(UserWarning, match="No space left"):
            assert plain(ArrayCache(tmp_path).get("order", KEY, build)) == EXPECTED
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_a_local_copy_is_what_is_mapped_and_outlives_the_shared_one(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path / "shared", tmp_path / "local")
    arrays = cache.get("order", KEY, build)
    assert Path(arrays["order"].filename).is_relative_to(tmp_path / "local")
    assert json.loads((the_folder(tmp_path / "shared") / "shapes.json").read_text())["order"] == [100, "int32"]
    shutil.rmtree(tmp_path / "shared")
    assert plain(cache.get("order", KEY, never)) == EXPECTED
    shutil.rmtree(tmp_path / "local")
    assert plain(arrays) == EXPECTED


def test_a_damaged_local_copy_comes_from_the_shared_one(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path / "shared", tmp_path / "local")
    cache.get("order", KEY, build)
    truncate(the_folder(tmp_path / "local"))
    with pytest.warns(UserWarning, match="is damaged"):
        assert plain(cache.get("order", KEY, never)) == EXPECTED
