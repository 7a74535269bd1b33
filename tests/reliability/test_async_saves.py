"""A save in the background writes what a save that waits would have written, and tells of its failures."""

import contextlib
import io
import os
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_moe.config.errors import TrainingError
from tests.helpers.ranks import run_ranks
from tests.helpers.saving import RANKS, SMALL, small_run, weights_digest
from tests.helpers.training import tiny_config


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def both_ways(layout: str, folder: str, *overrides: str) -> tuple[dict, dict, list[str]]:
    """On each rank: save, and begin to save the same in the background; train before a byte of that is written.

    Returns:
        The files of each save, and digests of the weights when the second began and when it was written.
    """
    from megatron_moe.checkpoint import writer

    go_on, write_file = threading.Event(), writer._write_file
    with small_run(layout, folder, *overrides) as (run, step):
        step()
        step()
        waited = contents(run.checkpointer.save(run.state))
        dist.barrier()
        digests = [weights_digest(run)]
        writer._write_file = lambda *args: go_on.wait() and write_file(*args)
        run.checkpointer.begin(run.state)
        run.checkpointer.wait_until_copied()
        step()
        step()
        torch.rand(3)  # other random numbers, too
        digests.append(weights_digest(run))
        assert not run.checkpointer.is_ready
        go_on.set()
        background = contents(run.checkpointer.finish())
        dist.barrier()
        return waited, background, digests


@pytest.mark.parametrize(("layout", "dtype"), [("ep2", "fp32")])
def test_the_same_bytes_though_weights_change_meanwhile(layout: str, dtype: str, tmp_path: Path) -> None:
    check_same_bytes(layout, dtype, tmp_path)


@pytest.mark.soak("saves in the background")
@pytest.mark.parametrize(
    ("layout", "dtype"), [("single", "fp32"), ("single", "bf16"), ("ep2", "bf16"), ("dp2", "fp32"), ("dp2", "bf16")]
)
def test_the_same_bytes_in_other_layouts(layout: str, dtype: str, tmp_path: Path, record_property) -> None:
    check_same_bytes(layout, dtype, tmp_path)
    record_property("saves", 1)


def check_same_bytes(layout: str, dtype: str, tmp_path: Path) -> None:
    for waited, background, digests in run_ranks(
        both_ways, RANKS[layout], layout, str(tmp_path / "run"), f"precision={dtype}"
    ):
        assert digests[0] != digests[1]
        assert {".metadata", "common.pt", "metadata.json", "state.json", "manifest.json"} < waited.keys()
        assert len(waited) > 5 + RANKS[layout]  # every rank wrote
        assert background.keys() == waited.keys()
        assert [name for name in waited if background[name] != waited[name]] == []


def train_and_listen(layout: str, folder: str, failures: dict[int, list[int]], *overrides: str) -> tuple:
    """On each rank: a run of the loop in which saves fail on some ranks.

    Args:
        layout: of the ranks.
        folder: of the run.
        failures: numbers of the saves, from 1, that fail, by rank.
        overrides: of the small model.

    Returns:
        The lines it prints, the TrainingError that ends it, and the SaveErrors that this rank saw.
    """
    from megatron_moe.checkpoint import checkpointer
    from megatron_moe.checkpoint.checkpointer import Checkpointer, SaveError
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train.loop import train

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = tiny_config(*SMALL, f"parallel={layout}", f"run.dir={folder}", *overrides, world_size=world_size)
    Path(folder).mkdir(parents=True, exist_ok=True)
    count, errors, begin, collect, write = 0, [], Checkpointer.begin, Checkpointer._collect, checkpointer.write

    def fail_or_write(*args: object) -> object:
        nonlocal count
        count += 1
        if count in failures.get(rank, []):
            raise OSError(5, "Input/output error")
        return write(*args)

    def begin_and_wait(self: Checkpointer, *args: object, **options: bool) -> None:
        begin(self, *args, **options)
        wait([self._pending.written])  # so that the next step sees it, however slow the disk

    def collect_and_note(self: Checkpointer) -> None:
        try:
            collect(self)
        except SaveError as error:
            errors.append(str(error))
            raise

    checkpointer.write, Checkpointer.begin, Checkpointer._collect = fail_or_write, begin_and_wait, collect_and_note
    out, end = io.StringIO(), None
    context = distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"])
    with contextlib.redirect_stdout(out):
        try:
            with context as ranks:
                train(config, ranks, [])
        except TrainingError as error:
            end = str(error)
    return out.getvalue().splitlines(), end, errors


STEPS = ["train.train_steps=7", "checkpoint.save_interval=2", "evaluation.interval=100"]
SAVES = {"sync": "checkpoint.async_save=false", "async": "checkpoint.async_save=true"}
SAYS = "Input/output error; the training goes on, and the checkpoints before are as they were"


@pytest.mark.parametrize("save", SAVES)
def test_a_save_that_fails_on_one_rank_is_told_at_the_next_step(save: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = run_ranks(train_and_listen, 2, "ep2", str(folder), {1: [2]}, SAVES[save], *STEPS)
    lines = ranks[0][0]
    (told,) = [line for line in lines if "not saved" in line]
    assert told.startswith(f"not saved: {folder}/checkpoints/step_00000004: rank 1: ")
    assert told.endswith(SAYS)
    before = 4 if save == "sync" else 5  # the step after which it is told
    steps = [line.split()[1] for line in lines[: lines.index(told)] if line.startswith("step ") and "loss" in line]
    assert int(steps[-1].split("/")[0]) == before
    assert [end for _, end, _ in ranks] == [None, None]
    assert ranks[0][2] == ranks[1][2]  # the same error on both
    assert len(ranks[0][2]) == 1
    saved = [line.split(" | saved ")[0] for line in lines if " | saved " in line]
    assert saved == ["step 2", "step 6", "step 7"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000006", "step_00000007"]


@pytest.mark.parametrize("save", SAVES)
def test_the_last_save_must_succeed(save: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = run_ranks(train_and_listen, 2, "ep2", str(folder), {1: [4]}, SAVES[save], *STEPS)
    for _, end, _ in ranks:
        assert end.startswith(f"step 7 could not be saved: {folder}/checkpoints/step_00000007: rank 1: ")
        assert "the same command goes on from the last of them" in end
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]


def test_a_failed_save_before_the_last_step_is_made_up_for(tmp_path: Path) -> None:
    """The last step's own save is another one, though the one before still has to be told of."""
    steps = ["train.train_steps=4", "checkpoint.save_interval=3", "evaluation.interval=100"]
    ranks = run_ranks(train_and_listen, 2, "ep2", str(tmp_path / "run"), {0: [1], 1: [1]}, SAVES["async"], *steps)
    lines, end, _ = ranks[0]
    assert end is None
    (told,) = [line for line in lines if "not saved" in line]
    assert "rank 0: " in told
    assert "; rank 1: " in told
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]


def is_noticed(layout: str, folder: str) -> list[bool]:
    """On each rank: whether all ranks agree that a save is written, while rank 1's is not and when it is."""
    from megatron_moe.checkpoint import checkpointer
    from megatron_moe.train.agreement import agree

    go_on, write, seen = threading.Event(), checkpointer.write, []
    with small_run(layout, folder) as (run, step):
        step()
        if dist.get_rank() == 1:
            checkpointer.write = lambda *args: go_on.wait() and write(*args)
        run.checkpointer.begin(run.state)
        if dist.get_rank() == 0:
            wait([run.checkpointer._pending.written])
        for _ in range(2):
            loss = torch.tensor([1.0, 1.0])
            seen.append(agree(loss, finite_gradient=True, stop=False, saved=run.checkpointer.is_ready).saved)
            go_on.set()
            while not run.checkpointer.is_ready:
                time.sleep(0.01)
        run.checkpointer.finish()
    return seen


def test_a_save_is_written_when_all_ranks_have_written(tmp_path: Path) -> None:
    assert run_ranks(is_noticed, 2, "ep2", str(tmp_path)) == [[False, True]] * 2
