"""A disk that is full, read-only or gone: training says so, and the last good checkpoint stands."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_moe.checkpoint.manifest import problems_of, read_manifest
from megatron_moe.checkpoint.run_folder import prune, saved_steps, step_of
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
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


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
