"""A file system that cannot be read for a moment tells nothing of a checkpoint, which stays as it is."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_moe.config.errors import ConfigError
from megatron_moe.files import may_pass
from tests.helpers.ranks import run_ranks
from tests.helpers.saving import small_run
from tests.helpers.training import tiny_config
from tests.reliability.test_damage import names_in, save_twice

PREVIOUS = "checkpoint.on_damage=previous"


class FailingFile:
    """Opening it fails in this process while it is armed, with the error that reading has: without a name."""

    def __init__(self) -> None:
        self.path = ""
        self.number = errno.EIO
        self.armed = False
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open" and self.armed and str(arguments[0]) == self.path:
            raise OSError(self.number, os.strerror(self.number))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(save_twice, 2, "ep2", str(folder))
    return folder


def what_loading_raises(folder: str, number: int, in_load: bool) -> list[tuple[str, int, Any]]:
    """On each rank: for each file and each rank that cannot open it, what comes of going on from the checkpoint.

    `in_load`: it can be opened while it is compared with the manifest.
    """
    from megatron_moe.checkpoint import checkpointer

    failing, found, load = FailingFile(), [], checkpointer.load

    def arm(*arguments: Any) -> None:
        failing.armed = victim == dist.get_rank()
        load(*arguments)

    with small_run("ep2", folder, PREVIOUS) as (run, _):
        checkpointer.load = arm
        checkpoint = run.checkpointer.folder / "step_00000002"
        for name in names_in(checkpoint):
            for victim in range(2):
                failing.path, failing.number = str(checkpoint / name), number
                failing.armed = victim == dist.get_rank() and not in_load
                try:
                    run.checkpointer.load_latest()
                    outcome = None
                except (ConfigError, OSError) as error:
                    outcome = (type(error), str(error))
                failing.armed = False
                found.append((name, victim, outcome))
                dist.barrier()
        assert run.checkpointer.load_latest()[0].step == 2
    return found


@pytest.mark.parametrize(
    ("number", "in_load"), [(errno.EIO, False), (errno.ESTALE, True)], ids=["when it is checked", "when it is loaded"]
)
def test_all_ranks_raise_what_one_meets_and_the_checkpoint_stays(number: int, in_load: bool, folder: Path) -> None:
    before = names_in(folder / "checkpoints")
    ours, theirs = run_ranks(what_loading_raises, 2, str(folder), number, in_load)
    assert ours == theirs
    noticed = set()
    for name, _, outcome in ours:
        if outcome is not None:
            noticed.add(name)
            kind, text = outcome
            assert kind is OSError
            assert text == f"[Errno {number}] {os.strerror(number)}: '{folder}/checkpoints/step_00000002/{name}'"
    files = {name for name, _, _ in ours}
    assert noticed >= (files if not in_load else {name for name in files if name.endswith((".distcp", ".metadata"))})
    assert names_in(folder / "checkpoints") == before


@pytest.mark.parametrize("name", ["ENOENT", "ENOTDIR", "EISDIR", "EACCES", "ENOSPC", "EIO", "ESTALE", "ETIMEDOUT"])
def test_what_is_of_the_file_does_not_pass(name: str) -> None:
    number = getattr(errno, name)
    assert may_pass(OSError(number, os.strerror(number))) is (name in ("EIO", "ESTALE", "ETIMEDOUT"))


def exit_codes_of_starting(folder: str, number: int) -> list[int]:
    """Where the run's folder cannot be made, nor written to."""
    import pretrain
    from megatron_moe.train import start

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    config = tiny_config(f"run.dir={folder}/new")
    Path.mkdir = start.write_whole = fail
    codes = []
    for action in (
        lambda: pretrain.make_run_folder(config),
        lambda: start.write_run_files(config, [], world_size=1, tokenizer=None),
    ):
        with pytest.raises((OSError, ConfigError)) as caught:
            action()
        codes.append(pretrain.exit_code(caught.value, config))
    return codes


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 1), (errno.ENOSPC, 2)])
def test_a_start_is_tried_again_only_where_that_may_help(number: int, code: int, tmp_path: Path) -> None:
    assert run_ranks(exit_codes_of_starting, 1, str(tmp_path), number) == [[code, code]]
