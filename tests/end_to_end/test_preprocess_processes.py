"""Preprocessing by processes: their number changes nothing, and killed ones leave what the same command finishes."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_moe.data.preprocess import Progress
from tests.end_to_end.test_preprocess import TEXTS, TOKENIZER, files_of
from tests.helpers.cli import ROOT, run_cli, user_environment

# The command with blocks so small that many of them make up a small input.
SMALL_BLOCKS = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
from megatron_moe.data import text_files
text_files.BLOCK_BYTES = 2**16
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 10 MB of text in three files, with some records that are no documents."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "tokenizer.json").write_text(TOKENIZER)
    numbers = random.Random(1)
    texts = ["".join(numbers.choices(TEXTS, k=numbers.randrange(6))) for _ in range(28_000)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    lines[::3000] = [b"{\n"] * len(lines[::3000])
    (folder / "source").mkdir()
    (folder / "source" / "a.jsonl").write_bytes(b"".join(lines[:9000]))
    (folder / "source" / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[9000:18_000]), 1))
    pq.write_table(pa.table({"text": texts[18_000:]}), folder / "source" / "c.parquet", row_group_size=3000)
    return folder


def start(corpus: Path, output: str, *, workers: int = 2) -> subprocess.Popen[str]:
    """The command, first process of a session of its own."""
    arguments = ["--input", "source", "--tokenizer", ".", "--output", output, "--on-error", "skip"]
    script = str(ROOT / "tools" / "preprocess_data.py")
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_BLOCKS, script, *arguments, "--workers", str(workers)],
        cwd=corpus,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    return output


def processes_of(session: int) -> list[psutil.Process]:
    """Those that live."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue  # it has just ended
    return found


def wait_for(condition: Callable[[], object], seconds: float = 10) -> object:
    """Until it is true of the world; what it gave last."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


def test_the_command_ends_at_a_wrong_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "docs.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    arguments = ["--input", "docs.jsonl", "--tokenizer", ".", "--output", "data/out", "--workers", "2"]
    result = run_cli("tools/preprocess_data.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: docs.jsonl:2: field 'text' holds half of a surrogate pair, ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "data" / "out.bin").exists()


def survivors(session: int) -> list[psutil.Process]:
    """Processes that do not end soon; they are ended."""
    wait_for(lambda: not processes_of(session))
    left = processes_of(session)
    for process in left:
        process.kill()
    return left


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path) -> tuple[list[bytes], float]:
    """The files, and the seconds it took to write them."""
    begin = time.monotonic()
    output = finish(start(corpus, "out"))
    seconds = time.monotonic() - begin
    assert "left out: 6 broken JSON" in output
    return files_of(corpus / "out"), seconds


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(
    corpus: Path, uninterrupted: tuple[list[bytes], float], workers: int
) -> None:
    finish(start(corpus, f"out{workers}", workers=workers))
    assert files_of(corpus / f"out{workers}") == uninterrupted[0]


def test_a_chain_of_kills_changes_nothing(corpus: Path, uninterrupted: tuple[list[bytes], float]) -> None:
    """At random moments, and in every other run as soon as it has got on."""
    expected, seconds = uninterrupted
    numbers = random.Random(4)
    kills = kills_at_work = chains = 0
    while kills < 20:
        chains += 1
        progress = corpus / f"chain{chains}.partial" / "progress.json"
        for attempt in range(11):
            before = Progress.load(progress).position
            process = start(corpus, f"chain{chains}")
            if attempt == 10:
                finish(process)
            elif attempt % 2:
                wait_for(lambda: process.poll() is not None or Progress.load(progress).position > before, 60)  # noqa: B023
            else:
                wait_for(lambda: process.poll() is not None, numbers.uniform(0.3, 1.0) * seconds)  # noqa: B023
            if process.poll() is not None:
                break
            process.kill()
            process.communicate()
            assert not survivors(process.pid)
            kills += 1
            if progress.exists():
                assert Progress.load(progress).position >= before
                kills_at_work += Progress.load(progress).position > before
        assert files_of(corpus / f"chain{chains}") == expected
    assert kills_at_work > 5


def test_an_interrupted_command_goes_on(corpus: Path, uninterrupted: tuple[list[bytes], float]) -> None:
    process = start(corpus, "interrupted")
    assert wait_for((corpus / "interrupted.partial" / "progress.json").exists, 60)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.splitlines()) == (130, ["interrupted"])
    assert not survivors(process.pid)
    finish(start(corpus, "interrupted"))
    assert files_of(corpus / "interrupted") == uninterrupted[0]


def test_a_killed_worker_ends_the_command(corpus: Path, uninterrupted: tuple[list[bytes], float]) -> None:
    def workers() -> list[psutil.Process]:
        return [p for p in processes_of(process.pid) if "spawn_main" in " ".join(p.cmdline())]

    process = start(corpus, "bereft")
    assert wait_for((corpus / "bereft.partial" / "progress.json").exists, 60)
    workers()[0].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: a worker was killed, by the system when memory runs out")
    assert "Traceback" not in errors
    assert not survivors(process.pid)
    finish(start(corpus, "bereft"))
    assert files_of(corpus / "bereft") == uninterrupted[0]
