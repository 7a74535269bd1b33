"""A run that is killed while it saves goes on from a whole checkpoint, and ends as if nothing had happened."""

import itertools
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint.manifest import Files, problems_of, read_manifest
from megatron_moe.checkpoint.run_folder import saved_steps, step_of
from tests.helpers.cli import metrics_of
from tests.helpers.killing import diary_of, train_until_killed
from tests.helpers.ranks import run_ranks
from tests.helpers.saving import RANKS

SAVES = {"sync": "checkpoint.async_save=false", "async": "checkpoint.async_save=true"}
POINTS = 7  # kills of one run
LAST_STEP = 3 * POINTS + 5  # a run gets on by at most three saves before it is killed
INTERVAL = 1
MARKERS = {"latest": b"", "latest_checkpointed_iteration.txt": b"\x00\xffgarbage"}


@dataclass(frozen=True)
class Whole:
    """What a run that nobody killed left: losses and gradient norms by step, and the files of its last checkpoint."""

    metrics: list[tuple]
    files: Files


def train(folder: Path, layout: str, save: str, victim: int = 0, number: int = 1, **kill: Any) -> list[list[str]]:
    """In new processes, from the latest checkpoint; the calls by which each rank changed files in a save."""
    options = [f"parallel={layout}", SAVES[save], f"run.dir={folder}", f"train.train_steps={LAST_STEP}"]
    options += [f"checkpoint.save_interval={INTERVAL}", "evaluation.interval=1000"]
    keep, at, delay_s = kill.get("keep", 1), kill.get("at"), kill.get("delay_s")
    options += [f"checkpoint.keep_last={keep}", *kill.get("more", [])]
    return run_ranks(train_until_killed, RANKS[layout], options, victim, number, at, delay_s)


def outcome(folder: Path) -> Whole:
    names = ("step", "train/lm_loss", "train/grad_norm", "train/lr", "consumed_tokens")
    last = saved_steps(folder / "checkpoints")[-1]
    assert step_of(last) == LAST_STEP
    files = {name: entry for name, entry in read_manifest(last).items() if name != "state.json"}  # it has run.dir
    return Whole([tuple(line[name] for name in names) for line in metrics_of(folder)], files)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """By layout."""
    found: dict[str, Whole] = {}

    def get(layout: str) -> Whole:
        if layout not in found:
            folder = tmp_path_factory.mktemp("whole") / "run"
            train(folder, layout, "sync", more=["checkpoint.save_interval=1000"])
            found[layout] = outcome(folder)
        return found[layout]

    return get


def killed(folder: Path, layout: str, save: str, victim: int, number: int, **kill: Any) -> None:
    """Train until the kill, and see that at most one interval is lost and what has a checkpoint's name is whole."""
    if "at" in kill:  # there is as much to prune as in the trial
        shutil.copytree(folder.with_name("begun"), folder / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(AssertionError, match="ended without a word"):
        train(folder, layout, save, victim, number, **kill)
    begun = [entry["begun"] for entry in diary_of(folder) if "begun" in entry]
    saved = saved_steps(folder / "checkpoints")
    assert step_of(saved[-1]) >= begun[-1] - INTERVAL
    assert [problem for path in saved for problem in problems_of(path, read_manifest(path))] == []


def check_end(folder: Path, layout: str, save: str, expected: Whole) -> None:
    """The run goes on to its end, from what each kill left."""
    train(folder, layout, save, more=["checkpoint.save_interval=1000"])
    assert outcome(folder) == expected
    for entry in diary_of(folder):
        if "resumed" in entry:
            assert not [name for name in entry["there"] if name.endswith((".partial", ".removed", ".damaged"))]
            assert f"step_{entry['resumed']:08}" in entry["there"] or not entry["resumed"]
            assert all("changed since" in note for note in entry["notes"])
    for name, content in MARKERS.items():
        assert (folder / "checkpoints" / name).read_bytes() == content


def begin_run(folder: Path, layout: str, save: str, victim: int = 0, number: int = 1) -> list[str]:
    """Train from nothing to three checkpoints, and once more to see which calls a process's save makes."""
    start = ["train.exit_step=3"]
    train(folder, layout, save, more=start, keep=3)
    for name, content in MARKERS.items():
        (folder / "checkpoints" / name).write_bytes(content)
    shutil.copytree(folder / "checkpoints", folder.with_name("begun"))
    trial = folder.with_name("trial")
    shutil.copytree(folder, trial)
    calls = train(trial, layout, save, victim, number, more=[f"train.exit_step={3 + number + 1}"])[victim]
    assert set(calls) >= ({"open", "write", "fsync"} if victim else KINDS)
    return calls


KINDS = {"mkdir", "open", "write", "write_text", "fsync", "rename", "remove", "rmdir"}
WAYS = [("single", 0), ("ep2", 0), ("ep2", 1)]  # layout, rank that is killed
PARTS = 9  # of all calls of a save


def kill_points(calls: list[str]) -> list[int]:
    """Each call that changes files, and of the thousands that write shards some."""
    writes = [i for i, name in enumerate(calls, 1) if name == "write"]
    return [i for i, name in enumerate(calls, 1) if name != "write"] + writes[:: len(writes) // 8]


def test_killed_at_changes_of_each_kind(whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    calls = begin_run(folder, "single", "async")
    # A shard's first bytes, half of the manifest, the final name, the second file of a checkpoint that is to go.
    for kind, which in (("write", 0), ("write_text", -1), ("rename", 1), ("remove", 1)):
        points = [i for i, name in enumerate(calls, 1) if name == kind]
        killed(folder, "single", "async", 0, 1, at=points[which])
    check_end(folder, "single", "async", whole("single"))


@pytest.mark.soak("killed in a save")
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_every_change(part: int, whole, tmp_path: Path, record_property) -> None:
    folder = tmp_path / "run"
    points = kill_points(begin_run(folder, "single", "sync"))[part::PARTS]
    assert 3 <= len(points) <= POINTS
    for point in points:
        killed(folder, "single", "sync", 0, 1, at=point)
    check_end(folder, "single", "sync", whole("single"))
    record_property("kills", len(points))


@pytest.mark.soak("killed in a save")
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(("layout", "victim"), WAYS)
def test_killed_at_changes_of_a_later_save(layout, victim, save, whole, tmp_path: Path, record_property) -> None:
    """A process plans its first save only; the second one uses the plan again."""
    folder = tmp_path / "run"
    points = kill_points(begin_run(folder, layout, save, victim, number=2))
    for point in random.Random(f"{layout} {victim} {save}").sample(points, POINTS):
        killed(folder, layout, save, victim, 2, at=point)
    check_end(folder, layout, save, whole(layout))
    record_property("kills", POINTS)


@pytest.mark.soak("killed in a save")
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(("layout", "victim"), WAYS)
def test_killed_at_any_time(layout, victim, save, whole, tmp_path: Path, record_property) -> None:
    folder = tmp_path / "run"
    begin_run(folder, layout, save)
    times = [entry["time"] for entry in diary_of(folder) if "begun" in entry or "finished" in entry]
    duration = max(end - start for start, end in itertools.pairwise(times))
    generator = random.Random(f"{layout} {victim} {save}")
    for _ in range(POINTS):
        killed(folder, layout, save, victim, 1, delay_s=generator.uniform(0, 1.3 * duration))
    check_end(folder, layout, save, whole(layout))
    record_property("kills", POINTS)
