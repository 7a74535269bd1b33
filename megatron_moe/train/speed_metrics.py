"""How fast the steps are, where their time goes and how much they send, over all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.config.schema import Config, Dtype
from megatron_moe.distributed.context import DistributedContext
from megatron_moe.metrics.timers import Timers
from megatron_moe.plan.flops import model_flops_per_token
from megatron_moe.plan.hardware import peak_flops

PARTS = ("forward_backward", "all_to_all", "optimizer", "data_wait")


def speed_metrics(
    config: Config, context: DistributedContext, timers: Timers, *, tokens_per_second: float, step_time_s: float
) -> dict[str, Any]:
    """Rates, and seconds a step of each of PARTS; on all ranks, as it reduces.

    Args:
        config: of the run.
        context: of this rank.
        timers: of this rank's steps, which begin anew.
        tokens_per_second: of all ranks.
        step_time_s: mean.

    Returns:
        Metrics by name; MFU only where the device's peak in bf16 is known, and the run's precision is bf16. What is
        sent is of the last step: between all ranks together, by the forward and the backward pass.
    """
    per_gpu = tokens_per_second / context.world_size
    flops = per_gpu * model_flops_per_token(config.model, config.data.sequence_length)
    peak = device_peak_flops(config, context.device)
    return {
        "speed/tokens_per_second": tokens_per_second,
        "speed/step_time_s": step_time_s,
        "speed/tokens_per_second_per_gpu": per_gpu,
        "speed/tflops_per_gpu": flops / 1e12,
        **({} if peak is None else {"speed/mfu": flops / peak}),
        **_times(timers.report(), context.device),
        **({"moe/all_to_all_gib": _sent_gib(timers, context.device)} if config.model.num_experts else {}),
    }


def device_peak_flops(config: Config, device: torch.device) -> float | None:
    """FLOP/s of this rank's GPU in the run's precision, which MFU is a share of; None: not known."""
    if device.type != "cuda" or config.precision.dtype is not Dtype.bf16:
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def _times(seconds: dict[str, float], device: torch.device) -> dict[str, float]:
    """Of the slowest rank in each part, its waiting for other ranks included."""
    mine = {part: seconds.get(part, 0.0) for part in PARTS}
    mine["forward_backward"] -= mine["data_wait"]  # which lies in it
    slowest = torch.tensor(list(mine.values()), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {f"time/{part}_s": time for part, time in zip(PARTS, slowest.tolist(), strict=True)}


def _sent_gib(timers: Timers, device: torch.device) -> float:
    sent = torch.tensor(timers.sent_bytes, dtype=torch.float64, device=device)
    dist.all_reduce(sent)
    return sent.item() / 2**30
