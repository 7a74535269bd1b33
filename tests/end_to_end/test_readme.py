"""Every command of the README is run, shortened only by overrides that follow it."""

import json
import re
from pathlib import Path

import pytest

from megatron_moe.config.load import CONF_DIR
from tests.helpers.cli import ROOT, run_shell

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
FIRST_RUN = next(i for i, command in enumerate(COMMANDS) if command.startswith("python pretrain.py"))
WANDB_RUN = next(i for i, command in enumerate(COMMANDS) if "logger=wandb" in command)
SHORTEN = (
    "train.train_steps=2 logger.log_interval=1 evaluation.num_samples=8 train.micro_batch_size=1 "
    "data.sequence_length=32"
)
SHORTER = {
    "benchmark.py data": "--megabytes 1 --documents 1e4 --repeat 1 --steps 1",
    "benchmark.py checkpoint": "--hidden-size 64 --repeat 1",
    "benchmark.py plan": "--steps 4 --others parallel=ep2",
    "benchmark.py train": "--sizes nano --steps 1 --precisions fp32 --contenders ours megatron-core",
    "analyze_experts.py": "--num-samples 8",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a user's folder, with the files that the commands name."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pretrain.py", "conf", "tools", "megatron_moe"):
        (folder / name).symlink_to(ROOT / name)
    texts = [f"Document {i} says {i * 7}.\n" for i in range(400)]
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_the_readme_has_its_commands() -> None:
    assert [command for command in COMMANDS if command.startswith("make")] == ["make pretrain", "make test"]
    assert len(COMMANDS) >= 9


def shortened(command: str, name: str) -> str:
    """Training for two steps on little data; of a sweep two jobs; a small benchmark; a dry run of few layers."""
    for tool, options in SHORTER.items():
        if tool in command:
            return f"{command} {options}"
    if "pretrain.py" not in command or "--cfg" in command:
        return command
    if "--multirun" in command:
        one_seed = re.sub(r"(seed=\d)\S*", r"\1", command)
        return re.sub(r"(model=\w+),\S*,(\w+)", r"\1,\2", one_seed) + f" {SHORTEN}"
    few_layers = "model.num_layers=4 parallel.pipeline_model_parallel_size=2" if "run.dry_run" in command else ""
    return f"{command} {SHORTEN} {few_layers} run.name={name}"


@pytest.mark.parametrize(
    "number", [i for i, c in enumerate(COMMANDS) if not c.startswith("make")], ids=lambda i: COMMANDS[i][:60]
)
def test_command(number: int, checkout: Path) -> None:
    run = WANDB_RUN if COMMANDS[number].startswith("wandb") else FIRST_RUN
    command = shortened(COMMANDS[number], f"readme{number}").replace("runs/NAME", f"runs/readme{run}")
    result = run_shell(command, checkout)
    assert result.returncode == 0, result.stderr


def test_the_choices_named_are_those_that_exist() -> None:
    for group in (
        "model",
        "parallel",
        "precision",
        "recompute",
        "data",
        "optimizer",
        "scheduler",
        "logger",
        "experiment",
    ):
        (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", README, flags=re.MULTILINE)
        named = re.findall(r"`(\w+)`", row)
        assert sorted(named) == sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")), group
    assert all(f"`{path.stem}`" in README for path in (CONF_DIR / "cluster").glob("*.yaml"))
