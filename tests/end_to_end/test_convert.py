"""tools/convert_checkpoint.py as a user runs it: a trained run to Hugging Face and back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_moe.checkpoint.dcp import Rows, SavedTensors
from megatron_moe.config.errors import ConfigError
from megatron_moe.data.sources import build_datasets
from megatron_moe.data.tokenizer import BEGIN_OF_SENTENCE, END_OF_SENTENCE, train_tokenizer
from megatron_moe.hugging_face.exporter import export_run
from megatron_moe.hugging_face.importer import import_model
from tests.helpers import hugging_face
from tests.helpers.cli import ROOT, metrics_of, run_cli, user_environment
from tests.helpers.ranks import run_ranks
from tests.helpers.training import TINY, assemble

TOOL = "tools/convert_checkpoint.py"
NUM_VALID = 16


def convert(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_cli(TOOL, *map(str, arguments), cwd=cwd)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of pp2 x ep2, and what the command made of it."""
    folder = tmp_path_factory.mktemp("convert")
    options = [*TINY, "parallel=pp2_ep2", "model.vocab_size=320", f"evaluation.num_samples={NUM_VALID}"]
    steps = ["train.train_steps=2", "checkpoint.save_interval=1", "run.name=trained"]
    result = run_cli("pretrain.py", *options, *steps, cwd=folder)
    assert result.returncode == 0, result.stderr
    result = convert("export", "--run", "runs/trained", "--output", "exported", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert re.search(r"exported: 114 tensors, 292,928 parameters, 1,171,712 bytes in 1 file\n", result.stdout)
    assert "no tokenizer.json found" in result.stdout
    assert result.stderr == ""
    result = convert("import", "--hf", "exported", "--output", "imported", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_held_out_loss_is_that_of_training(runs: Path) -> None:
    from megatron_moe.train.restore import read_config

    valid = build_datasets(read_config(runs / "runs" / "trained")).valid[0].sequences
    sequences = torch.from_numpy(np.stack([valid[i] for i in range(NUM_VALID)]).astype(np.int64))
    logits = hugging_face.logits(hugging_face.load(runs / "exported"), sequences[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).item()
    assert loss == pytest.approx(metrics_of(runs / "runs" / "trained")[-1]["valid/lm_loss"], abs=1e-4)


def test_the_readme_loads_it_with_plain_transformers(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(runs)
    found: dict[str, Any] = {}
    exec(code.replace("hf/NAME", "exported"), found)
    tokens = torch.arange(24)[None]
    expected = hugging_face.load(runs / "exported").model(tokens).last_hidden_state
    assert found["logits"].shape == (1, 3, 320)
    torch.testing.assert_close(found["model"].eval()(tokens).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_a_chosen_step_type_and_file_size(runs: Path) -> None:
    arguments = ["--step", 1, "--dtype", "bf16", "--max-shard-size", "100KB", "--output", "small"]
    result = convert("export", "--run", "runs/trained", *arguments, cwd=runs)
    assert result.returncode == 0, result.stderr
    files = sorted(path.name for path in (runs / "small").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert json.loads((runs / "small" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    newest = load_file(runs / "exported" / "model.safetensors")
    chosen = {name: tensor for file in files for name, tensor in load_file(runs / "small" / file).items()}
    assert all(tensor.dtype == torch.bfloat16 for tensor in chosen.values())
    assert chosen.keys() == newest.keys()
    assert not torch.equal(chosen["lm_head.weight"], newest["lm_head.weight"].bfloat16())
    export_run(runs / "runs" / "trained", runs / "bf16", dtype=torch.bfloat16)
    for name, tensor in load_file(runs / "bf16" / "model.safetensors").items():
        assert torch.equal(tensor, newest[name].bfloat16()), name


def test_there_and_back_is_bitwise(runs: Path) -> None:
    export_run(runs / "imported", runs / "again")
    for name in ("model.safetensors", "config.json"):
        assert (runs / "again" / name).read_bytes() == (runs / "exported" / name).read_bytes()


@pytest.mark.parametrize("fields", [hugging_face.V1, hugging_face.V2], ids=["v1", "v2"])
def test_back_and_there_is_bitwise(fields: dict[str, Any], tmp_path: Path) -> None:
    hugging_face.make(fields, tmp_path / "hf", seed=3).bfloat16()
    theirs = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items()}
    save_file(theirs, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    import_model(tmp_path / "hf", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in theirs.items())
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: config[name] for name in fields} == fields
    assert config["torch_dtype"] == "bfloat16"


def loaded_shards(overrides: list[str], folder: Path) -> list:
    """On each rank: its part of every tensor after loading an imported model."""
    import os

    from megatron_moe.checkpoint.checkpointer import load_weights
    from megatron_moe.checkpoint.run_folder import find_checkpoint
    from megatron_moe.config.load import compose_config, from_plain
    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_chunks, sharded_tensors
    from megatron_moe.model.transformer_config import transformer_config

    saved = json.loads((find_checkpoint(folder) / "state.json").read_text())["config"]
    config = from_plain(saved)
    config.parallel = compose_config(overrides).parallel
    with distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context:
        model = build_chunks(config, transformer_config(config), context.pg_collection, context.device)
        load_weights(model, find_checkpoint(folder), config.model)
        shards = [shard for chunk in model for shard in sharded_tensors(chunk.sharded_state_dict())]
        return [(s.key, s.global_shape, s.global_offset, s.data.detach().numpy().copy()) for s in shards]


@pytest.mark.parametrize(
    ("fields", "layout"),
    [(None, "pp2"), (hugging_face.V2, "tp2_ep2")],
    ids=["v1-pp2", "v2-tp2_ep2"],
)
def test_imported_models_load_in_any_layout(fields: dict | None, layout: str, runs: Path, tmp_path: Path) -> None:
    folder = runs / "imported"
    if fields:
        hugging_face.make(fields, tmp_path / "hf", seed=4)
        import_model(tmp_path / "hf", folder := tmp_path / "run")
    wholes = assemble(run_ranks(loaded_shards, 2, [f"parallel={layout}"], folder))
    saved = SavedTensors(folder / "checkpoints" / "step_00000000")
    assert wholes.keys() <= saved.tensors.keys()
    for key, whole in wholes.items():
        experts = range(whole.shape[0]) if whole.ndim == 3 else [None]
        rows = [saved.read(key, Rows(e, 0, whole.shape[0 if e is None else 1])).numpy() for e in experts]
        assert np.array_equal(np.stack(rows).reshape(whole.shape), whole), key


def test_training_starts_from_an_imported_model(runs: Path) -> None:
    tiny = [option for option in TINY if not option.startswith("model.")]
    options = ["--config-dir", "imported", *tiny, "model=imported", "checkpoint.init_from=imported"]
    extra = ["train.train_steps=1", "optimizer.lr=1e-30", f"evaluation.num_samples={NUM_VALID}", "run.name=tuned"]
    result = run_cli("pretrain.py", *options, *extra, cwd=runs)
    assert result.returncode == 0, result.stderr
    losses = [metrics_of(runs / "runs" / name)[-1]["valid/lm_loss"] for name in ("trained", "tuned")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_the_tokenizer_goes_along(runs: Path) -> None:
    tokenizer = train_tokenizer(["one two three"], 270)
    folder = runs / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    export_run(runs / "runs" / "trained", runs / "told", tokenizer=folder / "tokenizer.json")
    theirs = AutoTokenizer.from_pretrained(runs / "told")
    assert theirs("one two")["input_ids"] == tokenizer.encode("one two").ids
    assert (theirs.bos_token, theirs.eos_token) == (BEGIN_OF_SENTENCE, END_OF_SENTENCE)
    assert theirs.pad_token == END_OF_SENTENCE
    config = json.loads((runs / "told" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (theirs.bos_token_id, theirs.eos_token_id)
    import_model(runs / "told", runs / "back")
    export_run(runs / "back", runs / "told_again")
    for path in (runs / "told").iterdir():
        assert (runs / "told_again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_tool_is_without_megatron_core(runs: Path) -> None:
    """It would take 500 MB and seconds, and hold the whole model."""
    script = (
        f"import runpy, sys\nsys.argv = ['x', 'export', '--run', 'runs/trained', '--output', 'light']\n"
        f"try:\n    runpy.run_path({str(ROOT / TOOL)!r}, run_name='__main__')\n"
        "finally:\n    print([name for name in sys.modules if name.startswith(('megatron.', 'transformers'))])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=runs, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


# Prints the peak of the address space; with a number, allows no more than that.
LIMITED = """
import atexit, resource, runpy, sys
peak = lambda: int(open("/proc/self/status").read().split("VmPeak:")[1].split()[0]) * 1024
atexit.register(lambda: print("peak", peak()))
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def limited(limit: int, *arguments: object) -> int:
    """Run the tool within an address space; returns the peak."""
    command = [sys.executable, "-c", LIMITED, str(limit), str(ROOT / TOOL), *map(str, arguments)]
    # One thread and one arena: glibc reserves 128 MB of addresses for each further one, whenever threads collide.
    # What is large is given back at once: otherwise the heap falls to pieces, by up to 80 MB and never the same.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    environment = user_environment() | malloc | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout.split("peak ")[1])


def test_memory_is_that_of_a_piece(runs: Path, tmp_path: Path) -> None:
    """240 MB are converted in 40 MB beyond what a model of 1 MB takes."""
    if not Path("/proc/self/status").exists():
        pytest.skip("address spaces are limited and measured on Linux only")
    sizes = {"hidden_size": 1024, "vocab_size": 16384, "moe_intermediate_size": 768, "intermediate_size": 2048}
    fields = {**hugging_face.V1, **sizes, "num_hidden_layers": 2, "torch_dtype": "float32"}
    hugging_face.make(fields, tmp_path / "hf", seed=0)
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert size > 240e6
    room = 40 * 10**6
    small = limited(0, "import", "--hf", runs / "exported", "--output", tmp_path / "small")
    limited(small + room, "import", "--hf", tmp_path / "hf", "--output", tmp_path / "run")
    small = limited(0, "export", "--run", runs / "imported", "--output", tmp_path / "small_again")
    limited(small + room, "export", "--run", tmp_path / "run", "--output", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == pytest.approx(size, rel=1e-3)


def edited(runs: Path, folder: Path, **changes: object) -> Path:
    """A copy of the exported model with other fields."""
    folder.mkdir()
    fields = json.loads((runs / "exported" / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").symlink_to(runs / "exported" / "model.safetensors")
    return folder


def refused_import(hf: Path, folder: Path, expected: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=expected):
        import_model(hf, folder / "out", **options)
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 5}, r"34 tensors that config.json asks for are missing: model.layers.4.input_layernorm"),
        ({"num_hidden_layers": 3}, r"34 tensors are of no model that config.json describes: model.layers.3"),
        ({"vocab_size": 128}, r"2 tensors have another shape .* model.embed_tokens.weight is .320, 64., not .128, 64."),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9: must be from 1 to n_routed_experts=8"),
        ({"initializer_range": 0}, "initializer_range=0.*: must be positive"),
        ({"max_position_embeddings": None}, "max_position_embeddings=None"),
        ({"model_type": "llama"}, "model_type=llama"),
    ],
)
def test_models_that_do_not_fit_are_refused(runs: Path, tmp_path: Path, changes: dict, expected: str) -> None:
    refused_import(edited(runs, tmp_path / "hf", **changes), tmp_path, expected)


@pytest.mark.parametrize(
    ("dtype", "which", "expected"),
    [
        (torch.float16, "", "114 tensors are neither F32 nor BF16: .* is F16"),
        (
            torch.bfloat16,
            "gate_proj",
            "gate_proj.weight is BF16, .*up_proj.weight F32: must be the same",
        ),
    ],
)
def test_types_that_are_not_ours_are_refused(runs: Path, tmp_path: Path, dtype, which: str, expected: str) -> None:
    tensors = load_file(runs / "exported" / "model.safetensors")
    hf = edited(runs, tmp_path / "hf")
    (hf / "model.safetensors").unlink()
    tensors = {name: tensor.to(dtype) if which in name else tensor for name, tensor in tensors.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # may be there
    save_file(tensors, hf / "model.safetensors")
    refused_import(hf, tmp_path, expected)


def test_tokenizers_that_do_not_fit_are_refused(runs: Path, tmp_path: Path) -> None:
    hf = edited(runs, tmp_path / "hf")
    (hf / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["x.X", None]}}))
    refused_import(hf, tmp_path, "the tokenizer is Python code, which is not run; give a tokenizer.json")
    train_tokenizer([f"{i} {i * i}" for i in range(900)], 340).save(str(tmp_path / "large.json"))
    refused_import(hf, tmp_path, "has ids up to 339; the model's vocab_size is 320", tokenizer=tmp_path / "large.json")


def test_the_command_names_what_is_wrong(runs: Path, tmp_path: Path) -> None:
    hf = edited(runs, tmp_path / "hf", scoring_func="sigmoid", hidden_act="gelu")
    result = convert("import", "--hf", hf, "--output", tmp_path / "out", cwd=runs)
    assert result.returncode == 2
    assert [line.split("=")[0] for line in result.stderr.splitlines()] == ["error: hidden_act", "error: scoring_func"]
    result = convert("export", "--run", "runs/trained", "--output", "out", "--max-shard-size", "big", cwd=runs)
    assert result.returncode == 2
    assert "'big' is no size such as 5GB" in result.stderr


@pytest.mark.parametrize(
    ("run", "output", "options", "expected"),
    [
        ("runs", "out", {}, "runs: no checkpoints/step_NNNNNNNN in it"),
        ("runs/trained", "out", {"step": 7}, "--step 7: .* has no checkpoint of it; there are: 1, 2"),
        ("runs/trained", "exported", {}, "exported: exists and is not empty"),
        ("runs/trained", "out", {"tokenizer": Path("none.json")}, "tokenizer none.json"),
    ],
)
def test_exports_that_cannot_be_are_refused(runs: Path, run: str, output: str, options: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        export_run(runs / run, runs / output, **options)
    assert not list(runs.glob("out*"))


def test_an_export_that_fails_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    source = runs / "imported" / "checkpoints" / "step_00000000"
    copy = tmp_path / "run" / "checkpoints" / "step_00000001"
    copy.mkdir(parents=True)
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = copy / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"__0_0.distcp: is damaged: [\d,]+ bytes instead of"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
