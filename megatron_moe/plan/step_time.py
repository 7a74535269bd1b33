"""How long a step takes, and its time line. Pure; imports no torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_moe.config.derived import num_micro_batches
from megatron_moe.config.schema import ClusterConfig, Config
from megatron_moe.plan.flops import forward_flops
from megatron_moe.plan.memory import optimizer_share, tokens_of_rank
from megatron_moe.plan.params import rank_params
from megatron_moe.plan.pipeline import Layers, chunks_of_stage
from megatron_moe.plan.schedule import Kind, Pass, Timeline, one_forward_one_backward, simulate
from megatron_moe.plan.traffic import Groups, data_parallel, groups_of, pass_traffic, seconds, stage_to_stage

# Read: gradient, weight and two moments in fp32; written: these three and the weight in bf16.
OPTIMIZER_BYTES = 4 * 4 + 3 * 4 + 2


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass of one micro batch through the layers of a chunk, by what for."""

    compute: float
    all_to_all: float
    tensor: float
    context: float

    @property
    def total(self) -> float:
        """All."""
        return self.compute + self.all_to_all + self.tensor + self.context


@dataclass(frozen=True)
class Step:
    """Seconds of a step.

    Attributes:
        pipeline: forward and backward passes of all micro batches, with what the slowest stage waits.
        data_parallel: sending gradients and weights, as far as computing does not hide it.
        optimizer: the update.
    """

    pipeline: float
    data_parallel: float
    optimizer: float

    @property
    def total(self) -> float:
        """All."""
        return self.pipeline + self.data_parallel + self.optimizer


class StepModel:
    """Times of a layout on a cluster.

    Args:
        config: with a layout that fits `world_size` ranks.
        cluster: its rates and efficiencies.
        world_size: of all ranks.
        recompute: the backward pass computes the forward pass again.
    """

    def __init__(self, config: Config, cluster: ClusterConfig, world_size: int, *, recompute: bool = False) -> None:
        self.config, self.cluster, self.world_size, self.recompute = config, cluster, world_size, recompute
        self.groups: Groups = groups_of(config, cluster, world_size)
        self.stages = config.parallel.pipeline_model_parallel_size
        self.virtual = config.parallel.virtual_pipeline_model_parallel_size
        last = config.train.global_batch_size * config.train.train_steps
        self.micro_batches = num_micro_batches(config, world_size, last)
        self.chunks = [chunks_of_stage(config.model, config.parallel, stage) for stage in range(self.stages)]
        self.pass_time = functools.cache(self._pass_time)

    def _pass_time(self, layers: Layers, *, backward: bool) -> PassTime:
        """Of a chunk with these layers on the rank with the fullest experts; all others wait for it."""
        cluster, imbalance = self.cluster, self.cluster.expert_imbalance
        flops = forward_flops(self.config.model, layers, self.config.data.sequence_length)
        times = (2 + self.recompute) if backward else 1
        work = times * tokens_of_rank(self.config) * (flops.rest + imbalance * flops.routed)
        traffic = pass_traffic(self.config, self.groups, layers, backward=backward, imbalance=imbalance)
        return PassTime(
            compute=work / (cluster.peak_flops * cluster.compute_efficiency),
            all_to_all=seconds(cluster, traffic.all_to_all) * (1 - cluster.all_to_all_overlap),
            tensor=seconds(cluster, traffic.tensor),
            context=seconds(cluster, traffic.context),
        )

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
        """Of all passes, in closed form: the slowest stage's, and once those of the others, of one virtual stage.

        With equal stages this is 1F1B's (p - 1) / m and the interleaved schedule's (p - 1) / (v m) of idle time.
        """
        stages = [self.stage_seconds(stage) for stage in range(self.stages)]
        others = sum(stages) - max(stages)
        return self.micro_batches * max(stages) + others / self.virtual + 2 * (self.stages - 1) * self.transfer_s()

    def timeline(self) -> Timeline:
        """Of all passes, simulated."""

        def duration(stage: int, task: Pass) -> float:
            backward = task.kind is Kind.backward
            return self.pass_time(self.chunks[stage][task.chunk], backward=backward).total

        orders = one_forward_one_backward(self.stages, self.virtual, self.micro_batches)
        return simulate(orders, duration, transfer_s=self.transfer_s())

    def step(self, pipeline_s: float) -> Step:
        """With what follows the passes, on the slowest stage."""
        cluster, stages = self.cluster, range(self.stages)
        sent = max(seconds(cluster, data_parallel(self.config, self.groups, stage)) for stage in stages)
        params = [rank_params(self.config.model, self.config.parallel, stage) for stage in stages]
        updated = max(optimizer_share(self.config, self.world_size, count) for count in params)
        return Step(
            pipeline=pipeline_s,
            data_parallel=sent * (1 - cluster.data_parallel_overlap),
            optimizer=OPTIMIZER_BYTES * updated / (cluster.memory_bandwidth * cluster.memory_efficiency),
        )
