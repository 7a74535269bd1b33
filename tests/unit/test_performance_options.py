"""Recomputation, kernels, fp8 and overlap: what goes together, and what megatron-core is told."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from megatron.core import utils
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import transformer_config as mcore
from megatron.core.transformer.moe import moe_utils
from omegaconf import DictConfig, OmegaConf

from megatron_moe.config import schema
from megatron_moe.config.derived import required_world_size
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import CONF_DIR, compose_config
from megatron_moe.config.rules import lookup
from megatron_moe.config.schema import Config, Dispatcher
from megatron_moe.config.validate import validate
from megatron_moe.model.acceleration import (
    FUSIONS,
    Accelerators,
    check_accelerators,
    data_parallel_fields,
    describe,
)
from megatron_moe.model.transformer_config import transformer_config
from tests.helpers.training import MLA, TINY

GPU = Accelerators(gpu=True)
EVERYTHING = Accelerators(
    gpu=True,
    transformer_engine=True,
    fp8=True,
    fused_weight_gradient=True,
    fusions=frozenset(FUSIONS),
    dispatchers=frozenset(Dispatcher),
)
TE_KERNELS = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
)
Setting = dict[str, Any]  # values by option


@pytest.fixture(autouse=True)
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What megatron-core looks for before it accepts a fusion."""
    for name in TE_KERNELS:
        monkeypatch.setattr(moe_utils, name, object(), raising=False)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    for module in (utils, mcore):
        monkeypatch.setattr(module, "is_te_min_version", lambda version: True)


def selective(*names: str) -> Setting:
    modules = [schema.RecomputeModule(name) for name in names]
    return {"recompute.granularity": schema.RecomputeGranularity.selective, "recompute.modules": modules}


def full(method: str, num_layers: int) -> Setting:
    return {
        "recompute.granularity": schema.RecomputeGranularity.full,
        "recompute.method": schema.RecomputeMethod(method),
        "recompute.num_layers": num_layers,
    }


BF16 = {"precision.dtype": schema.Dtype.bf16}
TWO_AT_ONCE = {"overlap.overlap_moe_expert_parallel_comm": True, **BF16}
SETTINGS: list[Setting] = [
    {},
    BF16,
    *({**BF16, "precision.fp8": schema.Fp8.hybrid, "precision.fp8_recipe": recipe} for recipe in schema.Fp8Recipe),
    {"precision.fp8": schema.Fp8.e4m3},
    {"precision.grad_reduce_in_fp32": False},
    *(selective(module.value) for module in schema.RecomputeModule),
    selective(),
    selective("moe", "moe_act"),
    {"recompute.modules": [schema.RecomputeModule.moe]},
    full("uniform", 1),
    full("uniform", 2),
    full("uniform", 3),
    full("block", 2),
    {"recompute.granularity": schema.RecomputeGranularity.full},
    {"recompute.method": schema.RecomputeMethod.block},
    *({"kernels.dispatcher": dispatcher, **BF16} for dispatcher in Dispatcher),
    {"kernels.dispatcher": Dispatcher.deepep},
    *({f"kernels.{name}": True} for name in FUSIONS),
    *({f"overlap.{name}": True} for name in vars(schema.OverlapConfig())),
    {"overlap.overlap_grad_reduce": False},
    TWO_AT_ONCE,
    {**TWO_AT_ONCE, "overlap.delay_wgrad_compute": True},
    {"train.deterministic": True},
    {"data.reset_position_ids": True},
    *({"model.forced_routing": forced} for forced in schema.ForcedRouting),
]
LAYOUTS = {
    "single": [],
    "ep2": ["parallel=ep2"],
    "pp2_vpp2": ["parallel=pp2_vpp2"],
    "pp2_vpp2_ep2": ["parallel=pp2_vpp2", "parallel.expert_model_parallel_size=2"],
    "tp2_ep2": ["parallel=tp2_ep2"],
    "cp2_mla": ["parallel=cp2", *MLA],
}


def with_settings(base: Config, *settings: Setting) -> Config:
    config = copy.deepcopy(base)
    for option, value in itertools.chain(*(setting.items() for setting in settings)):
        group, _, name = option.rpartition(".")
        setattr(lookup(config, group), name, value)
    return config


@functools.cache
def tiny() -> DictConfig:
    return OmegaConf.structured(compose_config(TINY))


def composed(*overrides: str) -> Config:
    """What `compose_config` gives, without a second for each call."""
    config = tiny()
    for override in overrides:
        name, _, value = override.partition("=")
        file = CONF_DIR / name / f"{value}.yaml"
        config = OmegaConf.merge(
            config, {name: OmegaConf.load(file)} if file.exists() else OmegaConf.from_dotlist([override])
        )
    return OmegaConf.to_object(config)


def problems_of(config: Config) -> tuple[str, ...]:
    try:
        validate(config, required_world_size(config.parallel))
        check_accelerators(config, EVERYTHING)
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore")
def test_megatron_core_accepts_every_pair_that_we_accept(layout: str) -> None:
    """Red: take a rule out of performance_rules.py."""
    base = composed(*LAYOUTS[layout])
    accepted = refused = 0
    for pair in itertools.combinations(SETTINGS, 2):
        config = with_settings(base, *pair)
        problems = problems_of(config)
        if problems:
            refused += 1
            assert all(": " in problem and "." in problem.split("=")[0] for problem in problems), problems
        else:
            accepted += 1
            transformer_config(config, EVERYTHING)
            DistributedDataParallelConfig(**data_parallel_fields(config, EVERYTHING))
    assert accepted > 50
    assert refused > 50


@pytest.mark.parametrize(
    ("setting", "overrides", "expected"),
    [
        (selective(), [], "needs at least one of layernorm, moe_act"),
        (selective("mla_up_proj"), [], "mla_up_proj needs model.attention=mla"),
        (selective("shared_experts"), ["model.num_shared_experts=0"], "needs model.num_shared_experts above 0"),
        (selective("moe", "shared_experts"), [], "moe already computes [shared_experts] again"),
        (full("uniform", 2), ["parallel=pp2"], "given by parallel.pipeline_layout"),
        (full("uniform", 2), ["parallel=pp2", "parallel.pipeline_layout=[3,1]"], r"must divide the layers of each"),
        ({"recompute.num_layers": 0}, [], "recompute.num_layers=0: must be positive"),
        ({"recompute.num_layers": 2}, [], "recompute.granularity=full reads it only"),
        ({"precision.fp8": schema.Fp8.hybrid}, [], "needs precision.dtype=bf16"),
        (
            {"precision.fp8": schema.Fp8.hybrid, **BF16},
            ["model.expert_ffn_hidden_size=24"],
            "multiples of 16; model.expert_ffn_hidden_size is 24",
        ),
        (
            {"precision.fp8": schema.Fp8.hybrid, "precision.fp8_recipe": schema.Fp8Recipe.mxfp8, **BF16},
            ["model.hidden_size=80"],
            "multiples of 32; model.hidden_size is 80",
        ),
        (
            {"kernels.dispatcher": Dispatcher.deepep, **BF16},
            [],
            "needs parallel.expert_model_parallel_size of at least",
        ),
        (
            {"precision.fp8": schema.Fp8.hybrid, **BF16, **selective("moe")},
            ["parallel=pp2", "model.num_device_groups=4", "model.device_capacity_factor=1"],
            "tokens of another micro batch, which model.device_capacity_factor=1.0 depends on",
        ),
        (
            {"precision.fp8": schema.Fp8.hybrid, **BF16, **full("uniform", 1), "data.reset_position_ids": True},
            ["parallel=pp2", *MLA],
            "which data.reset_position_ids=True depends on",
        ),
        ({"kernels.dispatcher": Dispatcher.hybridep}, ["parallel=ep2"], "move bf16 only"),
        (
            {"kernels.moe_router_fusion": True},
            ["model.num_device_groups=4", "model.device_limit=2"],
            "knows no model.device_limit=2",
        ),
        ({"kernels.apply_rope_fusion": True}, MLA, "has a kernel for YaRN only"),
        (
            {"kernels.cross_entropy_loss_fusion": True, "train.deterministic": True},
            [],
            "not with train.deterministic=True",
        ),
        ({"overlap.moe_shared_expert_overlap": True}, ["model.num_shared_experts=0"], "needs model.num_shared_experts"),
        ({"recompute.modules": [schema.RecomputeModule.moe]}, [], "only recompute.granularity=selective reads them"),
        ({"precision.grad_reduce_in_fp32": False}, [], "only precision.dtype=bf16 has a choice"),
        (
            {"overlap.overlap_param_gather": True, "overlap.overlap_grad_reduce": False},
            [],
            "works on the buckets of overlap.overlap_grad_reduce",
        ),
        (TWO_AT_ONCE, ["parallel=pp2_ep2"], "needs parallel.virtual_pipeline_model_parallel_size of at least 2"),
        ({**TWO_AT_ONCE, **selective("moe")}, ["parallel=ep2"], "recompute.modules=[moe]; moe would not be recomputed"),
        ({"model.forced_routing": schema.ForcedRouting.skewed}, [], "needs parallel.expert_model_parallel_size"),
        (
            {"model.forced_routing": schema.ForcedRouting.balanced},
            ["model.routing=hash", "model.router_topk=1", "model.expert_balance_factor=0"],
            "model.routing=hash is forced already",
        ),
    ],
)
def test_rules(setting: Setting, overrides: list[str], expected: str) -> None:
    problems = problems_of(with_settings(composed(*overrides), setting))
    assert any(expected in problem for problem in problems), problems


def test_a_gpu_with_transformer_engine_gets_the_fast_path_without_options() -> None:
    config = composed("precision=bf16", "parallel=ep2")
    fields = transformer_config(config, EVERYTHING)
    assert all(getattr(fields, name) for name in FUSIONS)
    assert (fields.moe_grouped_gemm, fields.gradient_accumulation_fusion) == (True, True)
    assert (fields.cross_entropy_fusion_impl, fields.moe_token_dispatcher_type) == ("te", "alltoall")
    data_parallel = DistributedDataParallelConfig(**data_parallel_fields(config, EVERYTHING))
    assert (data_parallel.overlap_grad_reduce, data_parallel.overlap_param_gather) == (True, True)
    assert (data_parallel.grad_reduce_in_fp32, data_parallel.use_distributed_optimizer) == (True, True)


def test_nothing_is_switched_on_without_transformer_engine() -> None:
    config = composed()
    for accelerators in (Accelerators(), GPU):
        fields = transformer_config(config, accelerators)
        assert not any(getattr(fields, name) for name in FUSIONS)
        assert not fields.moe_grouped_gemm
        assert fields.recompute_granularity is fields.fp8 is None
    assert not DistributedDataParallelConfig(**data_parallel_fields(config, Accelerators())).overlap_grad_reduce
    assert describe(config, Accelerators()) == ""


@pytest.mark.parametrize(
    ("overrides", "off"),
    [
        (["train.deterministic=true"], {"cross_entropy_loss_fusion"}),
        (["data.reset_position_ids=true"], {"apply_rope_fusion"}),
        (MLA, {"apply_rope_fusion"}),
        (["model.num_device_groups=4", "model.device_limit=2"], {"moe_router_fusion"}),
        (["model.forced_routing=balanced"], {"moe_router_fusion"}),
        (["kernels.moe_permute_fusion=false"], {"moe_permute_fusion"}),
    ],
)
def test_a_fusion_that_something_excludes_is_off(overrides: list[str], off: set[str]) -> None:
    fields = transformer_config(composed(*overrides), EVERYTHING)
    assert {name for name in FUSIONS if not getattr(fields, name)} == off


def test_what_is_asked_for_reaches_megatron_core() -> None:
    config = composed(
        "parallel=ep2",
        "precision=fp8",
        "precision.fp8_recipe=blockwise",
        "precision.grad_reduce_in_fp32=false",
        "recompute=selective",
        "recompute.modules=[layernorm,moe_act]",
        "kernels.dispatcher=deepep",
        "overlap.overlap_moe_expert_parallel_comm=true",
        "overlap.delay_wgrad_compute=true",
        "overlap.overlap_param_gather=false",
    )
    assert problems_of(config) == ()
    fields = transformer_config(config, EVERYTHING)
    assert (fields.fp8, fields.fp8_recipe, fields.bf16) == ("hybrid", "blockwise", True)
    assert (fields.recompute_granularity, fields.recompute_modules) == ("selective", ["layernorm", "moe_act"])
    assert (fields.moe_token_dispatcher_type, fields.moe_flex_dispatcher_backend) == ("flex", "deepep")
    assert (fields.overlap_moe_expert_parallel_comm, fields.delay_wgrad_compute) == (True, True)
    data_parallel = DistributedDataParallelConfig(**data_parallel_fields(config, EVERYTHING))
    assert (data_parallel.overlap_grad_reduce, data_parallel.overlap_param_gather) == (True, False)
    assert (data_parallel.grad_reduce_in_fp32, data_parallel.delay_wgrad_compute) == (False, True)
    assert "recompute selective (layernorm, moe_act)" in describe(config, EVERYTHING)


@pytest.mark.parametrize(
    ("asked", "accelerators", "expected"),
    [
        ([], Accelerators(), (False, False)),
        (["overlap.overlap_param_gather=true"], Accelerators(), (True, True)),
        ([], GPU, (True, True)),
        (["overlap.overlap_grad_reduce=false"], GPU, (False, False)),
        (["overlap.overlap_param_gather=false"], GPU, (True, False)),
    ],
)
def test_gathering_comes_with_reducing(asked: list[str], accelerators: Accelerators, expected: tuple) -> None:
    fields = data_parallel_fields(composed(*asked), accelerators)
    assert (fields["overlap_grad_reduce"], fields["overlap_param_gather"]) == expected


def test_whole_layers_graphs_and_shared_experts_reach_megatron_core() -> None:
    fields = transformer_config(composed("recompute=full", "recompute.num_layers=2"), Accelerators())
    assert (fields.recompute_granularity, fields.recompute_method, fields.recompute_num_layers) == (
        "full",
        "uniform",
        2,
    )
    overlapped = composed("overlap.moe_shared_expert_overlap=true")
    assert problems_of(overlapped) == ()
    assert transformer_config(overlapped, EVERYTHING).moe_shared_expert_overlap


@pytest.mark.parametrize(
    ("override", "accelerators", "expected"),
    [
        *((f"kernels.{name}=true", Accelerators(), f"kernels.{name}=True: there is no kernel") for name in FUSIONS),
        ("kernels.dispatcher=deepep", Accelerators(), "needs a GPU and the package deep_ep (this rank has no GPU)"),
        ("kernels.dispatcher=hybridep", GPU, "package deep_ep (this rank has a GPU, no Transformer Engine)"),
        ("overlap.overlap_moe_expert_parallel_comm=true", Accelerators(), "needs a GPU"),
        ("overlap.delay_wgrad_compute=true", GPU, "needs Transformer Engine"),
        ("precision=fp8", GPU, "precision.fp8=hybrid: needs Transformer Engine"),
        ("recompute.modules=[moe_act]", GPU, "moe_act needs Transformer Engine's grouped experts"),
    ],
)
def test_what_a_rank_does_not_have_is_refused(override: str, accelerators: Accelerators, expected: str) -> None:
    config = composed(override)
    with pytest.raises(ConfigError) as refused:
        check_accelerators(config, accelerators)
    (problem,) = refused.value.problems
    assert expected in problem
    check_accelerators(config, EVERYTHING)


def test_what_this_machine_has_is_looked_up() -> None:
    from megatron_moe.model.acceleration import CPU_ONLY, accelerators_of

    assert accelerators_of(torch.device("cpu")) is CPU_ONLY
    of_gpu = accelerators_of(torch.device("cuda"))
    assert of_gpu.gpu
    assert "bias_activation_fusion" in of_gpu.fusions
