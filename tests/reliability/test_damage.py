"""Damage to a checkpoint is found before a weight is used, whatever the file and whatever the damage."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_moe.checkpoint import manifest
from megatron_moe.checkpoint.manifest import MANIFEST, read_manifest
from megatron_moe.checkpoint.run_folder import REMOVED
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import OnDamage, Verify
from tests.helpers.ranks import run_ranks
from tests.helpers.saving import RANKS, replace_folder, small_run, weights_digest

Damage = Callable[[Path, random.Random], None]
LAYOUTS = ["single", "ep2"]


def flip_bit(file: Path, generator: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, generator: random.Random) -> None:
    os.truncate(file, generator.randrange(file.stat().st_size))


def zero(file: Path, generator: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def empty(file: Path, generator: random.Random) -> None:
    file.write_bytes(b"")


def append(file: Path, generator: random.Random) -> None:
    file.write_bytes(file.read_bytes() + generator.randbytes(8))


def delete(file: Path, generator: random.Random) -> None:
    file.unlink()


def make_folder(file: Path, generator: random.Random) -> None:
    file.unlink()
    file.mkdir()


def link(file: Path, generator: random.Random) -> None:
    """Though it has the right content."""
    file.rename(elsewhere := file.parent.parent / "elsewhere")
    file.symlink_to(elsewhere)


def take_from_before(file: Path, generator: random.Random) -> None:
    """The same file of the checkpoint before."""
    shutil.copy(file.parent.parent / "step_00000001" / file.name, file)


DAMAGES = [flip_bit, truncate, zero, empty, append, delete, make_folder, link, take_from_before]
SAME_IN_ALL = ("common.pt", "metadata.json", ".metadata")  # taken from the one before it is no damage


def save_twice(layout: str, folder: str, *overrides: str) -> None:
    with small_run(layout, folder, *overrides) as (run, step):
        for _ in range(2):
            step()
            run.checkpointer.save(run.state)


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A layout, and a run with checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(save_twice, RANKS[request.param], request.param, str(folder))
    return request.param, folder


def refusals(layout: str, folder: str, names: list[str], seed: int, rounds: int) -> list[tuple[str, str, list[str]]]:
    """On each rank: damage one file after the other in each way, and try to load.

    Returns:
        File, damage, and the lines of the error, for each.
    """
    with small_run(layout, folder) as (run, step):
        template, checkpoints = Path(folder).with_name("template"), run.checkpointer.folder
        step()  # the weights are none that a checkpoint has
        before, found, generator = weights_digest(run), [], random.Random(seed)
        for _ in range(rounds):
            for name in names:
                for damage in DAMAGES:
                    if damage is take_from_before and name in SAME_IN_ALL:
                        continue
                    if dist.get_rank() == 0:
                        replace_folder(template, checkpoints)
                        damage(checkpoints / "step_00000002" / name, generator)
                    dist.barrier()
                    lines = []
                    try:
                        run.checkpointer.load_latest()
                    except ConfigError as error:
                        lines = list(error.problems)
                    found.append((name, damage.__name__, lines))
                    assert weights_digest(run) == before, (name, damage, lines)
        return found


def check_refused(layout: str, folder: Path, tmp_path: Path, seed: int, rounds: int) -> int:
    replace_folder(folder / "checkpoints", tmp_path / "template")
    replace_folder(folder, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    names = sorted(path.name for path in checkpoint.iterdir())
    assert {".metadata", "common.pt", "metadata.json", "state.json", MANIFEST, "__0_0.distcp"} < set(names)
    ranks = run_ranks(refusals, RANKS[layout], layout, str(tmp_path / "run"), names, seed, rounds)
    assert all(rank == ranks[0] for rank in ranks)
    for name, damage, lines in ranks[0]:
        assert lines, f"{damage} of {name} was not found"
        if (name, damage) != (MANIFEST, "take_from_before"):  # of the others, all that differ are named
            assert lines[0].startswith(f"{checkpoint / name}: "), (name, damage, lines)
            assert len(lines) == 2
        assert "is not used; checkpoint.on_damage=previous goes on" in lines[-1]
    return len(ranks[0])


def test_every_damage_of_every_file_is_found(saved, tmp_path: Path) -> None:
    check_refused(*saved, tmp_path, seed=0, rounds=1)


@pytest.mark.soak("damage of checkpoints")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_damage_at_many_places(seed, saved, tmp_path: Path, record_property) -> None:
    record_property("damages", check_refused(*saved, tmp_path, seed, rounds=6))


def test_shards_in_place_of_each_other(saved, tmp_path: Path) -> None:
    layout, folder = saved
    replace_folder(folder, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    shards = sorted(checkpoint.glob("*.distcp"))
    for i in range(len(shards) - 1):
        replace_folder(folder / "checkpoints", checkpoint.parent)
        first, second = shards[i].read_bytes(), shards[i + 1].read_bytes()
        shards[i].write_bytes(second)
        shards[i + 1].write_bytes(first)
        error = load_error(layout, tmp_path / "run")
        assert f"{shards[i]}: is damaged" in error
        assert f"{shards[i + 1]}: is damaged" in error


def load_error(layout: str, folder: Path, *overrides: str) -> str:
    with pytest.raises(AssertionError, match="ConfigError") as caught:
        run_ranks(load, RANKS[layout], layout, str(folder), *overrides)
    return str(caught.value)


def load(layout: str, folder: str, *overrides: str) -> tuple[int, list[str], str]:
    with small_run(layout, folder, *overrides) as (run, _):
        return run.state.step, run.notes, weights_digest(run)


PREVIOUS = ["checkpoint.on_damage=previous", "checkpoint.keep_last=1"]


def go_on(layout: str, folder: str, fail: bool) -> tuple[int, list[str], list[str], list[str]]:
    """On each rank, from a damaged checkpoint: where from, what is said, and the checkpoints before and after a save.

    `fail`: that save does.
    """
    from megatron_moe.checkpoint import checkpointer
    from megatron_moe.checkpoint.checkpointer import SaveError

    with small_run(layout, folder, *PREVIOUS) as (run, step):
        start, notes, there = run.state.step, run.notes, names_in(run.checkpointer.folder)
        step()
        if fail:
            checkpointer.write_manifest = no_space
            with pytest.raises(SaveError, match="No space left"):
                run.checkpointer.save(run.state)
        else:
            run.checkpointer.save(run.state)
        dist.barrier()
        return start, notes, there, names_in(run.checkpointer.folder)


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def names_in(folder: Path) -> list[str]:
    """But for what is being removed in the background."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != REMOVED)


@pytest.mark.parametrize(("name", "fail"), [("__0_1.distcp", False)])
def test_the_run_goes_on_from_the_checkpoint_before(name, fail, saved, tmp_path: Path) -> None:
    check_fallback(*saved, tmp_path, name, fail)


@pytest.mark.soak("damage of checkpoints")
@pytest.mark.parametrize(("name", "fail"), [("state.json", True), (MANIFEST, False), (".metadata", True)])
def test_the_run_goes_on_from_other_damage(name, fail, saved, tmp_path: Path, record_property) -> None:
    check_fallback(*saved, tmp_path, name, fail)
    record_property("damages", 1)


def check_fallback(layout: str, folder: Path, tmp_path: Path, name: str, fail: bool) -> None:
    replace_folder(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    expected = run_ranks(load, RANKS[layout], layout, str(tmp_path / "run"))
    replace_folder(folder, tmp_path / "run")
    flip_bit(tmp_path / "run" / "checkpoints" / "step_00000002" / name, random.Random(0))
    found = run_ranks(load, RANKS[layout], layout, str(tmp_path / "run"), *PREVIOUS)
    assert [rank[2] for rank in found] == [rank[2] for rank in expected]

    replace_folder(folder, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    flip_bit(checkpoint / name, random.Random(0))
    (checkpoint.parent / "step_00000002.damaged").mkdir()  # of another time
    for start, notes, there, after in run_ranks(go_on, RANKS[layout], layout, str(tmp_path / "run"), fail):
        assert start == 1
        assert notes[0].startswith(f"passed over: {checkpoint / name}: ")
        assert notes[0].endswith("kept as step_00000002.damaged")
        assert there == ["step_00000001", "step_00000002.damaged"]
        good = "step_00000001" if fail else "step_00000002"
        assert after == sorted([good, "step_00000002.damaged"])
    assert (checkpoint.parent / "step_00000002.damaged" / "__0_0.distcp").exists()


def test_without_a_good_checkpoint_nothing_starts_anew(saved, tmp_path: Path) -> None:
    layout, folder = saved
    replace_folder(folder, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for checkpoint in checkpoints.iterdir():
        flip_bit(checkpoint / ".metadata", random.Random(0))
    for _ in range(2):  # the second time, too
        error = load_error(layout, tmp_path / "run", *PREVIOUS)
        for step in (1, 2):
            assert f"{checkpoints}/step_0000000{step}/.metadata: is damaged" in error
        assert "no checkpoint is left; start another run with run.name=NEW" in error
    assert names_in(checkpoints) == ["step_00000001", "step_00000002"]  # as they were, for whoever can mend them


def sizes_only(layout: str, folder: str) -> dict[str, tuple[str, str]]:
    """By file of the checkpoint: what comes of a flipped bit and of a lost byte where large files are only measured."""
    from megatron_moe.checkpoint.reader import damage

    manifest.SMALL_BYTES = 40_000
    found = {}
    with small_run(layout, folder, "checkpoint.verify=metadata") as (run, _):
        assert run.config.checkpoint.verify is Verify.metadata
        checkpoint = run.checkpointer.folder / "step_00000002"
        for name, entry in sorted(read_manifest(checkpoint).items()):
            file, lines = checkpoint / name, []
            content = file.read_bytes()
            dist.barrier()
            for changed in (bytes([content[0] ^ 1]) + content[1:], content[:-1]):
                if dist.get_rank() == 0:
                    file.write_bytes(changed)
                dist.barrier()
                lines.append("\n".join(damage(checkpoint, Verify.metadata)))
                assert damage(checkpoint, Verify.full)
            if dist.get_rank() == 0:
                file.write_bytes(content)
            dist.barrier()
            found[name] = (entry.nbytes, *lines)
    return found


def test_large_files_may_be_measured_only(saved, tmp_path: Path) -> None:
    layout, folder = saved
    replace_folder(folder, tmp_path / "run")
    for found in run_ranks(sizes_only, RANKS[layout], layout, str(tmp_path / "run")):
        large = {name for name, (nbytes, *_) in found.items() if nbytes > 40_000}
        assert large
        assert not large & {".metadata", "common.pt", "metadata.json", "state.json"}
        for name, (nbytes, flipped, cut) in found.items():
            assert flipped == "" if name in large else f"{name}: is damaged: its SHA-256" in flipped
            assert f"{name}: is damaged: {nbytes - 1:,} bytes instead of {nbytes:,}" in cut


def damaged_but_measured(layout: str, folder: str) -> list[str]:
    """What loading says of a shard without its first byte's bits, whose size is right."""
    manifest.SMALL_BYTES = 0
    with small_run(layout, folder) as (run, _):
        run.config.checkpoint.verify = Verify.metadata
        run.config.checkpoint.on_damage = OnDamage.stop
        dist.barrier()
        if dist.get_rank() == 0:
            zero(run.checkpointer.folder / "step_00000002" / "__0_0.distcp", random.Random(0))
        dist.barrier()
        with pytest.raises(ConfigError) as caught:
            run.checkpointer.load_latest()
        return list(caught.value.problems)


def test_what_is_measured_only_and_unreadable_is_an_error_all_the_same(saved, tmp_path: Path) -> None:
    layout, folder = saved
    replace_folder(folder, tmp_path / "run")
    for (line,) in run_ranks(damaged_but_measured, RANKS[layout], layout, str(tmp_path / "run")):
        assert line.startswith(f"{tmp_path}/run/checkpoints/step_00000002: ")
