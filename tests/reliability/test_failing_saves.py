"""A disk that is full, read-only or gone: training says so, and the last good checkpoint stands."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_moe.checkpoint.manifest import problems_of, read_manifest
from megatron_moe.checkpoint.run_folder import retire, saved_steps, step_of, superfluous
from tests.helpers.ranks import run_ranks
from tests.helpers.saving import RANKS, small_run
from tests.reliability.test_async_saves import SAVES, train_and_listen

KIB = 1024
NO_SPACE = "No space left on device"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MiB, about four checkpoints of one rank."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_whole(checkpoint: Path) -> bool:
    return problems_of(checkpoint, read_manifest(checkpoint)) == []


def fill(disk: Path, free: int) -> None:
    """Leave so many bytes, in whole pages."""
    (disk / "ballast").unlink(missing_ok=True)
    available = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(0, available.f_bavail * available.f_frsize - free)))


def save_on_full_disk(layout: str, disk: str, frees: list[int], background: bool) -> list[tuple[int, str, list[str]]]:
    """On each rank: save while so many bytes are free, one after the other.

    Returns:
        The free bytes, the error or "", and what the folder of checkpoints holds.
    """
    from megatron_moe.checkpoint.checkpointer import SaveError

    found = []
    with small_run(layout, f"{disk}/run", "checkpoint.keep_last=1") as (run, step):
        step()
        run.checkpointer.save(run.state)
        for free in frees:
            step()
            if dist.get_rank() == 0:
                fill(Path(disk), free)
            dist.barrier()
            error = ""
            try:
                run.checkpointer.begin(run.state, background=background)
                run.checkpointer.finish()
            except SaveError as caught:
                error = str(caught)
            assert not run.checkpointer.is_saving
            dist.barrier()
            found.append((free, error, names_in(run.checkpointer.folder)))
    return found


def check_full_disk(disk: Path, layout: str, frees: list[int], background: bool) -> None:
    ranks = run_ranks(save_on_full_disk, RANKS[layout], layout, str(disk), frees, background)
    assert all(rank == ranks[0] for rank in ranks)
    for free, error, there in ranks[0]:
        assert NO_SPACE in error, f"{free} bytes"
        assert there == ["step_00000001"]
    assert is_whole(disk / "run" / "checkpoints" / "step_00000001")


def test_full(disk: Path) -> None:
    check_full_disk(disk, "ep2", [0, 100 * KIB, 324 * KIB, 352 * KIB, 364 * KIB], background=True)


@pytest.mark.soak("failing disks")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("layout", ["single", "ep2"])
def test_full_at_any_byte(layout: str, background: bool, disk: Path, record_property) -> None:
    frees = list(range(0, 340 * KIB, 4 * KIB))
    check_full_disk(disk, layout, frees, background)
    record_property("saves", len(frees))


def test_a_run_on_a_disk_that_fills_up(disk: Path) -> None:
    fill(disk, 900 * KIB)  # for two checkpoints, not for three
    steps = ["train.train_steps=7", "checkpoint.save_interval=2", "evaluation.interval=100"]
    ranks = run_ranks(train_and_listen, 2, "ep2", f"{disk}/run", {}, SAVES["async"], *steps)
    (told,) = [line for line in ranks[0][0] if "not saved" in line]
    assert told.startswith(f"not saved: {disk}/run/checkpoints/step_00000006")
    assert NO_SPACE in told
    for _, end, _ in ranks:
        assert end.startswith("step 7 could not be saved: ")
        assert NO_SPACE in end
    checkpoints = disk / "run" / "checkpoints"
    assert names_in(checkpoints) == ["step_00000002", "step_00000004"]
    assert all(map(is_whole, checkpoints.iterdir()))


def attempt(run: object) -> str:
    """The error of a save that waits, or ""."""
    from megatron_moe.checkpoint.checkpointer import SaveError
    from megatron_moe.config.errors import TrainingError

    dist.barrier()
    try:
        run.checkpointer.save(run.state)
    except (SaveError, TrainingError) as error:
        return str(error)
    finally:
        dist.barrier()
    return ""


def save_where_nothing_may_be_written(folder: str) -> list[str]:
    """On each rank: errors of saves before, while and after the file system is read-only."""
    found = []
    with small_run("ep2", folder, "checkpoint.keep_last=1") as (run, step):
        for option in ("rw", "ro", "ro", "rw"):
            step()
            if dist.get_rank() == 0:
                subprocess.run(["mount", "-o", f"remount,{option}", Path(folder).parent], check=True)
            found.append(attempt(run))
            if option == "ro":
                assert is_whole(run.checkpointer.folder / "step_00000001")
    return found


def test_read_only(disk: Path) -> None:
    for errors in run_ranks(save_where_nothing_may_be_written, 2, f"{disk}/run"):
        assert [bool(error) for error in errors] == [False, True, True, False]
        assert errors[1] == f"{disk}/run/checkpoints/step_00000002.partial: Read-only file system"
    assert names_in(disk / "run" / "checkpoints") == ["step_00000004"]


def save_where_the_folder_goes(folder: str) -> list[str]:
    """On each rank: errors of saves after the folder of checkpoints went, while the run's goes, and after that."""
    import threading

    from megatron_moe.checkpoint import checkpointer
    from megatron_moe.checkpoint.checkpointer import SaveError

    def remove(path: Path) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(path)
        dist.barrier()

    found, go_on, write = [], threading.Event(), checkpointer.write
    with small_run("ep2", folder) as (run, step):
        step()
        found.append(attempt(run))
        remove(run.checkpointer.folder)
        found.append(attempt(run))
        checkpointer.write = lambda *args: go_on.wait() and write(*args)
        run.checkpointer.begin(run.state)
        remove(Path(folder))
        go_on.set()
        try:
            run.checkpointer.finish()
        except SaveError as error:
            found.append(str(error))
        found.append(attempt(run))
        assert names_in(run.checkpointer.folder) == ["step_00000001"]
        assert is_whole(run.checkpointer.folder / "step_00000001")
        remove(Path(folder))
        if dist.get_rank() == 0:
            Path(folder).write_text("in its place")
        found.append(attempt(run))
    return found


def test_a_folder_that_goes(tmp_path: Path) -> None:
    for errors in run_ranks(save_where_the_folder_goes, 2, str(tmp_path / "run")):
        assert [bool(error) for error in errors] == [False, False, True, False, True]
        assert "No such file or directory" in errors[2]
        assert errors[4] == f"{tmp_path}/run/checkpoints/step_00000001.partial: Not a directory"


def fail_once(overrides: list[str], folder: str, part: int, parts: int) -> tuple[int, set[str]]:
    """Fail at one change of files after the other; the number of failures, and the kinds of calls."""
    from tests.helpers.killing import Killer

    def fail() -> None:
        raise OSError(5, "Input/output error")

    killer = Killer(None, fail)
    killer.install()
    with small_run("single", folder, "checkpoint.keep_last=1", "checkpoint.keep_every=10", *overrides) as (run, step):
        checkpoints, kept = run.checkpointer.folder, set()

        def save(at: int | None) -> str:
            """After a step, with as much to prune as every other save; its error, or ""."""
            step()
            last = saved_steps(checkpoints)[-1:]
            for name in ("step_00000000", "step_00000001"):
                if last and not (checkpoints / name).exists():
                    shutil.copytree(last[0], checkpoints / name)
            killer.calls, killer.at, killer.armed = [], at, True
            error = attempt(run)
            run.checkpointer._removals.submit(lambda: None).result()  # after those of this save
            killer.armed = False
            newest = saved_steps(checkpoints)[-1]
            assert is_whole(newest), (at, error)
            assert step_of(newest) == run.state.step or (error and newest in last), (at, error)
            assert not list(checkpoints.glob("*.partial")), (at, error)
            kept.update(path for path in saved_steps(checkpoints) if step_of(path) % 10 == 0)
            assert all(path.is_dir() for path in kept)
            return error

        assert save(None) == save(None) == ""
        kinds = killer.calls
        points = [i for i, kind in enumerate(kinds, 1) if kind != "write"] + [kinds.index("write") + 1]
        for point in points[part::parts]:
            error = save(point)
            kind = killer.calls[point - 1]
            assert "Input/output error" in error or (not error and kind in ("rename", "remove", "rmdir")), kind
            assert save(None) == ""  # the next one
        return len(points[part::parts]), set(kinds)


def test_a_call_that_fails(tmp_path: Path) -> None:
    ((_, kinds),) = run_ranks(fail_once, 1, [], str(tmp_path / "run"), 0, 5)
    assert kinds == {"mkdir", "open", "write", "write_text", "fsync", "rename", "remove", "rmdir"}


@pytest.mark.soak("failing disks")
def test_any_call_that_fails(tmp_path: Path, record_property) -> None:
    ((count, _),) = run_ranks(fail_once, 1, [], str(tmp_path / "run"), 0, 1)
    assert count > 30
    record_property("saves", count)


@pytest.mark.parametrize("number", [1, 2, 30])
def test_a_tensor_that_cannot_be_written(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the writes of its archive fails, the error is that of the file."""
    from megatron_moe.checkpoint import writer

    calls = itertools.count(1)

    def fail(_: object, data: bytes) -> int:
        if next(calls) == number:
            raise OSError(5, "Input/output error")
        return len(data)

    monkeypatch.setattr(writer._DigestingStream, "write", fail)
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="Input/output error"):
        writer._save(torch.zeros(10), writer._DigestingStream(file))


def folders(folder: Path, *steps: int) -> list[str]:
    for step in steps:
        (folder / f"step_{step:08}").mkdir()
    return names_in(folder)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, None, [10]),
        (2, None, [9, 10]),
        (20, None, list(range(1, 11))),
        (1, 4, [4, 8, 10]),
        (2, 5, [5, 9, 10]),
        (1, 1, list(range(1, 11))),
        (3, 100, [8, 9, 10]),
    ],
)
def test_which_are_kept(keep_last: int, keep_every: int | None, kept: list[int], tmp_path: Path) -> None:
    folders(tmp_path, *range(1, 11))
    others = ["latest", "step_00000003.damaged", "step_00000011.partial", "step_123"]
    for name in others:
        (tmp_path / name).mkdir()
    for checkpoint in superfluous(tmp_path, keep_last, keep_every):
        shutil.rmtree(retire(checkpoint))
    assert names_in(tmp_path) == sorted([f"step_{step:08}" for step in kept] + others)


def break_weights(folder: str) -> list[str]:
    """On each rank: errors of saves with finite weights, with those of rank 1 broken, and with them mended."""
    found = []
    with small_run("ep2", folder, "checkpoint.keep_last=1") as (run, step):
        weight = next(p for name, p in run.pipeline.model[0].named_parameters() if "experts" in name)
        value = weight.data.view(-1)[3].item()
        for broken in (value, float("nan"), float("-inf"), value):
            step()
            if dist.get_rank() == 1:
                weight.data.view(-1)[3] = broken
            found.append(attempt(run))
            assert is_whole(saved_steps(run.checkpointer.folder)[-1])
            assert torch.isfinite(weight).all() or dist.get_rank() == 1
            if dist.get_rank() == 1:
                weight.data.view(-1)[3] = value
    return found


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    for errors in run_ranks(break_weights, 2, str(tmp_path / "run")):
        told = "weights of ranks [1] are not finite; nothing is saved of them. The last checkpoint stands, and the same"
        assert [error.split(" command")[0] for error in errors] == ["", f"step 2: {told}", f"step 3: {told}", ""]
    assert names_in(tmp_path / "run" / "checkpoints") == ["step_00000004"]
