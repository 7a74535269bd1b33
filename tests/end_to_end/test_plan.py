"""tools/plan.py as a user runs it."""

import json
import shlex
import time
from pathlib import Path

import pytest

from megatron_moe.config.cluster import ClusterConfig
from megatron_moe.config.load import CONF_DIR, compose_config, compose_plan
from megatron_moe.plan.estimate import checked
from tests.helpers.cli import run_cli

ASKED = ["model=deepseekmoe_145b", "parallel=pp8_ep4", "cluster=h100_80gb", "cluster.num_gpus=512"]


def test_a_plan_answers_in_seconds(tmp_path: Path) -> None:
    begin = time.monotonic()
    result = run_cli("tools/plan.py", *ASKED, "--html", "plan.html", cwd=tmp_path)
    assert time.monotonic() - begin < 60  # 1 to 3 where nothing else runs
    assert result.returncode == 0, result.stderr
    for text in ("144,612,773,888, activated 22,187,331,584", "DOES NOT FIT", "tokens/s/GPU", "245,366,784,000 tokens"):
        assert text in result.stdout
    assert "cluster.compute_efficiency" in result.stdout
    page = (tmp_path / "plan.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
    assert page.count("micro batch 71, virtual stage 0") == 2 * 8  # the last of each stage, forward and backward
    assert "tokens/s/GPU" in page


def test_json_has_all_numbers(tmp_path: Path) -> None:
    result = run_cli("tools/plan.py", *ASKED, "--json", cwd=tmp_path)
    plan = json.loads(result.stdout)
    assert plan["fits"] is False
    assert len(plan["memory"]) == len(plan["rank_params"]) == 8
    assert plan["memory_limit"] == 0.9 * 80e9
    assert set(plan["formulas"]) >= {"weights", "bubble", "step time", "checkpoint"}
    assert plan["cluster"]["calibrated"] == ["compute_efficiency", "intra_node_efficiency", "inter_node_efficiency"]


def test_what_is_found_is_written_and_taken_by_pretrain(tmp_path: Path) -> None:
    asked = ["experiment=deepseekmoe_16b", "cluster.num_gpus=64", "parallel.expert_model_parallel_size=1"]
    result = run_cli("tools/plan.py", "--search", *asked, "--emit", "found", "--config-dir", "layouts", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "layouts tried" in result.stdout
    script, *options = result.stdout.splitlines()[-1].split("; python ")[1].split()
    assert options[:3] == ["--config-dir", "layouts", "experiment=deepseekmoe_16b"]
    shown = run_cli(script, *options, "--cfg", "job", "--resolve", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "virtual_pipeline_model_parallel_size: 4" in shown.stdout
    planned = run_cli("tools/plan.py", *options, "cluster.num_gpus=64", cwd=tmp_path)
    assert ": fits" in planned.stdout, planned.stderr


WITHOUT_TENSOR = [
    "experiment=deepseekmoe_145b",
    "parallel.tensor_model_parallel_size=1",
    "parallel.context_parallel_size=1",
    "parallel.pipeline_model_parallel_size=16",
    "parallel.expert_model_parallel_size=4",
]


@pytest.mark.parametrize(
    ("given", "described"),
    [
        ([], "selective (mlp, moe)"),
        (["recompute=full"], "full (uniform 1)"),
        (["recompute=selective", "recompute.modules=[moe,layernorm]"], "selective (moe, layernorm)"),
    ],
)
def test_recomputation_that_is_found_is_in_the_command(
    given: list[str], described: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    tool, gpus = plan_tool(), "cluster.num_gpus=512"
    assert tool.main(["--search", *WITHOUT_TENSOR, *given, gpus, "--emit", "found", "--config-dir", "layouts"]) == 0
    table, command = capsys.readouterr().out.rsplit("wrote ", 1)
    assert described in table
    options = shlex.split(command.split("python pretrain.py ")[1])
    assert sum(option.startswith("recompute=") for option in options) == 1
    assert tool.main([*options, gpus]) == 0
    planned = capsys.readouterr().out
    assert f", recompute {described}" in planned
    assert ": fits" in planned


def test_this_machine_is_measured(tmp_path: Path) -> None:
    result = run_cli("tools/plan.py", "cluster=cpu", "parallel=ep2", "--json", cwd=tmp_path)
    plan = json.loads(result.stdout)
    cluster = plan["cluster"]
    assert 1e9 < cluster["peak_flops"] < 1e14
    assert 1e8 < cluster["memory_bandwidth"] < 1e13
    assert cluster["intra_node_bandwidth"] < cluster["memory_bandwidth"]
    assert plan["num_gpus"] == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["cluster=h300"], "cluster is one of: a100_40gb, a100_80gb, b200_180gb, cpu"),
        (["cluster.num_gpu=8"], "did you mean cluster.num_gpus?"),
        (["model=deepseekmoe_145b", "cluster.num_gpus=100"], "cluster.num_gpus=100: must be a multiple of"),
        (
            ["model=deepseekmoe_145b", "cluster.num_gpus=96"],
            "must divide the 6 ranks of a pipeline stage, of 96 in all; possible: 1, 2",
        ),
        ([*ASKED, "train.global_batch_size=100"], "must be a multiple of 64"),
        (["--config-dir", "nowhere", "model=deepseekmoe_145b"], "--config-dir nowhere: no such folder"),
        (["model=deepseekmoe_145b", "cluster.num_gpus=40"], "40 ranks: must be a multiple of 32"),
        (["model=deepseekmoe_2b", "parallel.expert_model_parallel_size=8"], "possible: 1, 3, 7, 9, 21, 63"),
        ([], "precision.dtype=fp32: must be bf16"),
        (["cluster.usable_memory=1.5", "precision=bf16"], "cluster.usable_memory=1.5: must be above 0 and at most 1"),
        (["cluster.expert_imbalance=0.5", "precision=bf16"], "cluster.expert_imbalance=0.5: must be at least 1"),
        (["cluster.all_to_all_overlap=-1", "precision=bf16"], "cluster.all_to_all_overlap=-1"),
        (["--search", "precision=bf16"], "cluster.num_gpus=null: must be given with --search"),
        (["--emit", "x"], "--emit x: needs --search or --calibrate, and --config-dir FOLDER"),
        (
            ["--search", "experiment=deepseekmoe_2b", "cluster.num_gpus=1", "--emit", "pp2", "--config-dir", "x"],
            "choose another",
        ),
        (
            ["--search", "experiment=deepseek_v2", "cluster.num_gpus=8", "--emit", "x", "--config-dir", "x"],
            "no layout fits",
        ),
    ],
)
def test_bad_input_is_told_what_is_allowed(
    options: list[str], text: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan_tool().main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert text in error


def plan_tool():
    import importlib.util

    spec = importlib.util.spec_from_file_location("plan_tool", CONF_DIR.parent / "tools" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_recipe_is_taken_for_its_model_only_if_nothing_else_is_said() -> None:
    with_recipe = plan_tool().with_recipe
    assert with_recipe(["model=deepseek_v2"]) == ["experiment=deepseek_v2", "model=deepseek_v2"]
    for overrides in (["model=gshard_2b"], ["model=deepseek_v2", "experiment=deepseekmoe_2b"], ["parallel=pp2"]):
        assert with_recipe(overrides) == overrides


@pytest.mark.parametrize("path", sorted((CONF_DIR / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cluster_composes(path: Path) -> None:
    precision = "fp32" if path.stem == "cpu" else "bf16"
    config = compose_plan([f"cluster={path.stem}", f"precision={precision}"])
    assert config.cluster.name == path.stem
    assert set(config.cluster.calibrated) <= set(vars(ClusterConfig(name="", gpus_per_node=1)))
    if path.stem != "cpu":
        checked(config)


def test_a_training_knows_no_cluster() -> None:
    compose_plan([])
    assert not hasattr(compose_config([]), "cluster")
