"""A run taken apart and talked to, as a user would."""

import json
import re
from pathlib import Path

import pytest

from megatron_moe.data.corpus import write_indexed
from megatron_moe.data.tokenizer import train_tokenizer
from tests.helpers.cli import metrics_of, run_cli
from tests.helpers.training import TINY

TEXTS = {
    "numbers": [f"The number {i} is followed by {i + 1}, and {i * i} is its square.\n" for i in range(300)],
    "code": [f"def add_{i}(x):\n    return x + {i}\n" for i in range(300)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of a mixture of experts on two ranks and of a dense model, on two sources."""
    folder = tmp_path_factory.mktemp("analysis")
    tokenizer = train_tokenizer([text for texts in TEXTS.values() for text in texts], 256 + 64)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, texts in TEXTS.items():
        write_indexed(texts, tokenizer, folder / name)
    paths = ", ".join(f"{{path: {name}}}" for name in TEXTS)
    data = ["data=blend", f"data.train=[{paths}]", f"data.valid=[{paths}]", "data.tokenizer=tokenizer.json"]
    tiny = [option for option in TINY if option != "data=mock"]
    options = [*tiny, *data, "model.vocab_size=512", "optimizer.lr=1e-2", "evaluation.num_samples=8"]
    moe = ["model.name=moe", "parallel=ep2", "run.name=moe"]
    dense = [
        "model.num_dense_layers=4",
        *(f"model.{x}=0" for x in ("num_experts", "num_shared_experts", "router_topk")),
    ]
    dense += ["model.expert_balance_factor=0", "model.device_balance_factor=0"]
    for arguments in (moe, [*dense, "data.valid=[{path: numbers}]", "model.name=dense", "run.name=dense"]):
        result = run_cli("pretrain.py", *options, *arguments, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


def test_analysis(folder: Path) -> None:
    command = ["--run", "runs/moe", "runs/dense", "--num-samples", "8"]
    result = run_cli("tools/analyze_experts.py", *command, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    moe, dense = json.loads((folder / "runs/moe/analysis/experts.json").read_text())
    assert list(moe["sources"]) == ["numbers", "code"]
    assert moe["masked_experts"] == {"0/16": 0, "1/16": 0, "2/16": 1, "3/16": 2, "4/16": 2}
    by_source = [source["loss"] for source in moe["sources"].values()]
    assert moe["loss"] == pytest.approx(sum(by_source) / 2)
    assert moe["loss_by_masked_fraction"]["0/16"] == moe["loss"] == moe["loss_by_topk"]["2"]
    assert moe["loss_by_masked_fraction"]["2/16"] != moe["loss"] != moe["loss_with_routed_for_shared"]
    for source in moe["sources"].values():
        assert len(source["expert_load"]) == len(source["co_activation"]) == 3
        for load, pairs in zip(source["expert_load"], source["co_activation"], strict=True):
            assert sum(load) == pytest.approx(8, abs=1e-2)
            # a selected expert goes with itself and one other
            assert all(sum(row) == pytest.approx(2, abs=1e-2) or sum(row) == 0 for row in pairs)
    assert "loss_by_topk" not in dense
    assert dense["loss"] == pytest.approx(metrics_of(folder / "runs/dense")[-1]["valid/lm_loss"], rel=1e-6)
    assert "no comparison: the runs were measured on different tokens" in result.stdout
    assert "2 routed experts a token" in result.stdout
    assert "plotly" in (folder / "runs/moe/analysis/experts.html").read_text()


def test_other_data(folder: Path) -> None:
    command = ["--run", "runs/dense", "--data", "only=code", "--num-samples", "4", "--output", "out"]
    assert run_cli("tools/analyze_experts.py", *command, cwd=folder).returncode == 0
    (report,) = json.loads((folder / "out/experts.json").read_text())
    assert list(report["sources"]) == ["only"]
    both = ["--run", "runs/dense", "runs/moe", "--data", "only=code", "--num-samples", "2", "--output", "out"]
    result = run_cli("tools/analyze_experts.py", *both, cwd=folder)
    assert re.search(r"moe +1 +[\d,]+ +[\d,]+ +\d\.\d{4}", result.stdout)


def test_generation(folder: Path) -> None:
    def generate(*arguments: str) -> str:
        result = run_cli("tools/generate.py", "--run", "runs/moe", "--max-new-tokens", "12", *arguments, cwd=folder)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        return result.stdout

    greedy = generate("--prompt", "The number")
    assert greedy.startswith("The number")
    assert len(greedy) > len("The number\n")
    assert generate("--prompt", "The number") == greedy
    sampled = [generate("--prompt", "The number", "--temperature", "1.5", "--seed", seed) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]
    assert generate("--prompt", "")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["tools/generate.py", "--run", ".", "--prompt", "x"], "config.yaml: No such file"),
        (["tools/generate.py", "--run", "runs/moe", "--prompt", "x", "--top-p", "0"], "--top-p=0.0: must be above 0"),
        (["tools/generate.py", "--run", "runs/moe", "--prompt", "x", "--tokenizer", "no.json"], "no.json"),
        (
            ["tools/generate.py", "--run", "runs/moe", "--prompt", "x", "--temperature", "nan"],
            "--temperature=nan: must",
        ),
        (["tools/analyze_experts.py", "--run", "runs/moe", "--data", "numbers"], "--data numbers: must be NAME=PREFIX"),
        (["tools/analyze_experts.py", "--run", "runs/moe", "--data", "a=x", "a=y"], "--data a=y: must be NAME=PREFIX"),
        (["tools/analyze_experts.py", "--run", "runs/moe", "--output", "tokenizer.json"], "File exists"),
        (["tools/analyze_experts.py", "--run", "runs/moe", "--data", "a=nowhere"], "nowhere"),
        (
            ["tools/generate.py", "--run", "runs/moe", "--prompt", "x", "--top-p", "0.5"],
            "needs a --temperature above 0",
        ),
        (["tools/analyze_experts.py", "--run", "nowhere"], "nowhere/config.yaml: No such file"),
    ],
)
def test_errors(folder: Path, command: list[str], expected: str) -> None:
    result = run_cli(*command, cwd=folder)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
