"""Processes that train and save, and are killed at a chosen moment of a save."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.saving import SMALL
from tests.helpers.training import tiny_config

CHANGES = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Counts the calls by which this process changes files while it is armed, and kills it at one of them.

    Those that Python makes are told by its audit events. Those that have none are wrapped: `fsync`, and the writes of
    shards and of texts, of which half is on disk then.
    """

    def __init__(self, at: int | None, act: Callable[[], None] = kill) -> None:
        """`act`: what to do instead of killing it."""
        self.at = at
        self.act = act
        self.armed = False
        self.calls: list[str] = []
        self._lock = threading.Lock()

    def install(self) -> None:
        """For good: audit hooks stay."""
        from megatron_moe.checkpoint.writer import _DigestingStream

        sys.addaudithook(self._audit)
        self._wrap(os, "fsync", "fsync")
        self._wrap(_DigestingStream, "write", "write")
        Path.write_text = self._writer_of_texts()

    def call(self, name: str) -> None:
        """Before a change."""
        with self._lock:
            if self.armed:
                self.calls.append(name)
                if len(self.calls) == self.at:
                    self.act()

    def _audit(self, event: str, arguments: tuple) -> None:
        if self.armed and (event in CHANGES or (event == "open" and _is_for_writing(*arguments))):
            self.call(CHANGES.get(event, event))

    def _wrap(self, owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.call(label)
            return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    def _writer_of_texts(self) -> Callable[..., None]:
        def write_text(path: Path, text: str, **options: str) -> None:
            with path.open("w", **options) as file:
                file.write(text[: len(text) // 2])
                file.flush()
                self.call("write_text")
                file.write(text[len(text) // 2 :])

        return write_text


def _is_for_writing(path: Any, mode: str | None, flags: int) -> bool:
    return isinstance(path, str | os.PathLike) and bool(flags & WRITING)


def train_until_killed(
    overrides: list[str], victim: int, number: int, at: int | None = None, delay_s: float | None = None
) -> list[str]:
    """On each rank: train as pretrain.py does, and keep a diary beside the run.

    Args:
        overrides: of the small model.
        victim: the rank to kill.
        number: of its save to kill it in, from 1.
        at: number of the call that changes files.
        delay_s: kill it so long after the save began instead.

    Returns:
        The calls of that save, where nothing was killed.
    """
    from megatron_moe.checkpoint.checkpointer import Checkpointer
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train.loop import train

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = tiny_config(*SMALL, *overrides, world_size=world_size)
    checkpoints = Path(config.run.dir) / "checkpoints"
    diary = os.open(f"{config.run.dir}.{rank}.diary", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    killer = Killer(at if rank == victim else None)
    killer.install()
    load_latest, begin, finish = Checkpointer.load_latest, Checkpointer.begin, Checkpointer.finish
    saves = 0

    def note(**entry: Any) -> None:
        os.write(diary, (json.dumps({**entry, "time": time.monotonic()}) + "\n").encode())

    def load_and_note(self: Checkpointer) -> Any:
        state, notes = load_latest(self)
        note(resumed=state.step, notes=notes, there=sorted(path.name for path in checkpoints.glob("*")))
        return state, notes

    def begin_and_note(self: Checkpointer, state: Any, **options: bool) -> None:
        nonlocal saves
        saves += 1
        if delay_s is not None and saves > number + 1:
            signal.pause()  # the kill is late
        note(begun=state.step)
        killer.armed = saves == number
        if saves == number and rank == victim and delay_s is not None:
            subprocess.Popen(["sh", "-c", f"sleep {delay_s}; kill -9 {os.getpid()}"])
        begin(self, state, **options)

    def finish_and_note(self: Checkpointer) -> Path:
        folder = finish(self)
        self._removals.submit(lambda: None).result()  # after those of this save
        assert not (killer.armed and killer.at), f"{killer.at} calls were not made, but {len(killer.calls)}"
        killer.armed = False
        note(finished=int(folder.name.removeprefix("step_")))
        return folder

    Checkpointer.load_latest, Checkpointer.begin, Checkpointer.finish = load_and_note, begin_and_note, finish_and_note
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    with (
        distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        train(config, context, overrides)
    return killer.calls


def diary_of(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What the processes of a run noted so far."""
    return [json.loads(line) for line in Path(f"{folder}.{rank}.diary").read_text().splitlines()]
