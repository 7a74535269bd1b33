"""What `make pretrain` runs, whole."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import ROOT, run_shell


def test_the_first_run_learns(tmp_path: Path) -> None:
    """The held-out loss beats the unigram entropy by a nat."""
    recipe = subprocess.run(["make", "-n", "pretrain"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in recipe.splitlines() if "pretrain.py" in line]
    arguments = command.split("pretrain.py", 1)[1]
    result = run_shell(
        f"{sys.executable} {ROOT / 'pretrain.py'} {arguments} run.dir={tmp_path}/run", tmp_path, timeout=1200
    )
    assert result.returncode == 0, result.stderr
    last = result.stdout.strip().splitlines()[-3:]
    assert [line.split("  ")[0] for line in last] == ["held-out loss", "unigram entropy", "below unigram entropy"]
    loss, entropy, below = (float(re.search(r"(-?[\d.]+) nats", line).group(1)) for line in last)
    assert below == pytest.approx(entropy - loss, abs=1e-3)
    assert below >= 1.0
