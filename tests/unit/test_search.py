"""The search finds what fits, the fastest first; the recipes have the layouts that it finds."""

import dataclasses
import time

import pytest

from megatron_moe.config.cluster import PlanConfig
from megatron_moe.config.load import compose_plan
from megatron_moe.config.schema import ParallelConfig, RecomputeConfig, RecomputeGranularity, RecomputeModule
from megatron_moe.config.validate import validate
from megatron_moe.plan.estimate import checked, estimate, memory_limit
from megatron_moe.plan.memory import memory_by_stage
from megatron_moe.plan.recompute import describe_recompute
from megatron_moe.plan.search import DOES_NOT_FIT, RECOMPUTE, Search, search
from megatron_moe.plan.step_time import StepModel

TENSOR, CONTEXT, PIPELINE, VIRTUAL, EXPERT = (
    f"parallel.{name}_parallel_size"
    for name in ("tensor_model", "context", "pipeline_model", "virtual_pipeline_model", "expert_model")
)
# GPUs, and what the paper says of a recipe's layout.
RECIPES = {
    "deepseekmoe_2b": (1, {"train.micro_batch_size": 4}),  # which its largest baseline fits too
    "deepseekmoe_16b": (64, {EXPERT: 1}),
    "deepseekmoe_145b": (512, {EXPERT: 4, CONTEXT: 1}),
    "deepseek_v2_lite": (64, {EXPERT: 1}),
    "deepseek_v2": (512, {EXPERT: 8, PIPELINE: 16}),
}


def searched(num_gpus: int, fixed: dict[str, int], *options: str) -> Search:
    config = compose_plan(
        [*options, *(f"{name}={size}" for name, size in fixed.items()), f"cluster.num_gpus={num_gpus}"]
    )
    return search(checked(config), num_gpus, set(fixed))


def most_memory(config: PlanConfig) -> float:
    return max(stage.total for stage in memory_by_stage(config, config.cluster.num_gpus))


def seconds_of_a_step(config: PlanConfig) -> float:
    model = StepModel(config, config.cluster.num_gpus)
    return model.step(model.pipeline_s()).total


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_layouts_that_are_found(name: str) -> None:
    num_gpus, fixed = RECIPES[name]
    recipe = compose_plan([f"experiment={name}"])
    best = searched(num_gpus, fixed, f"experiment={name}").found[0]
    assert best.config.parallel == recipe.parallel
    assert best.config.train.micro_batch_size == recipe.train.micro_batch_size
    assert best.config.recompute == recipe.recompute == RECOMPUTE["none"]
    assert best.memory <= 0.9 * 80e9


def test_145b_on_512_gpus() -> None:
    """Everything that is found is allowed and fits, fastest first; all that was tried is told of, within 30 s."""
    begin = time.process_time()
    result = searched(512, {}, "experiment=deepseekmoe_145b")
    assert time.process_time() - begin < 30
    assert result.tried > 5000
    assert result.refused[DOES_NOT_FIT] > 0
    speeds = [found.tokens_per_second_per_gpu for found in result.found]
    assert speeds == sorted(speeds, reverse=True) or speeds == pytest.approx(sorted(speeds, reverse=True), rel=1e-3)
    for found in result.found[:4]:
        assert validate(found.config, 512) == 512
        plan = estimate(found.config)
        assert plan.fits
        assert max(stage.total for stage in plan.memory) == found.memory
        assert plan.step.total == pytest.approx(found.step_s, rel=0.02)


def test_nothing_faster_is_missed() -> None:
    """Against all layouts of a small model on 8 GPUs, one by one."""
    options = ["experiment=deepseekmoe_2b", "model.num_experts=8", "model.router_topk=2"]
    best = searched(8, {}, *options).found[0]
    base = checked(compose_plan([*options, "cluster.num_gpus=8"]))
    for pipeline in (1, 2, 4, 8):
        for expert in (1, 2, 4, 8):
            for micro_batch in (1, 2, 4, 8):
                config = dataclasses.replace(
                    base,
                    parallel=dataclasses.replace(
                        base.parallel, pipeline_model_parallel_size=pipeline, expert_model_parallel_size=expert
                    ),
                    train=dataclasses.replace(base.train, micro_batch_size=micro_batch),
                )
                if 8 // pipeline % expert == 0:
                    plan = estimate(config)
                    assert not plan.fits or plan.tokens_per_second_per_gpu <= 1.001 * best.tokens_per_second_per_gpu


def test_what_is_given_stays() -> None:
    fixed = {TENSOR: 2, PIPELINE: 8, EXPERT: 16, CONTEXT: 2, "train.micro_batch_size": 2}
    result = searched(512, fixed, "experiment=deepseekmoe_145b", "cluster=h200_141gb")
    assert result.found
    for found in result.found:
        parallel = found.config.parallel
        assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (2, 8)
        assert (parallel.expert_model_parallel_size, parallel.context_parallel_size) == (16, 2)
        assert found.config.train.micro_batch_size == 2


def test_recomputation_only_where_nothing_else_fits() -> None:
    """145B without tensor parallelism: with all activations nothing fits; experts again are faster than layers."""
    fixed = {TENSOR: 1, CONTEXT: 1, EXPERT: 4}
    found = searched(512, fixed, "experiment=deepseekmoe_145b").found
    by_choice = {name: [one for one in found if one.config.recompute == choice] for name, choice in RECOMPUTE.items()}
    assert not by_choice["none"]
    assert found[0] in by_choice["selective"]
    assert by_choice["full"]  # which larger micro batches need
    for one in by_choice["full"]:
        for name in ("none", "selective"):
            config = dataclasses.replace(one.config, recompute=RECOMPUTE[name])
            assert most_memory(config) > memory_limit(config.cluster)


def test_recomputation_that_is_given_stays() -> None:
    fixed = {TENSOR: 1, PIPELINE: 16, EXPERT: 4, CONTEXT: 1}
    for name, choice in RECOMPUTE.items():
        config = checked(compose_plan(["experiment=deepseekmoe_145b", f"recompute={name}", "cluster.num_gpus=512"]))
        for option, size in fixed.items():
            setattr(config.parallel, option.split(".")[1], size)
        for option in ("recompute", "recompute.granularity"):
            result = search(config, 512, {*fixed, option})
            assert {describe_recompute(one.config.recompute) for one in result.found} == (
                set() if name == "none" else {describe_recompute(choice)}
            )


def test_a_choice_that_other_options_exclude_is_not_tried() -> None:
    """Micro batches of other experts meanwhile, and whole layers computed again."""
    config = checked(compose_plan(["experiment=deepseekmoe_145b", "cluster.num_gpus=512"]))
    config.overlap.overlap_moe_expert_parallel_comm = True
    options = {"pipeline_model_parallel_size": 8, "virtual_pipeline_model_parallel_size": 2}
    config.parallel = ParallelConfig(expert_model_parallel_size=4, **options)
    result = search(config, 512, {TENSOR, PIPELINE, VIRTUAL, EXPERT, CONTEXT})
    assert not result.found
    assert result.refused == {DOES_NOT_FIT: 1}


def test_larger_layouts_are_tried_where_a_rule_refuses_the_smallest() -> None:
    """As of overlapped experts, which need several virtual stages."""
    options = ["experiment=deepseekmoe_16b", "overlap.overlap_moe_expert_parallel_comm=true"]
    result = searched(16, {EXPERT: 4, PIPELINE: 2}, *options)
    assert {one.config.parallel.virtual_pipeline_model_parallel_size for one in result.found} >= {2, 4}


def test_v2_without_tensor_parallelism() -> None:
    """As PAPER.md tells."""
    config = checked(compose_plan(["experiment=deepseek_v2", "cluster.num_gpus=512"]))
    recipe = seconds_of_a_step(config)
    config.parallel.tensor_model_parallel_size = 1
    config.recompute = RecomputeConfig(
        granularity=RecomputeGranularity.selective,
        modules=[RecomputeModule(name) for name in ("core_attn", "mla_up_proj", "layernorm", "moe_act")],
    )
    assert f"{most_memory(config) / 2**30:.1f}" == "62.4"
    assert recipe / seconds_of_a_step(config) == pytest.approx(0.93, abs=0.005)


def test_more_memory_fits_more() -> None:
    counts = [
        len(searched(64, {CONTEXT: 1}, "experiment=deepseekmoe_16b", f"cluster={cluster}").found)
        for cluster in ("a100_40gb", "h100_80gb", "h200_141gb")
    ]
    assert counts[0] < counts[1] < counts[2]


def test_reasons_are_counted_without_their_numbers() -> None:
    result = searched(512, {CONTEXT: 1, TENSOR: 2}, "experiment=deepseekmoe_145b")
    assert result.tried == len(result.found) + sum(result.refused.values())
    assert all(not any(char.isdigit() for char in reason) for reason in result.refused)
    assert any("global_batch_size" in reason for reason in result.refused)


def test_layers_are_placed_by_time_only_where_it_pays() -> None:
    best = searched(64, {EXPERT: 1, PIPELINE: 2, VIRTUAL: 4}, "experiment=deepseekmoe_16b").found[0]
    assert best.config.parallel.pipeline_layout == [4, 4, 4, 4, 4, 4, 3, 1]  # the head takes as long as three layers
    best = searched(512, {EXPERT: 8, PIPELINE: 16}, "experiment=deepseek_v2").found[0]
    assert best.config.parallel.pipeline_layout is None


def test_memory_limit_is_the_usable_share() -> None:
    assert memory_limit(compose_plan(["cluster.usable_memory=0.5"]).cluster) == 40e9
