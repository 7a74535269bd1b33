"""Figures that others have published, beside what our formulas give. Pure; imports no torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.cluster import ClusterConfig, PlanConfig
from megatron_moe.config.load import compose_plan
from megatron_moe.config.schema import (
    Attention,
    DataConfig,
    Dtype,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
)
from megatron_moe.plan.activations import activation_bytes
from megatron_moe.plan.attention import GroupedQueryModel
from megatron_moe.plan.flops import model_flops_per_token, paper_flops_per_token
from megatron_moe.plan.memory import memory_by_stage, static_bytes
from megatron_moe.plan.params import activated_params, params_by_part, total_params
from megatron_moe.plan.pipeline import Layers, all_layers
from megatron_moe.plan.schedule import micro_batches_in_flight
from megatron_moe.plan.step_time import StepModel
from megatron_moe.plan.traffic import Group, seconds

GIB = 2**30


@dataclass(frozen=True)
class Figure:
    """A published figure and ours.

    Attributes:
        what: it is of, and its unit.
        published: as printed.
        predicted: by our formulas.
        error: by which ours may differ, relative: at least and at most; None: by rounding to as many digits.
        fitted: an input of ours was fitted to this figure, so that it tests nothing.
        tested: whether `error` must hold.
    """

    what: str
    published: str
    predicted: float
    error: tuple[float, float] | None = None
    fitted: bool = False
    tested: bool = True

    @property
    def relative(self) -> float:
        """Ours over theirs, less 1."""
        return self.predicted / self._value - 1

    @property
    def _value(self) -> float:
        return float(self.published.replace(",", ""))

    @property
    def holds(self) -> bool:
        """Whether ours is as near as it may be."""
        if self.error is None:
            digits = len(self.published.partition(".")[2])
            return f"{self.predicted:.{digits}f}" == self.published
        return self.error[0] <= self.relative <= self.error[1]


def published_figures() -> list[Figure]:
    """All of them."""
    return [*_parameters(), *_paper_flops(), *_megatron_flops(), *_memory(), *_all_to_all(), *_speed()]


@functools.cache
def _model(name: str) -> ModelConfig:
    return compose_plan([f"model={name}"]).model


@functools.cache
def _cluster(name: str) -> ClusterConfig:
    return compose_plan([f"cluster={name}"]).cluster


def _moe(**sizes: Any) -> dict[str, Any]:
    """What a model of others has, but for its sizes."""
    return {"ffn_hidden_size": 1, "num_dense_layers": 0, "num_shared_experts": 0, "expert_balance_factor": 0.0} | sizes


def _dense(name: str, **sizes: Any) -> ModelConfig:
    none = {"num_experts": 0, "router_topk": 0, "expert_ffn_hidden_size": 1, "num_dense_layers": sizes["num_layers"]}
    return ModelConfig(name=name, **_moe(**none | sizes))


# Sizes of models that are not in conf/model, by their config.json.
DEEPSEEK_V3 = ModelConfig(
    name="DeepSeek-V3",
    num_layers=61,
    num_dense_layers=3,
    hidden_size=7168,
    ffn_hidden_size=18432,
    num_attention_heads=128,
    vocab_size=129280,
    num_experts=256,
    num_shared_experts=1,
    expert_ffn_hidden_size=2048,
    router_topk=8,
    expert_balance_factor=0.0,
    attention=Attention.mla,
    q_lora_rank=1536,
)
MIXTRAL_8X7B = GroupedQueryModel(
    name="Mixtral 8x7B",
    **_moe(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=32000,
        num_experts=8,
        expert_ffn_hidden_size=14336,
        router_topk=2,
    ),
)
OLMOE = GroupedQueryModel(
    name="OLMoE",
    **_moe(
        num_layers=16,
        hidden_size=2048,
        num_attention_heads=16,
        num_query_groups=16,
        vocab_size=50304,
        num_experts=64,
        expert_ffn_hidden_size=1024,
        router_topk=8,
    ),
)
QWEN3_30B = GroupedQueryModel(
    name="Qwen3-30B-A3B",
    **_moe(
        num_layers=48,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=4,
        qk_layernorm=True,
        vocab_size=151936,
        num_experts=128,
        expert_ffn_hidden_size=768,
        router_topk=8,
    ),
)
MOONLIGHT = ModelConfig(
    name="Moonlight-16B-A3B",
    num_layers=27,
    num_dense_layers=1,
    hidden_size=2048,
    ffn_hidden_size=11264,
    num_attention_heads=16,
    vocab_size=163840,
    num_experts=64,
    num_shared_experts=2,
    expert_ffn_hidden_size=1408,
    router_topk=6,
    expert_balance_factor=0.0,
    attention=Attention.mla,
)
DEEPSEEK_7B = _dense(
    "DeepSeek 7B",
    num_layers=30,
    hidden_size=4096,
    num_attention_heads=32,
    vocab_size=102400,
    relative_expert_size=1.0,
)
DEEPSEEK_67B = dataclasses.replace(
    DEEPSEEK_7B, name="DeepSeek 67B", num_layers=95, num_dense_layers=95, hidden_size=8192
)
# As NeMo's gpt3/7b_improved, with the vocabulary of GPT-2 in multiples of 128 x 4 ranks.
GPT_7B = _dense(
    "GPT-7B", num_layers=32, hidden_size=4096, ffn_hidden_size=10880, num_attention_heads=32, vocab_size=50688
)


def run_of(
    model: ModelConfig, *, global_batch_size: int, micro_batch_size: int = 1, cluster: str = "h100_80gb", **sizes: int
) -> PlanConfig:
    """A run in bf16 on sequences of 4096."""
    return PlanConfig(
        cluster=_cluster(cluster),
        model=model,
        parallel=ParallelConfig(**{f"{name}_size": size for name, size in sizes.items()}),
        precision=PrecisionConfig(dtype=Dtype.bf16),
        data=DataConfig(sequence_length=4096),
        train=TrainConfig(train_steps=1, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size),
    )


def _parameters() -> Iterator[Figure]:
    lite = _model("deepseek_v2_lite")
    for name, total, activated in (
        ("deepseekmoe_16b", "16.376", "2.829"),
        ("deepseekmoe_145b", "144.6", "22.2"),
        ("deepseek_v2_lite", "15.706", "2.661"),
        ("deepseek_v2", "235.741", "21.376"),
    ):
        model = _model(name)
        yield Figure(f"parameters of {name}, B", total, total_params(model) / 1e9)
        yield Figure(f"activated parameters of {name}, B", activated, activated_params(model) / 1e9)
    parts = params_by_part(lite)
    without = activated_params(lite) - parts["embedding"][1] - parts["routers"][1]
    yield Figure("the same without input embedding and routers", "2.448", without / 1e9)
    for model, total in ((DEEPSEEK_V3, "671.026"), (MIXTRAL_8X7B, "46.703"), (OLMOE, "6.919")):
        yield Figure(f"parameters of {model.name}, B", total, total_params(model) / 1e9)


def _paper_flops() -> Iterator[Figure]:
    rows = [
        (_model("deepseekmoe_16b"), 4096, "74.4"),
        (DEEPSEEK_7B, 4096, "183.5"),
        (DEEPSEEK_67B, 4096, "2057.5"),
        (_model("gshard_137b"), 4096, "572.7"),
        (_model("deepseekmoe_145b"), 4096, "585.6"),
        (_model("deepseekmoe_142b_half"), 4096, "374.6"),
        (_model("deepseekmoe_2b"), 2048, "4.3"),
        (_model("gshard_2b_x1_5"), 2048, "5.8"),
        (_model("dense_2b_x16"), 2048, "24.6"),
    ]
    for model, length, teraflops in rows:
        predicted = paper_flops_per_token(model, length) * length / 1e12
        yield Figure(f"TFLOPs of {model.name} per {length} tokens, as the paper counts", teraflops, predicted)


def _megatron_flops() -> Iterator[Figure]:
    for model, gigaflops in ((DEEPSEEK_V3, "249.74"), (QWEN3_30B, "23.01"), (MOONLIGHT, "17.16")):
        predicted = model_flops_per_token(model, 4096) / 1e9
        yield Figure(
            f"GFLOPs of {model.name} per token of 4096, as Megatron counts", gigaflops, predicted, (-1e-3, 1e-3)
        )
    flops = model_flops_per_token(MOONLIGHT, 4096)
    yield Figure(f"TFLOP/s of {MOONLIGHT.name} at 22,528 tokens/s", "386.6", 22528 * flops / 1e12, (-1e-3, 1e-3))
    yield Figure("and share of an H100's peak, %", "39.1", 100 * 22528 * flops / _cluster("h100_80gb").peak_flops)


def _memory() -> Iterator[Figure]:
    yield from _memory_of_v3()
    qwen = run_of(QWEN3_30B, global_batch_size=512, expert_model_parallel=16)
    qwen.precision.grad_reduce_in_fp32 = False
    (peak,) = memory_by_stage(qwen, 16)
    yield Figure("peak of Qwen3-30B, 16 H100, EP16, bf16 gradients, GiB", "62.166", peak.total / GIB, (-0.07, 0.07))
    gpt = run_of(GPT_7B, global_batch_size=512, tensor_model_parallel=4)
    yield Figure(
        "allocated by GPT-7B, 8 H100, TP4, bytes",
        "20,663,519,232",
        sum(static_bytes(gpt, 8, all_layers(GPT_7B))),
        (-0.1, 0.0),
    )


def _memory_of_v3() -> Iterator[Figure]:
    """Of an estimate by others, which fits 16 MoE layers without routers and what the first rank has in flight.

    No rank of the model has both: dense layers are on the first, and the second has two passes fewer in flight, 118.9
    GiB.
    """
    run = run_of(
        DEEPSEEK_V3,
        global_batch_size=2048,
        pipeline_model_parallel=4,
        virtual_pipeline_model_parallel=4,
        expert_model_parallel=64,
    )
    layers = Layers(dense=0, moe=16)
    weights, gradients, optimizer = static_bytes(run, 256, layers)
    in_flight = micro_batches_in_flight(4, 0, 4, 32)
    activations = 4096 * activation_bytes(run.model, run.recompute, [layers], in_flight)
    what = "of DeepSeek-V3, 256 GPUs, PP4 VP4 EP64"
    yield Figure(f"weights and gradients {what}, GiB", "36.4", (weights + gradients) / GIB, (-0.01, 0.01))
    yield Figure(f"optimizer {what}, GiB", "32.1", optimizer / GIB, (-0.01, 0.01))
    yield Figure(f"activations {what}, GiB", "131.0", activations / GIB, (-0.07, 0.07))


def _all_to_all() -> Iterator[Figure]:
    cluster, sent = _cluster("h100_80gb"), 4096 * 8 * 7168 * 2
    for ranks, microseconds in ((8, "1265"), (16, "5774")):
        predicted = seconds(cluster, Group(ranks, 1, cluster.gpus_per_node).all_to_all(sent)) * 1e6
        what = f"all-to-all of 4096 tokens of 7168 to 8 experts, EP{ranks}, H100, us"
        yield Figure(what, microseconds, predicted, (-0.15, 0.15), fitted=True)


def moonlight_run() -> PlanConfig:
    """Of the figure that `compute_efficiency` is fitted to."""
    return run_of(MOONLIGHT, global_batch_size=1024, micro_batch_size=2, expert_model_parallel=8)


def _tokens_per_second_per_gpu(run: PlanConfig, num_gpus: int) -> float:
    model = StepModel(run, num_gpus)
    tokens = run.train.global_batch_size * run.data.sequence_length
    return tokens / model.step(model.pipeline_s()).total / num_gpus


def _speed() -> Iterator[Figure]:
    """Without a tolerance but for the one that is fitted: others overlap communication and take other schedules."""
    what, speed = "tokens/s/GPU of Moonlight-16B-A3B, 16 H100, EP8", _tokens_per_second_per_gpu(moonlight_run(), 16)
    yield Figure(what, "22,528", speed, (-0.01, 0.01), fitted=True)
    v2 = run_of(
        _model("deepseek_v2"),
        cluster="h800_80gb",
        global_batch_size=9216,
        pipeline_model_parallel=16,
        expert_model_parallel=8,
    )
    hours = 1e12 / _tokens_per_second_per_gpu(v2, 512) / 3600 / 1000
    yield Figure("thousand H800 hours of DeepSeek-V2 a trillion tokens", "172.8", hours, tested=False)
    v3 = run_of(
        DEEPSEEK_V3,
        global_batch_size=8192,
        tensor_model_parallel=2,
        pipeline_model_parallel=8,
        virtual_pipeline_model_parallel=4,
        expert_model_parallel=64,
    )
    speed = _tokens_per_second_per_gpu(v3, 1024)
    yield Figure("tokens/s/GPU of DeepSeek-V3, 1024 H100, TP2 PP8 VP4 EP64", "1,061", speed, tested=False)
