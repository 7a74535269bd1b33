"""How long a step takes, and its time line. Pure; imports no torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_moe.config.cluster import PlanConfig
from megatron_moe.plan.flops import ForwardFlops, forward_flops
from megatron_moe.plan.memory import most_micro_batches, optimizer_share, state_bytes, tokens_of_rank
from megatron_moe.plan.params import rank_params
from megatron_moe.plan.pipeline import Layers, chunks_by_stage
from megatron_moe.plan.recompute import NOTHING, Again, computed_again, flops_of_parts
from megatron_moe.plan.schedule import Kind, Pass, Timeline, one_forward_one_backward, simulate, zero_bubble
from megatron_moe.plan.traffic import (
    Groups,
    PassTraffic,
    data_parallel,
    groups_of,
    pass_traffic,
    seconds,
    stage_to_stage,
)

# Read: gradient, weight and two moments in fp32; written: these three and the weight in bf16.
OPTIMIZER_BYTES = 4 * 4 + 3 * 4 + 2


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass of one micro batch through the layers of a chunk, by what for.

    `recompute`: what is computed again. What this sends counts with the rest that is sent.
    """

    compute: float
    recompute: float
    overhead: float
    all_to_all: float
    tensor: float
    context: float

    @property
    def total(self) -> float:
        """All."""
        return self.compute + self.recompute + self.overhead + self.all_to_all + self.tensor + self.context


@dataclass(frozen=True)
class Step:
    """Seconds of a step.

    Attributes:
        pipeline: forward and backward passes of all micro batches, with what the slowest stage waits.
        gradients: reducing and scattering them, as far as computing does not hide it.
        weights: gathering them, likewise.
        optimizer: the update.
    """

    pipeline: float
    gradients: float
    weights: float
    optimizer: float

    @property
    def total(self) -> float:
        """All."""
        return self.pipeline + self.data_parallel + self.optimizer

    @property
    def data_parallel(self) -> float:
        """Sending gradients and weights."""
        return self.gradients + self.weights


def imbalance(config: PlanConfig) -> float:
    """Load of the fullest rank's experts over the mean; 1 where each rank has all experts."""
    return config.cluster.expert_imbalance if config.parallel.expert_model_parallel_size > 1 else 1.0


class StepModel:
    """Times of a layout on a cluster.

    Args:
        config: with a layout that fits `world_size` ranks, and the rates and efficiencies of the cluster.
        world_size: of all ranks.
    """

    def __init__(self, config: PlanConfig, world_size: int) -> None:
        self.config, self.cluster, self.world_size = config, config.cluster, world_size
        self.groups: Groups = groups_of(config, config.cluster, world_size)
        self.stages = config.parallel.pipeline_model_parallel_size
        self.virtual = config.parallel.virtual_pipeline_model_parallel_size
        self.micro_batches = most_micro_batches(config, world_size)
        self.chunks = chunks_by_stage(config.model, config.parallel)
        layers = [sum(chunks, Layers(0, 0)) for chunks in self.chunks]
        params = {layers: rank_params(config.model, config.parallel, layers) for layers in set(layers)}
        self.params = [params[of_stage] for of_stage in layers]
        self.expert_params = rank_params(config.model, config.parallel, Layers(0, 1)).experts  # of a MoE layer
        self.forward_flops = functools.cache(self._forward_flops)
        self.pass_time = functools.cache(self._pass_time)

    def _pass_time(self, layers: Layers, *, backward: bool) -> PassTime:
        """Of a chunk with these layers on the rank with the fullest experts; all others wait for it."""
        cluster, model = self.cluster, self.config.model
        again = computed_again(model, self.config.recompute, layers) if backward else NOTHING
        moe_again = again.whole.moe + again.routed_experts
        calls = (layers.dense + layers.moe) * (2 if backward else 1) + again.whole.dense + again.dense_ffns + moe_again
        traffic = self.pass_traffic(layers, backward=backward)
        return PassTime(
            compute=self._compute_s(self.forward_flops(layers), layers.moe, backward=backward),
            recompute=self._compute_s(self._flops_again(again), moe_again, backward=False),
            overhead=calls * cluster.layer_overhead_s,
            all_to_all=seconds(cluster, traffic.all_to_all) * (1 - cluster.all_to_all_overlap),
            tensor=seconds(cluster, traffic.tensor),
            context=seconds(cluster, traffic.context),
        )

    def _forward_flops(self, layers: Layers) -> ForwardFlops:
        return forward_flops(self.config.model, layers, self.config.data.sequence_length)

    def _flops_again(self, again: Again) -> ForwardFlops:
        parts = flops_of_parts(self.config.model, again, self.config.data.sequence_length)
        whole = self.forward_flops(again.whole)
        return ForwardFlops(routed=whole.routed + parts.routed, rest=whole.rest + parts.rest)

    def _compute_s(self, flops: ForwardFlops, moe_layers: int, *, backward: bool) -> float:
        """Of a forward pass's FLOPs, twice for a backward pass."""
        cluster = self.cluster
        rate = cluster.peak_flops * cluster.compute_efficiency / (tokens_of_rank(self.config) * (2 if backward else 1))
        routed = imbalance(self.config) * flops.routed / rate
        return flops.rest / rate + max(routed, self._expert_weights_s(moe_layers, backward=backward))

    def _expert_weights_s(self, moe_layers: int, *, backward: bool) -> float:
        """Of reading the routed experts' weights and, backward, adding to their gradients: the least that they take.

        Other matrices meet enough tokens.
        """
        state = state_bytes(self.config.precision)
        moved = moe_layers * self.expert_params * (state.weight + (2 * state.gradient if backward else 0))
        return moved / (self.cluster.memory_bandwidth * self.cluster.memory_efficiency)

    def pass_traffic(self, layers: Layers, *, backward: bool) -> PassTraffic:
        """Of the same rank."""
        return pass_traffic(self.config, self.groups, layers, backward=backward, imbalance=imbalance(self.config))

    def stage_seconds(self, stage: int) -> float:
        """Of a micro batch's passes, forward and backward, through all chunks of a stage."""
        return sum(
            self.pass_time(layers, backward=backward).total
            for layers in self.chunks[stage]
            for backward in (False, True)
        )

    def transfer_s(self) -> float:
        """From a stage to the next, of a micro batch."""
        return seconds(self.cluster, stage_to_stage(self.config, self.groups))

    def pipeline_s(self) -> float:
        """Of all passes, in closed form: the first micro batch's through all stages, and a period for each further one.

        With equal stages this is 1F1B's (p - 1) / m and the interleaved schedule's (p - 1) / (v m) of idle time.
        """
        stages = [self.stage_seconds(stage) for stage in range(self.stages)]
        if self.virtual > 1:
            others = (sum(stages) - max(stages)) / self.virtual
            return self.micro_batches * max(stages) + others + 2 * (self.stages - 1) * self.transfer_s()
        transfers = [2 * (self.stages - 1 - stage) * self.transfer_s() for stage in range(self.stages)]
        # A stage's forward pass waits until the micro batch before those that it keeps in flight has come back.
        rounds = [(sum(stages[stage:]) + transfers[stage]) / (self.stages - stage) for stage in range(self.stages)]
        return sum(stages) + transfers[0] + (self.micro_batches - 1) * max(*stages, *rounds)

    def timeline(self, *, split_backward: bool = False) -> Timeline:
        """Of all passes, simulated.

        Args:
            split_backward: half of what a backward pass computes, for the weights, is a pass of its own: zero-bubble.

        Raises:
            ValueError: zero-bubble with several virtual stages.
        """
        if split_backward and self.virtual > 1:
            raise ValueError("the zero-bubble schedule has one virtual stage")

        def duration(stage: int, task: Pass) -> float:
            time = self.pass_time(self.chunks[stage][task.chunk], backward=task.kind is not Kind.forward)
            if not split_backward or task.kind is Kind.forward:
                return time.total
            return time.compute / 2 if task.kind is Kind.weight else time.total - time.compute / 2

        if split_backward:
            orders = zero_bubble(self.stages, self.micro_batches)
        else:
            orders = one_forward_one_backward(self.stages, self.virtual, self.micro_batches)
        return simulate(orders, duration, transfer_s=self.transfer_s())

    def step(self, pipeline_s: float) -> Step:
        """With what follows the passes, on the slowest stage."""
        cluster, params = self.cluster, set(self.params)
        sent = max(seconds(cluster, data_parallel(self.config, self.groups, count)) for count in params)
        sent *= 1 - cluster.data_parallel_overlap
        state = state_bytes(self.config.precision)
        of_gradients = state.gradient / (state.gradient + state.weight)
        updated = max(optimizer_share(self.config, self.world_size, count) for count in params)
        return Step(
            pipeline=pipeline_s,
            gradients=sent * of_gradients,
            weights=sent * (1 - of_gradients),
            optimizer=OPTIMIZER_BYTES * updated / (cluster.memory_bandwidth * cluster.memory_efficiency),
        )
