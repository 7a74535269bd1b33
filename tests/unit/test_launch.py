"""Starting and ending workers, with workers that are no training runs."""

import sys
import time
from pathlib import Path

import pytest

from megatron_moe.distributed.launch import (
    adopt_slurm_step,
    available_cores,
    first_host,
    launched_world_size,
    run_workers,
)

PRELUDE = "import os, sys, time; rank = int(os.environ['RANK'])\n"
RECORD = (
    "from megatron_moe.distributed.launch import record_failure\n"
    "def fail(text):\n"
    "    record_failure(text, f'Traceback of rank {rank}: {text}', os.environ); sys.exit(1)\n"
)


def workers(tmp_path: Path, code: str, world_size: int = 3) -> int:
    script = tmp_path / "worker.py"
    script.write_text(PRELUDE + f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n" + RECORD + code)
    return run_workers([sys.executable, str(script)], world_size)


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


def test_a_worker_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = "import signal; signal.signal(15, signal.SIG_IGN)\nif rank == 0: time.sleep(1); fail('x')\ntime.sleep(600)\n"
    start = time.monotonic()
    assert workers(tmp_path, code) == 1
    assert time.monotonic() - start < 30


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
