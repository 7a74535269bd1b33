"""Two starts of one run: the second is refused while the first goes on, and not a moment longer."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_moe.checkpoint import run_lock
from megatron_moe.checkpoint.run_lock import LOCK, locked
from megatron_moe.config.errors import ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.saving import SMALL
from tests.helpers.training import tiny_config


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HERE_S", 0.0)
    monkeypatch.setattr(run_lock, "ELSEWHERE_S", 0.0)
    monkeypatch.setattr(run_lock, "POLL_S", 0.01)


def hold(folder: Path, sender: Connection, seconds: float) -> None:
    """In another process: hold it, with a child such as one that reads data; tells the child's number."""
    with locked(folder):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        sender.send(child)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[multiprocessing.Process]:
    """A process that holds the folder, until it is killed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=hold, args=(tmp_path, sender, 60))
    process.start()
    child = receiver.recv()
    yield process
    process.kill()
    process.join()
    os.kill(child, signal.SIGKILL)


def start(folder: str, step: int) -> str | int:
    """On each rank, as pretrain.py: train to a step; the error, or the newest step."""
    import pretrain

    run_lock.HERE_S = 0.0
    config = tiny_config(*SMALL, "parallel=ep2", f"run.dir={folder}", f"train.exit_step={step}", world_size=2)
    try:
        pretrain.train_here(config, [])
    except ConfigError as error:
        return error.report()
    return pretrain.step_of(pretrain.saved_steps(Path(folder) / "checkpoints")[-1])


def test_a_second_start_is_refused_on_all_ranks_and_writes_nothing(
    held: multiprocessing.Process, tmp_path: Path
) -> None:
    expected = (
        f"error: run.dir={tmp_path}: process {held.pid} on {socket.gethostname()} trains this run; wait until it ends, "
        "or start another run with run.name=NEW"
    )
    assert run_ranks(start, 2, str(tmp_path), 1) == [expected] * 2
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_run_that_was_killed_or_has_ended_goes_on(held: multiprocessing.Process, tmp_path: Path) -> None:
    """Though a child of the killed process lives."""
    held.kill()
    held.join()
    assert run_ranks(start, 2, str(tmp_path), 1) == [1, 1]
    assert run_ranks(start, 2, str(tmp_path), 2) == [2, 2]


def test_one_that_is_ending_is_waited_for(
    held: multiprocessing.Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another host, as after a node has failed."""
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "process": 7, "job": ""}))
    with pytest.raises(ConfigError, match="process 7 on elsewhere trains this run"), locked(tmp_path):
        pass
    monkeypatch.setattr(run_lock, "ELSEWHERE_S", 60.0)
    read = run_lock._read
    monkeypatch.setattr(run_lock, "_read", lambda file: held.kill() or read(file))
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_an_attempt_before_of_the_same_job_is_no_error_of_the_user(
    held: multiprocessing.Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"host": "n1", "process": 7, "job": "123", "attempt": "123.0"}))
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    with pytest.raises(ConfigError), locked(tmp_path):  # a second start in one job
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(OSError, match="process 7 on n1, of this job's attempt before, has not ended"), locked(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "124")
    with pytest.raises(ConfigError), locked(tmp_path):
        pass


def test_without_locks_the_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path):
        pass
    message = f"warning: {tmp_path}/{LOCK}: No locks available; nothing stops a second start of this run\n"
    assert capsys.readouterr().err == message
