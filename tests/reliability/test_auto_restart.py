"""`--auto-restart` with ranks that are killed: the run ends as if nothing had happened."""

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moe.checkpoint.manifest import read_manifest
from tests.helpers.cli import ROOT, metrics_of, processes_mentioning, user_environment
from tests.helpers.training import TINY

STEPS = 40
RUN = [
    *TINY,
    "parallel=ep2",
    f"train.train_steps={STEPS}",
    "train.micro_batch_size=4",
    "logger.log_interval=1",
    "evaluation.interval=1000",
    "checkpoint.save_interval=2",
]
WAIT_S = 120


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "pretrain.py"), *RUN, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=user_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run = start(folder, "run.name=x")
    assert run.wait(timeout=WAIT_S) == 0, run.stderr.read()
    return folder / "runs" / "x"


def result(run: Path) -> tuple[list, dict]:
    """Losses and gradient norms by step, and the digests of all tensors at the end."""
    steps = [(line["step"], line["train/lm_loss"], line["train/grad_norm"]) for line in metrics_of(run)]
    files = read_manifest(run / "checkpoints" / f"step_{STEPS:08}")
    return steps, {name: entry.sha256 for name, entry in files.items() if name.endswith((".distcp", ".metadata"))}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers(mark: str) -> list[int]:
    """The ranks' processes, not those that read data for them or started them."""
    found = []
    for pid in processes_mentioning(mark):
        with contextlib.suppress(OSError):  # it has just ended
            if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found


def logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


@pytest.mark.soak("SIGKILL of random ranks, restarted automatically")
@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("seed", range(2))
def test_ranks_killed_at_random(
    whole: Path, tmp_path: Path, seed: int, asynchronous: str, record_property: Callable
) -> None:
    draw = random.Random(f"{seed}{asynchronous}")
    mark = f"run.name=killed{tmp_path.name}"
    run = tmp_path / "runs" / f"killed{tmp_path.name}"
    process = start(tmp_path, mark, f"checkpoint.async_save={asynchronous}", "--auto-restart", "8")
    for kills in range(5):
        seen = 6 * kills + draw.randrange(3, 7)  # steps on from any checkpoint before: there is progress each time
        wait_until(lambda seen=seen: logged(run) >= seen)
        time.sleep(draw.random() * 0.2)
        victims = workers(mark)
        subprocess.run(["kill", "-9", str(draw.choice(victims))], check=False)
        wait_until(lambda victims=victims: not set(victims) & set(workers(mark)))
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    assert errors.count("restart ") == errors.count("was killed by SIGKILL; all ranks were ended") == 5, errors
    assert result(run) == result(whole)
    assert not workers(mark)
    record_property("kills", 5)
