"""PAPER.md names only what exists, and its estimates are those of the code."""

import ast
import re
from pathlib import Path

import pytest

from megatron_moe.config.load import CONF_DIR, compose_config, option_names
from megatron_moe.config.schema import Config
from megatron_moe.plan.memory import memory_by_stage

ROOT = CONF_DIR.parent
TEXT = (ROOT / "PAPER.md").read_text()
REFERENCES = sorted(set(re.findall(r"`([\w/.]+\.py(?:::\w+)?)`", TEXT)))
ROW = r"^\| `(\w+)`(?: with `(model=\w+)`[^|]*)? \|[^|]*\| `(\w+)` \| (\d+) \| ([\d.]+) \|$"
RECIPES = re.findall(ROW, TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("reference", REFERENCES)
def test_code_and_tests_exist(reference: str) -> None:
    path, _, name = reference.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert not name or name in {node.name for node in tree.body if hasattr(node, "name")}


def test_options_exist() -> None:
    named = set(re.findall(r"`((?:model|train|scheduler|optimizer|data)\.[\w.]+)`", TEXT))
    assert len(named) > 15
    assert named <= set(option_names(Config))


def test_every_model_has_its_place() -> None:
    section = TEXT.split("## Models")[1].split("## ")[0]
    named = set(re.findall(r"`(\w+)`", section)) - {"model"}
    assert named == {path.stem for path in (CONF_DIR / "model").glob("*.yaml")}


def test_every_recipe_has_its_row() -> None:
    assert {row[0] for row in RECIPES} == {path.stem for path in (CONF_DIR / "experiment").glob("*.yaml")}


@pytest.mark.parametrize("path", sorted((CONF_DIR / "model").glob("*_2b*.yaml")), ids=lambda path: path.stem)
def test_no_other_baseline_needs_more(path: Path) -> None:
    config = compose_config(["experiment=deepseekmoe_2b", f"model={path.stem}"])
    (memory,) = memory_by_stage(config, 1)
    assert memory.total <= 57.5 * 2**30


@pytest.mark.parametrize(("name", "model", "layout", "gpus", "gibibytes"), RECIPES)
def test_recipes_fit_80_gb(name: str, model: str, layout: str, gpus: str, gibibytes: str) -> None:
    """With a tenth to spare for buffers and fragmentation."""
    config = compose_config([f"experiment={name}", *([model] if model else [])])
    assert config.parallel == compose_config([f"parallel={layout}"]).parallel
    memory = max(stage.total for stage in memory_by_stage(config, int(gpus)))
    assert f"{memory / 2**30:.1f}" == gibibytes
    assert memory < 0.9 * 80e9
