"""What a person sees of a run before its first step, and the record of what it was started with."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core.distributed import DistributedDataParallel
from rich.console import Console
from rich.table import Table

from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.config.derived import (
    batch_size,
    num_device_groups,
    num_micro_batches,
    samples_before,
)
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Attention, Config, ModelConfig, Routing
from megatron_moe.data.sources import Datasets, source_uses
from megatron_moe.distributed import deterministic
from megatron_moe.distributed.context import DistributedContext
from megatron_moe.files import may_pass, write_json, write_whole
from megatron_moe.model.acceleration import accelerators_of, describe
from megatron_moe.model.layer_spec import use_transformer_engine
from megatron_moe.plan.flops import model_flops_per_token, paper_flops_per_token
from megatron_moe.plan.params import activated_params, total_params
from megatron_moe.plan.placement import describe_layout, placements
from megatron_moe.train.speed_metrics import device_peak_flops
from megatron_moe.train.step_metrics import peak_memory_gib

PACKAGES = ("torch", "megatron-core", "numpy", "hydra-core", "tokenizers", "wandb")


def write_run_files(config: Config, overrides: list[str], world_size: int, tokenizer: Path | None) -> None:
    """Leave the resolved configuration, the overrides, ranks, versions and the tokenizer in the run's folder.

    Raises:
        ConfigError: it cannot be written; what was there before stays.
    """
    folder = Path(config.run.dir)
    environment = {
        "overrides": overrides,
        "world_size": world_size,
        "git": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    try:
        if tokenizer is not None and tokenizer.resolve() != (folder / "tokenizer.json").resolve():
            write_whole(folder / "tokenizer.json", tokenizer.read_bytes())
        write_whole(folder / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False).encode())
        write_json(folder / "environment.json", environment)
    except OSError as error:
        if may_pass(error):
            raise
        raise ConfigError(f"run.dir={config.run.dir}: cannot be written: {error.strerror}") from error


def _git_revision() -> str | None:
    if shutil.which("git") is None:
        return None
    here = Path(__file__).parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None


def start_facts(config: Config, world_size: int, device: torch.device, datasets: Datasets) -> list[tuple[str, str]]:
    """What really applies, as (topic, text)."""
    model, parallel, train = config.model, config.parallel, config.train
    schedule = config.scheduler
    decay = ", ".join(f"{m:.0%}" for m in schedule.milestones)
    return [
        (
            "engine",
            f"megatron-core {importlib.metadata.version('megatron-core')}, torch {torch.__version__}, "
            f"{device.type} with {dist.get_backend()}, "
            + ("Transformer Engine" if use_transformer_engine() else "no Transformer Engine: local layers"),
        ),
        (
            "model",
            f"{model.name}: {total_params(model):,} parameters, {activated_params(model):,} activated; "
            f"{_experts_text(model)}, {model.attention.value}",
        ),
        ("batch", _batch_text(config, world_size)),
        ("data", _data_text(config, datasets)),
        *([("balance", _balance_text(config))] if model.num_experts and model.routing is Routing.topk else []),
        *([("ROUTING", _forced_text(model))] if model.forced_routing is not None else []),
        (
            "schedule",
            f"lr {config.optimizer.lr:g} after {schedule.warmup_steps:,} warm-up steps"
            + (" (not reached in this run)" if schedule.warmup_steps >= train.train_steps else "")
            + (f", x {schedule.decay_factor} at {decay} of {schedule.unit.value}" if decay else ", constant"),
        ),
        ("compute", _compute_text(config, device)),
        ("precision", _precision_text(config)),
        *([("tuning", performance)] if (performance := describe(config, accelerators_of(device))) else []),
        *([("kernels", deterministic.describe())] if deterministic.is_on() else []),
        ("layout", describe_layout(parallel, world_size)),
    ]


def _data_text(config: Config, datasets: Datasets) -> str:
    train = [
        f"{use.name} {100 * use.share:.4g} % ({use.epochs:.3g} epochs of {use.tokens:,} tokens)"
        for use in source_uses(config, datasets)
    ]
    held_out = [
        f"{part} {source.name} ({len(source.sequences):,} sequences)"
        for part in ("valid", "test")
        for source in getattr(datasets, part)
    ]
    data = config.data
    within = {
        "attention": data.reset_attention_mask,
        "positions": data.reset_position_ids,
        "loss": data.eod_mask_loss,
    }
    apart = [f"{', '.join(name for name, is_on in within.items() if is_on)} within documents"] * any(within.values())
    return "; ".join([*(train or ["random tokens"]), *held_out, *apart])


def _experts_text(model: ModelConfig) -> str:
    if model.num_experts == 0:
        return "dense"
    how = "one by hash" if model.routing is Routing.hash else f"top {model.router_topk}"
    return f"{model.num_experts} routed ({how}) + {model.num_shared_experts} shared experts"


def _batch_text(config: Config, world_size: int) -> str:
    train, length = config.train, config.data.sequence_length
    sequences = batch_size(config, 0)
    ramp = train.batch_ramp
    return (
        f"{sequences} x {length} = {sequences * length:,} tokens a step, "
        + (f"growing to {train.global_batch_size} x {length} over {ramp.tokens:.4g} tokens, " if ramp.start else "")
        + f"{samples_before(config, train.train_steps) * length:,} in {train.train_steps:,} steps; "
        f"{num_micro_batches(config, world_size, 0)} micro batches of {train.micro_batch_size} a rank"
    )


def _compute_text(config: Config, device: torch.device) -> str:
    """By what speed is reported, and the paper's own count, to compare with its tables."""
    model, length = config.model, config.data.sequence_length
    text = (
        f"{model_flops_per_token(model, length) / 1e9:,.4g} GFLOPs a token for FLOP/s and MFU (6 for each activated "
        "entry of a matrix, causal attention: Megatron-LM's convention)"
    )
    if (peak := device_peak_flops(config, device)) is not None:
        text += f"; MFU is of {peak / 1e12:,g} TFLOP/s, dense bf16 on {torch.cuda.get_device_name(device)}"
    if model.attention is Attention.mha:
        teraflops = paper_flops_per_token(model, length) * length / 1e12
        text += f"; {teraflops:,.4g} TFLOPs a sequence of {length}, as the DeepSeekMoE paper counts them"
    return text


def _precision_text(config: Config) -> str:
    precision = config.precision
    eight_bits = f", multiplications fp8 ({precision.fp8.value}, {precision.fp8_recipe.value})" if precision.fp8 else ""
    sums = "optimizer state and gradient sums fp32"
    if not precision.grad_reduce_in_fp32:
        sums = f"optimizer state fp32; gradient sums {precision.dtype.value}"
    return f"{precision.dtype.value}{eight_bits}; router logits, {sums}"


def _forced_text(model: ModelConfig) -> str:
    return f"FORCED, {model.forced_routing.value}: for measurements only, nothing of use is learned"


def _balance_text(config: Config) -> str:
    model, groups = config.model, num_device_groups(config.model, config.parallel)
    text = (
        f"expert factor {model.expert_balance_factor:g}; device factor {model.device_balance_factor:g} over "
        f"{groups} groups of {model.num_experts // groups} experts"
    )
    if model.device_limit is not None:
        text += (
            f"; a token goes to {model.device_limit} of them, communication factor "
            f"{model.communication_balance_factor:g}"
        )
    if model.device_capacity_factor is not None:
        text += (
            f"; beyond {model.device_capacity_factor:g} x the mean load of a group selections are dropped, but of "
            f"{model.undropped_fraction:.0%} of the sequences"
        )
    return text


def print_start(
    config: Config, context: DistributedContext, model: list[DistributedDataParallel], datasets: Datasets
) -> None:
    """Print the facts, the placement and each rank's memory; on all ranks, as it gathers."""
    here = (sum(p.numel() for chunk in model for p in chunk.parameters()), peak_memory_gib(context.device))
    everywhere: list[Any] = [None] * context.world_size
    dist.all_gather_object(everywhere, here)
    if not context.is_main:
        return
    console = Console(soft_wrap=True, highlight=False)
    for topic, text in start_facts(config, context.world_size, context.device, datasets):
        console.print(f"{topic:<10}{text}", markup=False)
    table = Table("ranks", "layers", "routed experts", "parameters a rank", "memory so far", box=None)
    for place in placements(config.model, config.parallel, context.world_size):
        parameters, memory = everywhere[place.ranks[0]]
        table.add_row(*place.describe(config.model), f"{parameters:,}", f"{memory:.2f} GiB")
    console.print(table)
