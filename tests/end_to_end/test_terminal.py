"""A run in a terminal of 60 columns; other tests read what goes to a pipe."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from tests.helpers.cli import ROOT, user_environment
from tests.helpers.training import TINY

RUN = [*TINY, "train.train_steps=4", "logger.log_interval=2", "evaluation.num_samples=4", "parallel=ep2", "run.name=t"]
COLOR = r"\x1b\[[0-9;]*\b[34]8[;m]|\x1b\[[0-9;]*\b[349][0-7]m"


def run_in_terminal(folder: Path, columns: int, **environment: str) -> str:
    """All that the terminal gets."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, str(ROOT / "pretrain.py"), *RUN]
    variables = {name: value for name, value in user_environment().items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(command, cwd=folder, env=variables | environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    received = b""
    while True:
        try:
            received += os.read(ours, 4096)
        except OSError:  # all have closed it
            break
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return received.decode()


def test_a_run_of_two_workers_shows_a_bar_and_the_lines_above_it(tmp_path: Path) -> None:
    text = run_in_terminal(tmp_path, 60, TERM="xterm-256color", NO_COLOR="1")
    bars = [line for line in re.split(r"[\r\n]|\x1b\[2K", text) if re.match(r"[1-4]/4 ", line)]
    assert bars
    assert all(len(bar) <= 60 for bar in bars)
    assert any("━" in bar and "loss 5." in bar for bar in bars)
    assert any("tokens/s" in bar for bar in bars)
    assert re.search(r"step 2/4 \| lm_loss 5\.", text)
    assert "finished 4 steps in runs/t" in text[text.rindex("4/4 ") :]
    assert not re.search(COLOR, text)
    assert "\x1b[?25l" not in text  # the cursor stays
