"""What the watchdog leaves of a process that hangs or is aborted, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PRELUDE = """
import os, sys, threading, time
from megatron_moe.distributed import watchdog

def stuck(seconds):
    time.sleep(seconds)

threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""


def run(code: str, stack_file: Path | None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if stack_file is not None:
        environment["MEGATRON_MOE_STACK_FILE"] = str(stack_file)
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_process_that_hangs_ends_and_leaves_the_stacks_of_all_threads(tmp_path: Path) -> None:
    start = time.monotonic()
    result = run("watchdog.start(0.2); watchdog.alive(); stuck(600)", tmp_path / "stack")
    assert time.monotonic() - start < 20
    assert result.returncode == 1
    stack = (tmp_path / "stack").read_text()
    assert stack.startswith("Timeout (")
    assert stack.count("(most recent call first)") == 2
    assert "in stuck" in stack
    assert result.stderr == ""


def test_without_a_file_stacks_go_to_standard_error() -> None:
    result = run("watchdog.start(0.2); watchdog.alive(); stuck(600)", None)
    assert result.returncode == 1
    assert "in stuck" in result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "watchdog.start(0.2); stuck(1)",  # not yet armed
        "watchdog.start(1)\nfor _ in range(20): watchdog.alive(); stuck(0.1)",
        "watchdog.start(0.2); watchdog.alive(); watchdog.stop(); stuck(1); watchdog.alive(); stuck(1)",
        "watchdog.alive(); stuck(1)",  # as in tools and tests
    ],
)
def test_what_does_not_hang_is_left_alone(code: str, tmp_path: Path) -> None:
    result = run(code, tmp_path / "stack")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_a_crash_leaves_its_stack(number: signal.Signals, tmp_path: Path) -> None:
    code = f"watchdog.start(600)\ndef crash(): os.kill(os.getpid(), {number.value}); stuck(600)\ncrash()"
    result = run(code, tmp_path / "stack")
    assert result.returncode == -number
    assert "in crash" in (tmp_path / "stack").read_text()


def test_how_long_a_process_has_been_silent_is_known() -> None:
    code = """
shares = [watchdog.share_of_timeout()]
watchdog.start(10)
shares.append(watchdog.share_of_timeout())
watchdog.alive()
time.sleep(1.1)
shares.append(watchdog.share_of_timeout())
watchdog.alive()
shares.append(watchdog.share_of_timeout())
watchdog.stop()
shares.append(watchdog.share_of_timeout())
print(*shares)
"""
    before, not_yet, silent, alive, stopped = map(float, run(code, None).stdout.split())
    assert before == not_yet == stopped == 0.0
    assert 0.1 <= silent < 0.5
    assert 0.0 < alive < silent
