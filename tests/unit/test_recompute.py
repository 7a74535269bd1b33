"""Recomputation in the plan: what is kept instead, and what it takes; by hand, and against saved tensors."""

import dataclasses
import functools

import pytest

from megatron_moe.config.cluster import PlanConfig
from megatron_moe.config.load import CONF_DIR, compose_config, compose_plan
from megatron_moe.config.schema import (
    Dispatcher,
    Fp8,
    KernelsConfig,
    OverlapConfig,
    RecomputeConfig,
    RecomputeGranularity,
    RecomputeMethod,
    RecomputeModule,
)
from megatron_moe.plan.activations import activation_bytes, layer_activation_bytes
from megatron_moe.plan.estimate import checked, estimate, not_estimated
from megatron_moe.plan.memory import memory_by_stage
from megatron_moe.plan.pipeline import Layers
from megatron_moe.plan.recompute import describe_recompute, whole_layers
from megatron_moe.plan.search import RECOMPUTE
from megatron_moe.plan.step_time import PassTime, StepModel
from megatron_moe.plan.traffic import groups_of, seconds


def full(method: str = "uniform", num_layers: int = 1) -> RecomputeConfig:
    return RecomputeConfig(granularity=RecomputeGranularity.full, method=RecomputeMethod(method), num_layers=num_layers)


def selective(*modules: str) -> RecomputeConfig:
    return RecomputeConfig(
        granularity=RecomputeGranularity.selective, modules=[RecomputeModule(module) for module in modules]
    )


NONE = RecomputeConfig()


@functools.cache
def recipe(name: str) -> PlanConfig:
    return checked(compose_plan([f"experiment={name}", "cluster.num_gpus=512"]))


def kept(name: str, layers: Layers, recompute: RecomputeConfig, *, in_flight: float = 1.0) -> float:
    return activation_bytes(recipe(name).model, recompute, [layers], in_flight)


# Of a layer of 16B: hidden 2048, dense 10944, 16 heads; 64 experts of 1408, 2 shared ones, 6 for a token.
DENSE = 4 * 2048 + 8 * 2048 + 4 * 16 + 4 * 2048 + 6 * 10944
ROUTED = 2 * 6 * (2048 + 3 * 1408) + 12 * 64
SHARED = 6 * 2 * 1408
MOE = DENSE - 6 * 10944 + ROUTED + SHARED


def test_a_layer_by_hand() -> None:
    model = recipe("deepseekmoe_16b").model
    assert (layer_activation_bytes(model, moe=False), layer_activation_bytes(model, moe=True)) == (DENSE, MOE)


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        (NONE, 10 * (DENSE + 8 * MOE)),
        (full(), 10 * 9 * 4096 + MOE - 4096),  # an input of 2048 a layer, and the largest layer
        (full(num_layers=3), 10 * 3 * 4096 + 3 * MOE - 4096),
        (full("block"), 10 * (4096 + 8 * MOE) + DENSE - 4096),
        (full("block", 3), 10 * (3 * 4096 + 6 * MOE) + MOE - 4096),
        (selective("moe"), 10 * (DENSE + 8 * (MOE - ROUTED - SHARED)) + ROUTED + SHARED),
        (selective("shared_experts"), 10 * (DENSE + 8 * (MOE - SHARED)) + SHARED),
        (selective("mlp"), 10 * (DENSE - 6 * 10944 - 4096 + 8 * MOE) + 6 * 10944 + 4096),
        (selective("moe_act"), 10 * (DENSE + 8 * (MOE - 2 * 6 * 1408)) + 2 * 6 * 1408),
        (selective("layernorm"), 10 * (DENSE + 8 * (MOE - 4096)) + 4096),
        (selective("core_attn"), 10 * (DENSE + 8 * MOE - 9 * 64) + 64),
    ],
)
def test_what_is_kept_of_10_micro_batches_by_hand(recompute: RecomputeConfig, expected: float) -> None:
    assert kept("deepseekmoe_16b", Layers(1, 8), recompute, in_flight=10) == expected


def test_latent_attention_keeps_its_latents() -> None:
    """V2: 128 heads with keys of 192 and values of 128, of latents of 1536 and 512, which are normalized again."""
    layers = Layers(0, 1)
    plain = kept("deepseek_v2", layers, NONE, in_flight=2)
    up = 2 * (1536 + 512) + 2 * 128 * (192 + 192 + 128)
    assert kept("deepseek_v2", layers, selective("mla_up_proj"), in_flight=2) == plain - up
    assert kept("deepseek_v2", layers, selective("layernorm"), in_flight=2) == plain - 4 * 5120


def test_the_first_layers_of_each_virtual_stage_are_computed_again() -> None:
    recompute = full("block", 2)
    assert whole_layers(recompute, Layers(1, 3)) == Layers(1, 1)
    assert whole_layers(recompute, Layers(3, 3)) == Layers(2, 0)
    assert whole_layers(recompute, Layers(0, 1)) == Layers(0, 1)
    two = activation_bytes(recipe("deepseekmoe_16b").model, recompute, [Layers(0, 4), Layers(0, 4)], 1.5)
    assert two == 1.5 * 2 * (2 * 4096 + 2 * MOE) + MOE - 4096


def test_choices_of_the_search_are_those_of_conf() -> None:
    assert set(RECOMPUTE) == {path.stem for path in (CONF_DIR / "recompute").glob("*.yaml")}
    for name, choice in RECOMPUTE.items():
        assert compose_config([f"recompute={name}"]).recompute == choice
    assert list(map(describe_recompute, RECOMPUTE.values())) == ["none", "selective (mlp, moe)", "full (uniform 1)"]


def plan_of(recompute: RecomputeConfig, name: str = "deepseekmoe_145b") -> PlanConfig:
    return dataclasses.replace(recipe(name), recompute=recompute)


def times(recompute: RecomputeConfig, layers: Layers, name: str = "deepseekmoe_145b") -> tuple[PassTime, PassTime]:
    """Of the passes through some layers, forward and backward."""
    model = StepModel(plan_of(recompute, name), 512)
    return model.pass_time(layers, backward=False), model.pass_time(layers, backward=True)


def rate(name: str) -> float:
    """FLOPs a second, for each token of a rank; both recipes have 2 tensor-parallel ranks."""
    cluster = recipe(name).cluster
    return cluster.peak_flops * cluster.compute_efficiency / (4096 / 2)


LAYERS = Layers(0, 4, head=True)


def test_full_recomputation_adds_a_forward_pass_of_the_layers() -> None:
    forward, plain = times(NONE, LAYERS)
    again_forward, again = times(full(), LAYERS)
    layers, _ = times(NONE, Layers(0, 4))
    assert again_forward == forward
    assert again.compute == plain.compute
    assert again.recompute == layers.compute > 0 == plain.recompute
    assert again.all_to_all == pytest.approx(2 * plain.all_to_all)
    assert again.tensor == pytest.approx(plain.tensor + layers.tensor)


def test_selective_recomputation_adds_its_parts() -> None:
    """145B: 4 layers of 12 + 4 experts of 1408 on 4096, for a token; and, of attention, its scores."""
    forward, plain = times(NONE, LAYERS)
    _, moe = times(selective("moe"), LAYERS)
    assert moe.recompute == pytest.approx(4 * 16 * 6 * 4096 * 1408 / rate("deepseekmoe_145b"))
    assert moe.all_to_all == pytest.approx(2 * plain.all_to_all)
    # The shared experts have 4 x 2 exchanges; attention as many forward, and the head 2.
    assert moe.tensor == pytest.approx(plain.tensor + 8 / 18 * forward.tensor)
    _, shared = times(selective("shared_experts"), LAYERS)
    assert shared.recompute == pytest.approx(moe.recompute / 4)
    assert shared.all_to_all == plain.all_to_all
    assert shared.tensor == moe.tensor
    _, core = times(selective("core_attn"), LAYERS)
    assert core.recompute == pytest.approx(4 * 2 * 4096 * 4096 / rate("deepseekmoe_145b"))  # half of 4096 positions
    for name in ("moe_act", "layernorm", "mlp"):
        assert times(selective(name), LAYERS)[1] == plain


def test_dense_ffns_are_computed_again() -> None:
    _, again = times(selective("mlp"), Layers(1, 3))
    assert again.recompute == pytest.approx(6 * 4096 * 21888 / rate("deepseekmoe_145b"))


def test_up_projections_of_latent_attention_are_multiplied_again() -> None:
    v2 = recipe("deepseek_v2")
    (_, plain), (_, again) = (times(choice, Layers(0, 1), v2.run.name) for choice in (NONE, selective("mla_up_proj")))
    assert again.recompute == pytest.approx(2 * 128 * (1536 * 192 + 512 * 256) / rate("deepseek_v2"))
    gathered = groups_of(v2, v2.cluster, 512).tensor.ring(2 * 4096 * (1536 + 512))
    assert again.tensor - plain.tensor == pytest.approx(seconds(v2.cluster, gathered))


def test_keys_and_values_are_passed_round_again() -> None:
    config = plan_of(selective("core_attn"))
    config.parallel = dataclasses.replace(config.parallel, context_parallel_size=2)
    forward, backward = (StepModel(config, 512).pass_time(LAYERS, backward=kind) for kind in (False, True))
    assert backward.context == pytest.approx(3 * forward.context)
    assert forward.context > 0


@pytest.mark.parametrize(("recompute", "backward"), [(NONE, 8), (full(), 12), (selective("mlp", "moe"), 12)])
def test_a_layer_takes_its_overhead_again(recompute: RecomputeConfig, backward: float) -> None:
    config = plan_of(recompute)
    config.cluster = dataclasses.replace(config.cluster, layer_overhead_s=1.0)
    times = [StepModel(config, 512).pass_time(Layers(1, 3), backward=kind) for kind in (False, True)]
    assert [time.overhead for time in times] == [4, backward]


def test_what_is_computed_again_is_no_model_flop() -> None:
    """A step takes about a third longer, for the same FLOPs."""
    plain, again = estimate(plan_of(NONE)), estimate(plan_of(full()))
    assert again.flops_per_token == plain.flops_per_token
    assert again.busy["recompute"] == pytest.approx(again.busy["compute"] / 3, rel=0.05)
    assert again.mfu / plain.mfu == pytest.approx(plain.step.total / again.step.total)
    assert 1.3 < again.step.total / plain.step.total < 1.4
    assert max(stage.total for stage in again.memory) < 0.5 * max(stage.total for stage in plain.memory)


def test_zero_bubble_delays_no_recomputation() -> None:
    config = plan_of(full())
    config.train = dataclasses.replace(config.train, global_batch_size=256)
    model = StepModel(config, 512)
    slots = {slot.task.kind.value: slot.stop - slot.start for slot in model.timeline(split_backward=True)[1]}
    time = model.pass_time(model.chunks[1][0], backward=True)
    assert slots["weight"] == pytest.approx(time.compute / 2)
    assert slots["backward"] == pytest.approx(time.total - time.compute / 2)


def test_gradients_in_bf16_halve_their_bytes() -> None:
    """And of 6 bytes a parameter that data-parallel ranks send, 4 are left."""
    fp32 = recipe("deepseekmoe_145b")
    bf16 = dataclasses.replace(fp32, precision=dataclasses.replace(fp32.precision, grad_reduce_in_fp32=False))
    for stage, less in zip(memory_by_stage(fp32, 512), memory_by_stage(bf16, 512), strict=True):
        assert dataclasses.replace(less, gradients=2 * less.gradients) == stage
    whole, less = (StepModel(config, 512).step(0.0).data_parallel for config in (fp32, bf16))
    assert less == pytest.approx(4 / 6 * whole)


def test_options_without_an_estimate_are_told() -> None:
    config = plan_of(full())
    assert not_estimated(config) == []
    config.precision = dataclasses.replace(config.precision, fp8=Fp8.hybrid)
    config.kernels = KernelsConfig(dispatcher=Dispatcher.deepep)
    config.overlap = OverlapConfig(overlap_grad_reduce=True)
    assert not_estimated(config) == ["kernels.dispatcher", "overlap.overlap_grad_reduce", "precision.fp8"]
