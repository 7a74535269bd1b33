"""Every command of the README is run, shortened only by overrides that follow it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.config.load import CONF_DIR
from megatron_moe.data.tokenizer import train_tokenizer
from tests.helpers.cli import ROOT, user_environment

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
FIRST_RUN = next(i for i, command in enumerate(COMMANDS) if command.startswith("python pretrain.py"))
SHORTEN = "train.train_steps=2 evaluation.num_samples=8 train.micro_batch_size=1 data.sequence_length=32"


def run(command: str, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=user_environment() | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a user's folder, with the files that the commands name."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pretrain.py", "conf", "tools", "megatron_moe"):
        (folder / name).symlink_to(ROOT / name)
    texts = [f"Document {i} says {i * 7}.\n" for i in range(400)]
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 270).save(str(folder / "tokenizer.json"))
    return folder


def test_the_readme_has_its_commands() -> None:
    assert [command for command in COMMANDS if command.startswith("make")] == ["make pretrain", "make test"]
    assert len(COMMANDS) >= 9


def shortened(command: str, name: str) -> str:
    """Training for two steps on little data; of a sweep two jobs."""
    if "pretrain.py" not in command or "--cfg" in command:
        return command
    if "--multirun" in command:
        one_seed = re.sub(r"(seed=\d)\S*", r"\1", command)
        return re.sub(r"(model=\w+),\S*,(\w+)", r"\1,\2", one_seed) + f" {SHORTEN}"
    return f"{command} {SHORTEN} run.name={name}"


@pytest.mark.parametrize(
    "number", [i for i, c in enumerate(COMMANDS) if not c.startswith("make")], ids=lambda i: COMMANDS[i][:60]
)
def test_command(number: int, checkout: Path) -> None:
    command = shortened(COMMANDS[number], f"readme{number}").replace("runs/NAME", f"runs/readme{FIRST_RUN}")
    result = run(command, checkout)
    assert result.returncode == 0, result.stderr


def test_the_choices_named_are_those_that_exist() -> None:
    for group in ("model", "parallel", "precision", "data", "optimizer", "scheduler", "logger", "experiment"):
        (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", README, flags=re.MULTILINE)
        named = re.findall(r"`(\w+)`", row)
        assert sorted(named) == sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")), group


def test_the_first_run_learns(tmp_path: Path) -> None:
    """What `make pretrain` runs, whole: the held-out loss beats the unigram entropy by a nat."""
    recipe = subprocess.run(["make", "-n", "pretrain"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in recipe.splitlines() if "pretrain.py" in line]
    arguments = command.split("pretrain.py", 1)[1]
    result = run(f"{sys.executable} {ROOT / 'pretrain.py'} {arguments} run.dir={tmp_path}/run", tmp_path, timeout=1200)
    assert result.returncode == 0, result.stderr
    last = result.stdout.strip().splitlines()[-3:]
    assert [line.split("  ")[0] for line in last] == ["held-out loss", "unigram entropy", "below unigram entropy"]
    loss, entropy, below = (float(re.search(r"(-?[\d.]+) nats", line).group(1)) for line in last)
    assert below == pytest.approx(entropy - loss, abs=1e-3)
    assert below >= 1.0
