"""`run.dry_run=true`: what megatron-core gives each rank is what is planned, and what is not is told."""

import copy
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import CONF_DIR, compose_config
from megatron_moe.config.rules import lookup
from megatron_moe.config.schema import Attention, Dtype
from megatron_moe.config.validate import validate
from tests.helpers.ranks import run_ranks
from tests.helpers.training import MLA, TINY

RECIPES = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
# Data-parallel ranks: of slurm/README.md and PAPER.md, and on 1,024 GPUs.
FULL_SIZE = [
    ("deepseekmoe_2b", 64),
    ("deepseekmoe_16b", 64),
    ("deepseekmoe_16b", 512),
    ("deepseekmoe_145b", 16),
    ("deepseekmoe_145b", 32),
    ("deepseekmoe_142b_half", 16),
    ("deepseek_v2_lite", 64),
    ("deepseek_v2_lite", 512),
    ("deepseek_v2", 16),
]
LAYOUTS = {
    "tp2_ep2_of_8": ["parallel=tp2_ep2", "parallel.data_parallel_size=4"],
    "etp2": ["parallel=tp2_ep2", "parallel.expert_tensor_parallel_size=2", "precision=bf16"],
    "tp4_etp4_pp2": ["parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=2"],
    "vpp_mla": ["parallel=pp2_vpp2", *MLA, "model.q_lora_rank=16", "precision=bf16"],
    "cp2_yarn": ["parallel=cp2", *MLA, "model.yarn.rotary_scaling_factor=4"],
    "uneven_pp_ep4": ["parallel=ep4", "parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[1,3]"],
    "gpu_kernels": [
        "parallel=tp2_ep2",
        "precision=fp8",
        "kernels.dispatcher=deepep",
        "kernels.moe_permute_fusion=true",
        "recompute=selective",
        "recompute.modules=[moe_act]",
    ],
    "gpu_overlap": [
        "parallel=pp2_vpp2",
        "parallel.expert_model_parallel_size=2",
        "precision=bf16",
        "overlap.overlap_moe_expert_parallel_comm=true",
        "overlap.delay_wgrad_compute=true",
        "overlap.overlap_param_gather=true",
    ],
    "hash_of_112": [
        "parallel.data_parallel_size=112",
        "parallel.expert_model_parallel_size=8",
        "train.global_batch_size=448",
        "model.routing=hash",
        "model.router_topk=1",
        "model.expert_balance_factor=0",
        "model.device_balance_factor=0",
    ],
}


def dry_runs(commands: list[list[str]]) -> None:
    """In one process, as if all ranks were there."""
    from megatron_moe.train.dry_run import dry_run

    for overrides in commands:
        config = compose_config([*overrides, "run.dry_run=true"])
        dry_run(config, validate(config, None))


def test_layouts() -> None:
    run_ranks(dry_runs, 1, [[*TINY, *overrides] for overrides in LAYOUTS.values()])


LARGER = ["model.hidden_size=512", "model.ffn_hidden_size=1024", "model.expert_ffn_hidden_size=256", "parallel=pp2_ep2"]


def static_bytes_of_gradients() -> list[list[float]]:
    """Built and planned, by the type of gradients."""
    from megatron_moe.train.dry_run import build_stages

    found = []
    for options in ([], ["precision.grad_reduce_in_fp32=false"]):
        config = compose_config([*TINY, *LARGER, "precision=bf16", *options])
        found.append([size for stage in build_stages(config, 4) for size in (stage.most_bytes, stage.static_bytes)])
    return found


def test_gradients_take_the_bytes_of_their_type() -> None:
    ((fp32, bf16),) = run_ranks(static_bytes_of_gradients, 1)
    assert fp32[::2] == pytest.approx(fp32[1::2], rel=0.005)
    assert bf16[::2] == pytest.approx(bf16[1::2], rel=0.005)
    assert all(less < 0.92 * more for less, more in zip(bf16, fp32, strict=True))


def dry_run_beside_gpu_packages() -> None:
    """As on a cluster: the packages for GPUs are there, and must not be used."""
    from megatron.core import optimizer
    from megatron.core.transformer import multi_latent_attention

    from megatron_moe.distributed import context

    context.has_transformer_engine = lambda: True
    multi_latent_attention.TELinear = type("TELinear", (), {})
    optimizer.USING_PYTORCH_OPTIMIZER, optimizer.Adam = False, None
    dry_runs([[*TINY, *LAYOUTS["vpp_mla"]]])
    assert not optimizer.USING_PYTORCH_OPTIMIZER


def test_gpu_packages_are_left_alone() -> None:
    run_ranks(dry_run_beside_gpu_packages, 1)


# What is drawn from, for random layouts; most of what is drawn is refused.
CHOICES = {
    "model.num_layers": (2, 3, 5, 8),
    "model.num_dense_layers": (0, 1, 2),
    "model.hidden_size": (30, 32, 64),
    "model.num_attention_heads": (1, 3, 4, 8),
    "model.vocab_size": (251, 256, 260),
    "model.num_experts": (1, 2, 3, 6, 8, 12),
    "model.num_shared_experts": (0, 1, 3),
    "model.router_topk": (1, 2),
    "model.expert_ffn_hidden_size": (5, 16, 33),
    "model.attention": tuple(Attention),
    "model.q_lora_rank": (None, 7, 16),
    "model.yarn.rotary_scaling_factor": (None, None, 4.0),
    "parallel.tensor_model_parallel_size": (1, 2, 3, 4),
    "parallel.pipeline_model_parallel_size": (1, 2, 3, 4),
    "parallel.virtual_pipeline_model_parallel_size": (1, 1, 2, 3),
    "parallel.context_parallel_size": (1, 1, 2, 3),
    "parallel.expert_model_parallel_size": (1, 2, 3, 4, 8),
    "parallel.expert_tensor_parallel_size": (None, 1, 2, 4),
    "parallel.data_parallel_size": (None, 2, 3, 7, 64),
    "data.sequence_length": (32, 144),
    "precision.dtype": tuple(Dtype),
}


def dry_runs_at_random(seed: int, count: int) -> None:
    """Of layouts that config/validate.py accepts."""
    from megatron_moe.train.dry_run import dry_run

    plain = compose_config([*TINY, "train.global_batch_size=4032", "run.dry_run=true"])  # 4032: of many divisors
    random = Random(seed)
    while count:
        config = copy.deepcopy(plain)
        drawn = {option: random.choice(values) for option, values in CHOICES.items()}
        for option, value in drawn.items():
            group, _, name = option.rpartition(".")
            setattr(lookup(config, group), name, value)
        try:
            world_size = validate(config, None)
        except ConfigError:
            continue
        try:
            dry_run(config, world_size)
        except Exception as error:
            raise AssertionError(f"{world_size} ranks of {drawn}") from error
        count -= 1


@pytest.mark.soak("dry run of random layouts")
@pytest.mark.parametrize("seed", range(10))
def test_what_is_accepted_can_be_built(seed: int) -> None:
    run_ranks(dry_runs_at_random, 1, seed, 40)


def params_of_experiments() -> dict[str, tuple[list[int], list[int]]]:
    """Of each recipe the parameters on a rank of each kind of stage: planned, and built."""
    from megatron_moe.config.derived import required_world_size
    from megatron_moe.plan.params import rank_params
    from megatron_moe.plan.pipeline import layers_by_stage
    from megatron_moe.train.dry_run import build_rank

    found = {}
    for name in RECIPES:
        config = compose_config([f"experiment={name}"])
        world_size = required_world_size(config.parallel)
        stages = layers_by_stage(config.model, config.parallel)
        kinds = {layers: stage * world_size // len(stages) for stage, layers in enumerate(stages)}
        planned = [rank_params(config.model, config.parallel, layers) for layers in kinds]
        found[name] = planned, [build_rank(config, rank, world_size).params for rank in kinds.values()]
    return found


def test_params_of_every_recipe() -> None:
    (found,) = run_ranks(params_of_experiments, 1)
    assert len(found) == len(RECIPES) > 5
    for name, (planned, built) in found.items():
        assert planned == built, name


@pytest.mark.soak("dry run of recipes")
@pytest.mark.parametrize(("name", "replicas"), FULL_SIZE)
def test_recipes_at_full_size(name: str, replicas: int) -> None:
    run_ranks(dry_runs, 1, [[f"experiment={name}", f"parallel.data_parallel_size={replicas}"]])


def test_every_recipe_is_built_at_full_size() -> None:
    assert sorted({name for name, _ in FULL_SIZE}) == RECIPES


def differences_found() -> dict[str, list[str]]:
    """What is said of stages that are not as planned."""
    from megatron_moe.train.dry_run import build_stages, differences, problems_of_tensors

    config = compose_config([*TINY, "parallel=pp2_ep2"])
    stage = build_stages(config, validate(config, None))[1]
    built = stage.built[2]

    def with_rank(**changes: Any) -> list[str]:
        return list(differences(replace(stage, built={2: replace(built, **changes)})))

    return {
        "as planned": list(differences(stage)),
        "parameters": with_rank(params=replace(built.params, dense=built.params.dense + 1)),
        "layers": with_rank(layers=[[1, 2]]),
        "experts": with_rank(experts=[[4, 5, 6, 7]] * 2),
        "more bytes": with_rank(static_bytes=2 * built.static_bytes + 2**22),
        "fewer bytes": with_rank(static_bytes=int(stage.static_bytes) - 1),
        "tensors": problems_of_tensors(config, [built, built]),
    }


def test_what_is_not_as_planned_is_told() -> None:
    (found,) = run_ranks(differences_found, 1)
    assert found.pop("as planned") == []
    tensors = found.pop("tensors")
    assert all(len(lines) == 1 for lines in found.values()), found
    assert found["layers"] == ["rank 2: layers [[1, 2]], planned [[2, 3]]"]
    assert "embedding.word_embeddings.weight: was not saved" in tensors
    assert any("layer 2, experts 4 to 7: " in line and "were not saved" in line for line in tensors)
    assert any("were saved more than once" in line for line in tensors)
