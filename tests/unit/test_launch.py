"""Starting and ending workers, with workers that are no training runs."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_moe.distributed import launch
from megatron_moe.distributed.launch import (
    adopt_slurm_step,
    available_cores,
    first_host,
    launched_world_size,
    run_workers,
    run_workers_again,
)
from tests.helpers.cli import processes_mentioning

# What a worker has: `fail`, and `come(name)` and `wait_for(name)`, which meet in files.
PRELUDE = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from megatron_moe.distributed import signals, watchdog
from megatron_moe.distributed.failures import record_failure

rank = int(os.environ["RANK"])
folder = Path(__file__).parent

def fail(text):
    record_failure(text, f"Traceback of rank {{rank}}: {{text}}", os.environ)
    sys.exit(1)

def come(name):
    (folder / name).touch()

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)

def save_when_asked():
    while not signals.stop_requested():
        time.sleep(0.01)
    come(f"saving{{rank}}")
"""


def worker_command(tmp_path: Path, code: str) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(PRELUDE + code)
    return [sys.executable, str(script)]


def workers(tmp_path: Path, code: str, world_size: int = 3) -> int:
    code = run_workers(worker_command(tmp_path, code), world_size)
    assert processes_mentioning(str(tmp_path)) == []
    return code


@contextlib.contextmanager
def meanwhile(*actions: Callable[[], None]) -> Iterator[None]:
    """Do something, in turn, while the main thread waits for its workers."""
    thread = threading.Thread(target=lambda: [action() for action in actions], daemon=True)
    thread.start()
    yield
    thread.join(timeout=10)
    assert not thread.is_alive()


def when(path: Path, action: Callable[[], None] = lambda: None) -> Callable[[], None]:
    def wait() -> None:
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    return wait


def signal_me(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def test_each_rank_gets_its_place_and_its_share_of_the_cores(tmp_path: Path) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE OMP_NUM_THREADS"
    code = f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[n] for n in '{names}'.split()))"
    assert workers(tmp_path, code) == 0
    threads = max(1, available_cores() // 3)
    assert [(tmp_path / str(r)).read_text() for r in range(3)] == [f"{r} 3 {r} 3 {threads}" for r in range(3)]


def test_the_first_failure_is_shown_and_ends_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = (
        "if rank == 1: fail('the cause')\n"
        "if rank == 0: time.sleep(0.5); fail('connection closed by peer')\n"
        "time.sleep(600)\n"
    )
    start = time.monotonic()
    assert workers(tmp_path, code) == 1
    assert time.monotonic() - start < 30
    errors = capfd.readouterr().err
    assert errors.index("Traceback of rank 1: the cause") < errors.index("rank 0")
    assert "rank 1 ended with exit code 1; all ranks were ended" in errors
    assert "rank 0 ended with exit code 1 afterwards" in errors


def test_a_killed_rank_is_the_cause_even_if_others_complained_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "if rank == 2: time.sleep(0.3); os.kill(os.getpid(), 9)\n"
        "if rank == 0: fail('connection closed by peer')\n"
        "time.sleep(600)\n"
    )
    assert workers(tmp_path, code) == 1
    assert "rank 2 was killed by SIGKILL" in capfd.readouterr().err


def test_the_users_error_is_passed_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "record_failure('x', 'error: too short', os.environ); sys.exit(2)\n"
    assert workers(tmp_path, code) == 2
    assert capfd.readouterr().err.strip() == "error: too short"


def test_a_worker_that_ignores_its_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    monkeypatch.setattr(launch, "ABORT_S", 0.5)
    code = (
        "signal.signal(signal.SIGABRT, signal.SIG_IGN); come(f'deaf{rank}')\n"
        "if rank == 0: wait_for('deaf1'); wait_for('deaf2'); fail('x')\n"
        "time.sleep(600)\n"
    )
    assert workers(tmp_path, code) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_goes_to_all_workers_which_may_take_their_time(number: int, tmp_path: Path) -> None:
    """Also longer than the grace after a failure, and with a second signal on the way."""
    code = "signals.install(); come(f'ready{rank}'); save_when_asked(); wait_for('done'); sys.exit(75)"
    ready, saving = ([when(tmp_path / f"{word}{rank}") for rank in range(2)] for word in ("ready", "saving"))
    second = [signal_me(signal.SIGTERM), signal_me(signal.SIGUSR1), lambda: time.sleep(0.3), (tmp_path / "done").touch]
    with meanwhile(*ready, signal_me(number), *saving, *second):
        assert workers(tmp_path, code, 2) == 75


def test_a_signal_that_comes_before_a_worker_is_ready_for_it_is_kept(tmp_path: Path) -> None:
    code = "come(f'started{rank}'); wait_for('signalled'); signals.install(); save_when_asked(); sys.exit(75)"
    started = [when(tmp_path / f"started{rank}") for rank in range(2)]
    with meanwhile(*started, signal_me(signal.SIGTERM), lambda: time.sleep(0.3), (tmp_path / "signalled").touch):
        assert workers(tmp_path, code, 2) == 75


def test_one_worker_that_has_saved_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.1)
    code = "if rank == 0: come('first'); sys.exit(75)\nwait_for('first'); time.sleep(1); come('others'); sys.exit(75)"
    assert workers(tmp_path, code) == 75
    assert (tmp_path / "others").exists()


def test_a_failure_while_saving_is_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "signals.install(); come(f'ready{rank}'); save_when_asked()\nif rank == 1: fail('disk full')\nsys.exit(75)\n"
    with meanwhile(*(when(tmp_path / f"ready{rank}") for rank in range(2)), signal_me(signal.SIGTERM)):
        assert workers(tmp_path, code, 2) == 1
    assert "Traceback of rank 1: disk full" in capfd.readouterr().err


def test_ctrl_c_ends_workers_that_would_save(tmp_path: Path) -> None:
    code = "signals.install(); come(f'ready{rank}'); time.sleep(600)"
    start = time.monotonic()
    with meanwhile(*(when(tmp_path / f"ready{rank}") for rank in range(2)), signal_me(signal.SIGINT)):
        assert workers(tmp_path, code, 2) == 130
    assert time.monotonic() - start < 30


def test_workers_that_hang_after_a_failure_leave_their_stacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is suspended; and what they have started ends with them."""
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    code = (
        "def waiting_for_rank_0(): come(f'ready{rank}'); time.sleep(600)\n"
        "def suspended(): come(f'ready{rank}'); os.kill(os.getpid(), signal.SIGSTOP); time.sleep(600)\n"
        "watchdog.start(600)\n"
        "import subprocess, threading\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "subprocess.Popen([sys.executable, '-c', f'import time; {str(folder)!r}; time.sleep(600)'])\n"
        "if rank == 1: waiting_for_rank_0()\n"
        "if rank == 2: suspended()\n"
        "wait_for('ready1'); wait_for('ready2'); fail('the cause')\n"
    )
    assert workers(tmp_path, code) == 1
    errors = capfd.readouterr().err
    first, second, third = (errors.index(f"rank {rank}") for rank in range(3))
    assert "rank 0 ended with exit code 1" in errors[first:second]
    assert "Traceback of rank 0: the cause" in errors[first:second]
    assert "rank 1 did not end; it was in:" in errors[second:third]
    assert "in waiting_for_rank_0" in errors[second:third]
    assert "rank 2 did not end (it was suspended); it was in:" in errors[third:]
    assert "in suspended" in errors[third:]


def test_a_rank_that_gets_no_further_ends_itself_and_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "def stuck(): time.sleep(600)\n"
        "if rank == 1: watchdog.start(0.5); watchdog.alive(); stuck()\n"
        "if rank == 0: time.sleep(600)\n"
    )
    assert workers(tmp_path, code, 2) == 1
    errors = capfd.readouterr().err
    assert "rank 1 ended itself, as it got no further for 1.1 times parallel.timeout_minutes" in errors
    assert "in stuck" in errors
    assert "rank 0 did not end, and left no stack" in errors


def test_a_training_that_cannot_go_on_says_so_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "record_failure('x', 'error: 10 steps in a row skipped', os.environ); sys.exit(3)\n"
    assert workers(tmp_path, code) == 3
    assert capfd.readouterr().err.strip() == "error: 10 steps in a row skipped"


# Workers that count their attempts: rank 0 leaves a line for each.
ATTEMPT = (
    "attempts = folder / 'attempts'\n"
    "def begin():\n"
    "    if rank == 0:\n"
    "        with attempts.open('a') as file: file.write('x')\n"
    "    else: wait_for('attempts')\n"
)


def again(tmp_path: Path, code: str, *, restarts: int, progress: bool, pause_s: float = 0.0) -> tuple[int, int]:
    """Exit code and number of attempts; each attempt saves a step if there is `progress`."""
    attempts = tmp_path / "attempts"

    def newest_step() -> int:
        return 10 * attempts.stat().st_size if progress and attempts.exists() else 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "RESTART_PAUSE_S", pause_s)
        patch.setattr(launch, "GRACE_S", 0.2)
        command = worker_command(tmp_path, ATTEMPT + code)
        exit_code = run_workers_again(command, 2, restarts=restarts, newest_step=newest_step)
    assert processes_mentioning(str(tmp_path)) == []
    return exit_code, attempts.stat().st_size


def test_workers_are_started_again_until_they_succeed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "begin()\nif rank == 0 and attempts.stat().st_size < 3: os.kill(os.getpid(), 9)\n"
    assert again(tmp_path, code, restarts=5, progress=True) == (0, 3)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("restart")]
    assert lines == [
        "restart 1 of 5 from step 10: rank 0 was killed by SIGKILL",
        "restart 2 of 5 from step 20: rank 0 was killed by SIGKILL",
    ]


def test_restarts_are_limited(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert again(tmp_path, "begin()\nif rank == 0: fail('x')\n", restarts=4, progress=True) == (1, 5)
    assert "not started again, 4 restarts used: rank 0 ended with exit code 1" in capfd.readouterr().err


def test_three_attempts_without_a_checkpoint_are_enough(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert again(tmp_path, "begin()\nif rank == 0: fail('x')\n", restarts=9, progress=False) == (1, 3)
    assert "not started again, no new checkpoint in 3 attempts: rank 0 ended" in capfd.readouterr().err


@pytest.mark.parametrize("exit_code", [2, 3, 75])
def test_what_a_restart_would_not_help_is_not_restarted(exit_code: int, tmp_path: Path) -> None:
    assert again(tmp_path, f"begin()\nsys.exit({exit_code})\n", restarts=5, progress=True) == (exit_code, 1)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_between_two_attempts_ends_them(
    number: int, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pausing = launch._pause

    def pause(received: list[int]) -> None:
        os.kill(os.getpid(), number)
        pausing(received)

    monkeypatch.setattr(launch, "_pause", pause)
    code = "begin()\nif rank == 0: fail('x')\n"
    start = time.monotonic()
    assert again(tmp_path, code, restarts=5, progress=True, pause_s=60) == (exit_code, 1)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_a_restarted_attempt_is_not_restarted(number: int, exit_code: int, tmp_path: Path) -> None:
    code = (
        "signals.install(); begin()\n"
        "if rank == 0 and attempts.stat().st_size == 1: fail('x')\n"
        "if attempts.stat().st_size == 2: come(f'ready{rank}')\n"
        "save_when_asked(); sys.exit(75)\n"
    )
    with meanwhile(when(tmp_path / "ready0"), signal_me(number)):
        assert again(tmp_path, code, restarts=5, progress=True) == (exit_code, 2)


def test_a_failure_of_a_run_that_was_asked_to_stop_is_not_restarted(tmp_path: Path) -> None:
    code = "signals.install(); begin()\nif rank == 0: come('ready'); save_when_asked(); fail('disk full')\n"
    with meanwhile(when(tmp_path / "ready"), signal_me(signal.SIGTERM)):
        assert again(tmp_path, code, restarts=5, progress=True) == (1, 1)


def test_slurm_tasks_become_ranks() -> None:
    environment = {
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
    }
    adopt_slurm_step(environment)
    assert launched_world_size(environment) == 8
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["LOCAL_WORLD_SIZE"]) == ("5", "1", "4")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu007", "23456")


@pytest.mark.parametrize("environment", [{}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "1"}])
def test_without_a_launcher_there_is_none(environment: dict[str, str]) -> None:
    adopt_slurm_step(environment)
    assert launched_world_size(environment) is None


def test_torchruns_variables_win_over_slurms() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    adopt_slurm_step(environment)
    assert environment["RANK"] == "3"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n[007-12,20],m1", "n007"), ("n1,n2", "n1"), ("login", "login"), ("rack-2-n[3,5]", "rack-2-n3")],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
