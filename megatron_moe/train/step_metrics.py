"""The numbers of a logged step, over all ranks."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_moe.config.derived import data_parallel_size, num_device_groups
from megatron_moe.config.schema import Config
from megatron_moe.distributed.context import DistributedContext
from megatron_moe.metrics.routing import device_load, max_violation, relative
from megatron_moe.model.build import routers
from megatron_moe.model.router import BALANCE_LOSSES
from megatron_moe.train.step import StepResult


def step_metrics(
    config: Config, context: DistributedContext, model: list[DistributedDataParallel], result: StepResult
) -> dict[str, Any]:
    """The step's numbers over all ranks; on all ranks, as it reduces those of routing.

    Returns:
        Metrics by name; of routing only where there are experts. Balance losses are with their factors, summed over
        layers. `moe/expert_load` and `moe/device_load` are lists by MoE layer of the load over the mean.
    """
    return {
        "train/lm_loss": result.agreement.loss,
        "train/grad_norm": result.grad_norm,
        **(_routing_metrics(config, context, model, result) if config.model.num_experts else {}),
        "memory/peak_gib": _largest(peak_memory_gib(context.device), context.device),
    }


def _routing_metrics(
    config: Config, context: DistributedContext, model: list[DistributedDataParallel], result: StepResult
) -> dict[str, Any]:
    moe_layers = range(config.model.num_dense_layers, config.model.num_layers)
    tokens, losses, dropped = _routing_sums(config, model, moe_layers, context.device)
    for values in (tokens, losses, dropped):
        dist.all_reduce(values)
    replicas = data_parallel_size(config.parallel, context.world_size)
    losses = losses.sum(dim=0) / (replicas * result.num_micro_batches)
    devices = device_load(tokens, num_device_groups(config.model, config.parallel))
    violations = max_violation(tokens)
    return {
        **{f"train/{name}_balance_loss": loss for name, loss in zip(BALANCE_LOSSES, losses.tolist(), strict=True)},
        "moe/max_violation": violations.max().item(),
        "moe/max_device_violation": max_violation(devices).max().item(),
        "moe/dropped_fraction": (dropped.sum() / tokens.sum()).item(),
        **{
            f"moe/layer_{layer}/max_violation": violation
            for layer, violation in zip(moe_layers, violations.tolist(), strict=True)
        },
        "moe/expert_load": _rounded(relative(tokens)),
        "moe/device_load": _rounded(relative(devices)),
    }


def _rounded(loads: torch.Tensor) -> list[list[float]]:
    return [[round(load, 4) for load in layer] for layer in loads.tolist()]


def _routing_sums(
    config: Config, model: list[DistributedDataParallel], moe_layers: range, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's tokens per expert [layers, experts], balance losses [layers, 3] and dropped selections [layers]."""
    tokens = torch.zeros(len(moe_layers), config.model.num_experts, device=device)
    losses = torch.zeros(len(moe_layers), len(BALANCE_LOSSES), device=device)
    dropped = torch.zeros(len(moe_layers), device=device)
    for router in routers(model):
        row = router.layer_number - 1 - moe_layers.start
        tokens[row] = router.counters.tokens_per_expert
        losses[row] = router.counters.balance_losses
        dropped[row] = router.counters.dropped
    return tokens, losses, dropped


def peak_memory_gib(device: torch.device) -> float:
    """The most that tensors have taken of this rank's GPU, or the process of the host's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _largest(value: float, device: torch.device) -> float:
    """Over all ranks."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()
