"""The picture in CONTRIBUTING.md, held by the code."""

import ast
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = [
    "files",
    "precision",
    "config",
    "plan",
    "distributed",
    "metrics",
    "model",
    "data",
    "optim",
    "checkpoint",
    "hugging_face",
    "train",
    "report",
]
MODULES = sorted((ROOT / "megatron_moe").rglob("*.py"))
# What a command line needs before it is known to be right.
WITHOUT_TORCH = [
    *(ROOT / "megatron_moe/config").glob("*.py"),
    *(ROOT / "megatron_moe/plan").glob("*.py"),
    *(ROOT / f"megatron_moe/distributed/{name}.py" for name in ("launch", "failures", "signals", "watchdog")),
    ROOT / "megatron_moe/checkpoint/run_folder.py",
    *(ROOT / "megatron_moe/report").glob("*.py"),
]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT / "megatron_moe")
    if len(relative.parts) == 1:
        return
    allowed = set(ORDER[: ORDER.index(relative.parts[0]) + 1])
    used = {name.split(".")[1] for name in imported(path) if name.startswith("megatron_moe.")}
    assert used <= allowed


@pytest.mark.parametrize("path", WITHOUT_TORCH, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_comes_before_the_training_imports_no_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "megatron"}


def test_every_file_of_the_package_is_installed() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for path in (ROOT / "megatron_moe").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(fnmatch(path.name, pattern) for pattern in package_data[package]), path


def test_only_the_context_knows_parallel_state() -> None:
    users = {path.name for path in MODULES if "megatron.core.parallel_state" in path.read_text()}
    users |= {path.name for path in MODULES if "import parallel_state" in path.read_text()}
    assert users == {"context.py"}


def test_wandb_is_imported_in_one_place() -> None:
    assert {path.name for path in MODULES if "wandb" in imported(path)} == {"wandb_run.py"}
