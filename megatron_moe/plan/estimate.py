"""What a run needs and how long it takes: everything that the plan knows, together. Pure; imports no torch."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from functools import reduce
from operator import add

from megatron_moe.config.cluster import ClusterConfig, PlanConfig
from megatron_moe.config.derived import num_chunks, samples_before
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Attention, DataConfig, DataKind, KernelsConfig, OverlapConfig
from megatron_moe.config.validate import validate
from megatron_moe.plan.flops import model_flops_per_token, paper_flops_per_token
from megatron_moe.plan.memory import StageMemory, memory_by_stage
from megatron_moe.plan.params import RankParams, params_by_part, total_params
from megatron_moe.plan.pipeline import Layers
from megatron_moe.plan.schedule import Timeline, bubble
from megatron_moe.plan.step_time import Step, StepModel, imbalance
from megatron_moe.plan.traffic import Traffic, data_parallel, stage_to_stage

CHECKPOINT_BYTES = 2 + 12  # a parameter: bf16, and in fp32 the optimizer's copy and two moments
SHARES = ("compute_efficiency", "memory_efficiency", "intra_node_efficiency", "inter_node_efficiency", "usable_memory")
OVERLAPS = ("all_to_all_overlap", "data_parallel_overlap")
POSITIVE = (
    "gpus_per_node peak_flops memory_bytes memory_bandwidth intra_node_bandwidth inter_node_bandwidth "
    "storage_bandwidth gpu_mtbf_hours"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's size, the seconds it takes, and the seconds from one to the next that lose the least time."""

    size: float
    seconds: float
    interval: float


@dataclass(frozen=True)
class Plan:
    """All estimates of a run, in bytes, seconds, FLOPs and GPUs.

    Attributes:
        num_gpus: of the cluster.
        params: total and activated, by part of the model.
        rank_params: of a rank of each stage.
        flops_per_token: as Megatron-LM counts them.
        paper_flops_per_token: as the DeepSeekMoE paper does; None for latent attention, which it does not count.
        memory: of the fullest rank of each stage.
        memory_limit: usable bytes of a GPU.
        traffic: what a rank sends in a step, of the stage that sends most, by what for.
        busy: seconds in a step of the slowest stage's passes, by what for.
        bubble: idle time while the passes last, over the busy time, of the slowest stage.
        zero_bubble: the same idle time if gradients of weights waited (ZB-H1, which megatron-core does not have); None
            where there is one stage, or several virtual ones.
        step: its seconds.
        timeline: of the passes of each stage.
        tokens: of the whole run.
        tokens_per_second_per_gpu: mean.
        mfu: FLOPs over the peak.
        checkpoint: of the run.
    """

    num_gpus: int
    params: dict[str, tuple[int, int]]
    rank_params: list[RankParams]
    flops_per_token: float
    paper_flops_per_token: float | None
    memory: list[StageMemory]
    memory_limit: float
    traffic: dict[str, Traffic]
    busy: dict[str, float]
    bubble: float
    zero_bubble: float | None
    step: Step
    timeline: Timeline
    tokens: float
    tokens_per_second_per_gpu: float
    mfu: float
    checkpoint: Checkpoint

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return max(stage.total for stage in self.memory) <= self.memory_limit

    @property
    def gpu_hours(self) -> float:
        """Of the whole run, without pauses."""
        return self.tokens / self.tokens_per_second_per_gpu / 3600

    @property
    def days(self) -> float:
        """Of the whole run, without pauses."""
        return self.gpu_hours / self.num_gpus / 24


def checked(config: PlanConfig) -> PlanConfig:
    """The configuration without its data, whose files need not be here.

    Raises:
        ConfigError: with one line for each problem of the cluster.
    """
    if problems := _cluster_problems(config):
        raise ConfigError(*problems)
    config = copy.copy(config)
    config.data = DataConfig(kind=DataKind.mock, sequence_length=config.data.sequence_length)
    return config


def _cluster_problems(config: PlanConfig) -> list[str]:
    cluster = config.cluster
    ranges = {
        "must be positive": (POSITIVE.split(), lambda value: value > 0),
        "must be above 0 and at most 1": (SHARES, lambda value: 0 < value <= 1),
        "must not be negative": (("layer_overhead_s",), lambda value: value >= 0),
        "must be from 0 to 1": (OVERLAPS, lambda value: 0 <= value <= 1),
        "must be at least 1": (("num_gpus", "expert_imbalance"), lambda value: value >= 1),
    }
    problems = [
        f"cluster.{name}={getattr(cluster, name)}: {rule}"
        for rule, (names, holds) in ranges.items()
        for name in names
        if getattr(cluster, name) is not None and not holds(getattr(cluster, name))
    ]
    if config.precision.dtype is not cluster.dtype:
        problems.append(
            f"precision.dtype={config.precision.dtype.value}: must be {cluster.dtype.value}, which the rates of "
            f"cluster={cluster.name} are of; add precision={cluster.dtype.value}"
        )
    num_gpus = cluster.num_gpus or 1
    if not problems and num_gpus > cluster.gpus_per_node and num_gpus % cluster.gpus_per_node:
        problems.append(
            f"cluster.num_gpus={num_gpus}: must be a multiple of cluster.gpus_per_node={cluster.gpus_per_node}, or less"
        )
    return problems


def estimate(config: PlanConfig) -> Plan:
    """Of a checked configuration, on as many GPUs as the cluster has, or the layout needs.

    Raises:
        ConfigError: with one line for each rule of a run that is broken.
    """
    num_gpus = validate(config, config.cluster.num_gpus)
    model, length, cluster = config.model, config.data.sequence_length, config.cluster
    times = StepModel(config, num_gpus)
    timeline = times.timeline()
    step = times.step(max(slots[-1].stop for slots in timeline))
    slowest = max(range(times.stages), key=times.stage_seconds)
    has_zero_bubble = times.stages > 1 and times.virtual == 1
    flops = model_flops_per_token(model, length)
    speed = config.train.global_batch_size * length / step.total / num_gpus
    return Plan(
        num_gpus=num_gpus,
        params=params_by_part(model),
        rank_params=times.params,
        flops_per_token=flops,
        paper_flops_per_token=paper_flops_per_token(model, length) if model.attention is Attention.mha else None,
        memory=memory_by_stage(config, num_gpus, imbalance=imbalance(config)),
        memory_limit=memory_limit(cluster),
        traffic=_traffic(times),
        busy=_busy(times, slowest),
        bubble=bubble(timeline)[slowest],
        zero_bubble=bubble(times.timeline(split_backward=True))[slowest] if has_zero_bubble else None,
        step=step,
        timeline=timeline,
        tokens=samples_before(config, config.train.train_steps) * length,
        tokens_per_second_per_gpu=speed,
        mfu=speed * flops / cluster.peak_flops,
        checkpoint=_checkpoint(total_params(model), cluster, num_gpus),
    )


def not_estimated(config: PlanConfig) -> list[str]:
    """Options that are not as without, and that no estimate depends on."""
    groups = {"kernels": (config.kernels, KernelsConfig()), "overlap": (config.overlap, OverlapConfig())}
    options = [
        f"{group}.{name}"
        for group, (given, plain) in groups.items()
        for name, value in vars(given).items()
        if value != getattr(plain, name)
    ]
    return [*options, "precision.fp8"] if config.precision.fp8 else options


def memory_limit(cluster: ClusterConfig) -> float:
    """Usable bytes of a GPU."""
    return cluster.memory_bytes * cluster.usable_memory


def _busy(times: StepModel, stage: int) -> dict[str, float]:
    passes = [times.pass_time(layers, backward=kind) for layers in times.chunks[stage] for kind in (False, True)]
    names = [field.name for field in dataclasses.fields(passes[0])]
    return {name: times.micro_batches * sum(getattr(time, name) for time in passes) for name in names}


def _traffic(times: StepModel) -> dict[str, Traffic]:
    """By what for, each of the stage that sends most."""
    stages = range(times.stages)
    by_stage = [_pass_traffic(times, stage) for stage in stages]
    sent = {name: max((traffic[name] for traffic in by_stage), key=lambda t: t.total) for name in by_stage[0]}
    data = [data_parallel(times.config, times.groups, params) for params in times.params]
    boundaries = 2 * (num_chunks(times.config.parallel) - 1) / times.stages
    return {
        **sent,
        "data": max(data, key=lambda traffic: traffic.total),
        "pipeline": stage_to_stage(times.config, times.groups) * (times.micro_batches * boundaries),
    }


def _pass_traffic(times: StepModel, stage: int) -> dict[str, Traffic]:
    def of(layers: Layers, backward: bool) -> dict[str, Traffic]:
        return vars(times.pass_traffic(layers, backward=backward))

    passes = [of(layers, backward) for layers in times.chunks[stage] for backward in (False, True)]
    return {name: reduce(add, (one[name] for one in passes)) * times.micro_batches for name in passes[0]}


def _checkpoint(params: int, cluster: ClusterConfig, num_gpus: int) -> Checkpoint:
    """Source of the interval: Young, 1974, and Daly, 2006."""
    nodes = math.ceil(num_gpus / cluster.gpus_per_node)
    size = CHECKPOINT_BYTES * params
    took = size / (cluster.storage_bandwidth * nodes)
    failure_s = cluster.gpu_mtbf_hours * 3600 / num_gpus
    return Checkpoint(size, took, math.sqrt(2 * took * failure_s))


@dataclass(frozen=True)
class Formula:
    """How an estimate comes about, and which inputs of the cluster it rests on."""

    text: str
    inputs: tuple[str, ...] = ()


RATES = ("compute_efficiency", "layer_overhead_s", "intra_node_efficiency", "inter_node_efficiency", "expert_imbalance")
ALL_RATES = (*RATES, "memory_efficiency", "all_to_all_overlap", "data_parallel_overlap")
FORMULAS = {
    "parameters": Formula("sizes of all tensors; on a rank cut over TP, routed experts over EP x ETP"),
    "FLOPs per token": Formula("6 x the matrices a token meets + causal attention, no router; or as the paper counts"),
    "weights": Formula("2 bytes (fp32: 4) a parameter of the rank"),
    "gradients": Formula("4 bytes a parameter of the rank; 2 with grad_reduce_in_fp32=false"),
    "optimizer": Formula("12 bytes (fp32: 8) a parameter of the rank, shared over its replicas"),
    "activations": Formula(
        "what each layer's backward pass needs and does not recompute x micro batches in flight + what one recomputes",
        ("expert_imbalance",),
    ),
    "logits": Formula("6 bytes (fp32: 12) a token and entry of the vocabulary, on the last stage"),
    "dispatch": Formula("8 bytes (fp32: 16) x top-k x hidden a token", ("expert_imbalance",)),
    "limit": Formula("memory of the card x usable_memory", ("usable_memory",)),
    "all_to_all": Formula(
        "4 a layer and micro batch (recomputed: 6): 2 bytes (fp32: 4) x top-k x hidden a token", ("expert_imbalance",)
    ),
    "tensor": Formula("inputs of blocks gathered, outputs scattered, forward, backward and recomputed"),
    "context": Formula("keys and values passed round, backward with their gradients, and recomputed"),
    "data": Formula("gradients scattered, weights gathered: their bytes x (n - 1) / n a parameter"),
    "pipeline": Formula("2 bytes (fp32: 4) x hidden a token, forward and backward, from stage to stage"),
    "bubble": Formula("simulated; (p - 1) / (v m) where all stages take as long", RATES),
    "step time": Formula(
        "simulated passes of FLOPs, recomputed ones too, / reached peak + overhead + bytes / reached bandwidth; "
        "then the rest",
        ALL_RATES,
    ),
    "speed": Formula("tokens of a step / its time / GPUs; MFU: x FLOPs a token, none recomputed, / peak", ALL_RATES),
    "run": Formula("tokens / speed, without pauses", ALL_RATES),
    "checkpoint": Formula(
        "14 bytes a parameter; interval sqrt(2 x seconds of a save x mean time to failure)",
        ("storage_bandwidth", "gpu_mtbf_hours"),
    ),
    "not estimated": Formula("planned as without them; what communication takes no time is in cluster.*_overlap"),
}
