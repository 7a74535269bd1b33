"""Composition: every file, every mistake."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.config.derived import required_world_size
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import CONF_DIR, compose_config
from megatron_moe.config.validate import validate

ROOT = Path(__file__).parents[2]
GROUPS = ["model", "parallel", "precision", "recompute", "optimizer", "scheduler", "logger", "debug"]


def problems(*overrides: str, world_size: int | None = None) -> list[str]:
    try:
        config = compose_config(overrides)
        validate(config, world_size or required_world_size(config.parallel))
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    "override", [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF_DIR / group).glob("*.yaml"))]
)
def test_every_file_composes(override: str) -> None:
    compose_config([override])


@pytest.mark.parametrize("path", sorted((CONF_DIR / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_validates_but_for_the_data(path: Path, tmp_path: Path) -> None:
    for ending in (".bin", ".idx"):
        (tmp_path / f"tokens{ending}").touch()
    config = compose_config([f"experiment={path.stem}", f"data.train=[{{path: {tmp_path}/tokens}}]"])
    validate(config, required_world_size(config.parallel))


@pytest.mark.parametrize("path", sorted((CONF_DIR / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_number_of_a_recipe_says_where_it_comes_from(path: Path) -> None:
    """All but when to save and evaluate, which are ours."""
    for line in path.read_text().splitlines():
        if re.search(r": *\[?[0-9]", line) and not re.search(r"^ +(save_)?interval:", line):
            assert re.search(r"# .*([0-9]\.[0-9]|appendix|paper|derived)", line), line


def test_composing_imports_no_torch() -> None:
    code = "import sys, pretrain; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_hydra_overrides_reach_the_typed_config() -> None:
    config = compose_config(["model=deepseekmoe_16b", "parallel=pp4", "optimizer.lr=3e-4", "run.name=try"])
    assert config.model.num_layers == 28
    assert config.parallel.pipeline_model_parallel_size == 4
    assert config.optimizer.lr == 3e-4
    assert config.run.dir == "runs/try"


def test_every_wrong_override_is_listed() -> None:
    found = problems(
        *("train.batch_ramp.star=3", "model.num_layer=3", "+model.foo=1", "parallel=pp3", "train.global_batch_size=7"),
        "paralel=ep2",
    )
    assert len(found) == 6
    assert "did you mean parallel?" in "".join(found)
    assert "did you mean train.batch_ramp.start?" in "".join(found)
    assert "did you mean model.num_layers?" in "".join(found)
    assert any("+model.foo=1" in problem for problem in found)
    assert any("parallel is one of: cp2, dp2" in problem for problem in found)
    assert any("global_batch_size=7" in problem and "nearest: 6, 8" in problem for problem in found)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["parallel.expert_model_parallel_size=3"],
            "must divide model.num_experts=64; possible: 1, 2, 4, 8, 16, 32, 64",
        ),
        (["model=deepseekmoe_2b", "parallel=ep2"], "possible: 1, 3, 7, 9, 21, 63"),
        (["parallel.pipeline_model_parallel_size=5"], "5 stages for model.num_layers=4, and none may be empty"),
        (["parallel=pp2", "parallel.pipeline_layout=[4,0]"], "each at least 1, that add up to model.num_layers=4"),
        (["parallel=pp2", "parallel.pipeline_layout=[3,2]"], "each at least 1, that add up to model.num_layers=4"),
        (["parallel.virtual_pipeline_model_parallel_size=2"], "needs parallel.pipeline_model_parallel_size"),
        (["parallel=pp2_vpp2", "train.global_batch_size=10"], "the interleaved schedule needs a multiple of"),
        (["train.global_batch_size=9"], "must be a multiple of 2"),
        (["train.global_batch_size=0"], "train.global_batch_size=0: must be positive"),
        (["optimizer.lr=-1"], "optimizer.lr=-1.0: must be positive"),
        (["model.router_topk=65"], "must be from 1 to model.num_experts=64"),
        (["model.num_dense_layers=4"], "or no layer has experts"),
        (["model.num_experts=0"], "needs model.num_dense_layers=4"),
        (["model=dense_nano", "model.router_topk=1"], "must be 0 with model.num_experts=0"),
        (["model=dense_nano", "parallel=ep2"], "parallel.expert_model_parallel_size=2: must be 1"),
        (["model=hash_nano", "model.router_topk=2"], "model.routing=hash sends a token to 1 expert"),
        (["model=hash_nano", "model.device_limit=1"], "no affinities to balance, limit or drop by"),
        (["model.communication_balance_factor=0.1"], "needs model.device_limit"),
        (["model.device_limit=5"], "there are only model.num_device_groups=4"),
        (["model.device_limit=1", "model.num_device_groups=null"], "needs model.num_device_groups of at least 2"),
        (
            ["model.num_device_groups=1", "model.device_capacity_factor=1"],
            "needs model.num_device_groups of at least 2",
        ),
        (["model=hash_nano", "model.routed_scaling_factor=16"], "has a gate of 1"),
        (["model=dense_nano", "model.routing=hash"], "must be topk with model.num_experts=0"),
        (["train.batch_ramp.start=2"], "must both be given"),
        (["train.batch_ramp.start=2", "train.batch_ramp.increment=2", "train.batch_ramp.tokens=0.5"], "at least 1"),
        (
            ["model.num_device_groups=32", "model.router_topk=7", "model.device_limit=3"],
            "3 of 32 device groups hold 6 experts, fewer than model.router_topk=7",
        ),
        (["model.undropped_fraction=1"], "must be at least 0 and below 1"),
        (["model.device_capacity_factor=1", "parallel=cp2"], "not with parallel.context_parallel_size=2"),
        (["model.device_capacity_factor=0"], "must be positive"),
        (["model.yarn.rotary_scaling_factor=40"], "only model.attention=mla has YaRN"),
        (
            ["train.batch_ramp.start=4", "train.batch_ramp.tokens=1e4", "train.batch_ramp.increment=3"],
            "train.batch_ramp.increment=3: must be a mult",
        ),
        (
            ["train.batch_ramp.increment=2", "train.batch_ramp.tokens=1e4", "train.batch_ramp.start=16"],
            "must reach train.global_batch_size=8",
        ),
        (["train.batch_ramp.increment=2", "train.batch_ramp.start=0"], "train.batch_ramp.start=0: must be positive"),
        (["checkpoint.init_from=nowhere"], "holds no checkpoints"),
        (["data.tokenizer=x.json"], "only data=blend reads them"),
        (["model.num_device_groups=5"], "must divide model.num_experts=64"),
        (["parallel.tensor_model_parallel_size=3"], "must divide model.num_attention_heads"),
        (["parallel=tp2", "parallel.expert_tensor_parallel_size=1"], "would not reduce the experts' gradients"),
        (["parallel=cp2", "data.sequence_length=130"], "must be a multiple of 4"),
        (["run.name=../x"], "run.name='../x'"),
        (["data=blend"], "needs at least one {path: PREFIX, weight: W}"),
        (["data=blend", "data.train=[{path: nowhere}]"], "no such file: nowhere.bin, nowhere.idx"),
        (["data.train=[{path: x}]"], "only data=blend reads them"),
        (["data.tokenizer_vocab_size=9000"], "must not exceed model.vocab_size=8192"),
        (["data.tokenizer_vocab_size=100"], "a byte-level tokenizer needs at least"),
        (["scheduler.milestones=[0.9,0.8]"], "must rise within 0 and 1"),
        (["train.exit_step=301"], "must not exceed train.train_steps=300"),
        (["parallel.data_parallel_size=2", "parallel=ep4"], "must divide the 2 ranks of a pipeline stage"),
        (["data.valid_fraction=1.5"], "data.valid_fraction=1.5: must be at least 0 and below 1"),
        (["data.test_fraction=-0.1"], "data.test_fraction=-0.1: must be at least 0 and below 1"),
        (["data.test_fraction=nan"], "data.test_fraction=nan: must be at least 0 and below 1"),
        (["data.valid_fraction=0"], "must be above 0 with data=python_stdlib"),
        (["data.test_fraction=0.1"], "only data=blend reads them"),
        (["data=mock", "data.test=[{path: x}]"], "only data=blend reads them; data.kind is mock"),
        (["data=blend", "data.valid_fraction=0.6", "data.test_fraction=0.4"], "must leave documents to train on"),
        (
            ["data=blend", "data.valid_fraction=0.1", "data.valid=[{path: x}]"],
            "data.valid_fraction=0.1: must be 0 where data.valid names datasets",
        ),
        (
            ["data=blend", "data.test_fraction=0.1", "data.test=[{path: x}]"],
            "data.test_fraction=0.1: must be 0 where data.test names datasets",
        ),
        (["data=blend", "data.train=[{path: a/x}, {path: b/x}]"], "data.train name=x: of several datasets"),
        (
            ["data=blend", "data.test=[{path: a, name: x}, {path: b, name: x}]"],
            "data.test name=x: of several datasets; give each its own with name=...",
        ),
        (["data=blend", "data.train=[{path: x, name: a/b}]"], "data.train name='a/b': letters, digits and any of"),
        (["data=blend", "data.train=[{path: x, weight: 0}]"], "weight=0.0: must be positive"),
        (["data=blend", "data.train=[{path: x, weight: inf}]"], "weight=inf: must be positive"),
        (["data=blend", "data.valid=[{path: x, weight: nan}]"], "weight=nan: must be positive"),
        (["data.num_workers=-1"], "data.num_workers=-1: must not be negative"),
        (["train.max_skipped_steps=0"], "train.max_skipped_steps=0: must be positive"),
        (["train.spike_sigma=0"], "train.spike_sigma=0.0: must be positive"),
        (["train.spike_sigma=nan"], "train.spike_sigma=nan: must be positive"),
        (["train.spike_window=0"], "train.spike_window=0: must be positive"),
        (["train.spike_window=1"], "train.spike_window=1: must be at least 2, for a standard deviation"),
        (["profile.steps=[0]"], "profile.steps=[0]: must be steps from 1 to train.train_steps=300"),
        (["profile.steps=[301,2]"], "profile.steps=[301, 2]: must be steps from 1"),
        (["parallel=ep2", "profile.steps=[1]", "profile.ranks=[2]"], "profile.ranks=[2]: must be ranks from 0 to 1"),
        (["profile.steps=[1]", "profile.ranks=[]"], "profile.ranks=[]: must be ranks from 0 to 0, at least one"),
        (["optimizer.adam_beta2=1.0"], "optimizer.adam_beta2=1.0: must be at least 0 and below 1"),
        (["logger.heat_map_interval=0"], "logger.heat_map_interval=0: must be positive"),
        (["logger.wandb_project=a/b"], "logger.wandb_project='a/b': 1 to 128 characters, and none of / "),
        (["logger.wandb_tags=[a,'']"], "logger.wandb_tags=['a', '']: '' must have 1 to 64 characters"),
        ([f"logger.wandb_tags=[{65 * 'x'}]"], "must have 1 to 64 characters"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: must be positive"),
        (["optimizer.lr=inf"], "optimizer.lr=inf: must be positive"),
        (["train.train_steps"], "Error parsing override"),
        (["~model"], "interpolation"),
    ],
)
def test_rules(overrides: list[str], expected: str) -> None:
    found = problems("train.train_steps=300", *overrides)
    assert expected in "\n".join(found)
    assert overrides[-1].split("=")[0].split(".")[-1] in "\n".join(found)


def test_a_value_of_the_wrong_sign_hides_no_other_mistake() -> None:
    found = problems("train.micro_batch_size=0", "model.num_layers=-1", "run.name=a/b", "parallel=ep2")
    assert len(found) == 3


def test_a_wrong_layout_is_not_blamed_on_the_batch() -> None:
    assert len(problems("parallel.expert_model_parallel_size=3")) == 1
    assert len(problems("parallel.expert_model_parallel_size=3", "train.global_batch_size=7")) == 2


def test_all_rules_that_fail_are_reported() -> None:
    found = problems("model.router_topk=65", "train.exit_step=9000", "run.name=a/b", "train.global_batch_size=9")
    assert len(found) == 4


@pytest.mark.parametrize(("world_size", "expected"), [(3, "3 ranks: must be a multiple of 4"), (8, "start 4 ranks")])
def test_launched_ranks_must_fit(world_size: int, expected: str) -> None:
    pp4 = ["parallel.pipeline_model_parallel_size=4", "parallel.data_parallel_size=1"]
    assert expected in "".join(problems(*pp4, world_size=world_size))


def test_instantiation_from_config_is_refused() -> None:
    assert "_target_" in "".join(problems("+model._target_=os.system"))
