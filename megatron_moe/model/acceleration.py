"""Recomputation, kernels, fp8 and overlap: from our options and what this rank has to megatron-core's fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.language_module import language_module
from megatron.core.transformer.moe import moe_utils
from megatron.core.utils import is_te_min_version

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.performance_rules import why_not_fused
from megatron_moe.config.schema import Attention, Config, Dispatcher, KernelsConfig, OverlapConfig, RecomputeModule
from megatron_moe.distributed.accelerators import has_fused_weight_gradient
from megatron_moe.model.layer_spec import use_transformer_engine
from megatron_moe.plan.recompute import describe_recompute

FUSIONS = tuple(option.name for option in fields(KernelsConfig) if option.name.endswith("_fusion"))
FP8_VERSION = "2.6.0"  # of Transformer Engine; below it, not all recipes and not with what is computed again
PACKAGES = {Dispatcher.deepep: "deep_ep", Dispatcher.hybridep: "deep_ep"}


@dataclass(frozen=True, kw_only=True)
class Accelerators:
    """What a rank has to compute with; by default a CPU only.

    Attributes:
        gpu: it has one.
        transformer_engine: and Transformer Engine.
        fp8: of a version that has all that we use in fp8.
        fused_weight_gradient: and Apex's kernel that accumulates weight gradients in place.
        fusions: options of `KernelsConfig` that there are kernels for.
        dispatchers: that are installed.
    """

    gpu: bool = False
    transformer_engine: bool = False
    fp8: bool = False
    fused_weight_gradient: bool = False
    fusions: frozenset[str] = frozenset()
    dispatchers: frozenset[Dispatcher] = frozenset({Dispatcher.alltoall})


CPU_ONLY = Accelerators()


def accelerators_of(device: torch.device) -> Accelerators:
    """What this rank has."""
    if device.type != "cuda":
        return CPU_ONLY
    kernels = {
        "moe_permute_fusion": getattr(moe_utils, "fused_permute_with_probs", None),
        "moe_router_fusion": getattr(moe_utils, "fused_topk_with_score_function", None),
        "apply_rope_fusion": rope_utils.fused_apply_rotary_pos_emb,
        "cross_entropy_loss_fusion": language_module.te_parallel_cross_entropy,
        "bias_activation_fusion": torch.compile,
    }
    with_te = use_transformer_engine()
    return Accelerators(
        gpu=True,
        transformer_engine=with_te,
        fp8=with_te and is_te_min_version(FP8_VERSION),
        fused_weight_gradient=has_fused_weight_gradient(),
        fusions=frozenset(name for name, kernel in kernels.items() if kernel is not None),
        dispatchers=frozenset(d for d in Dispatcher if d not in PACKAGES or find_spec(PACKAGES[d])),
    )


def check_accelerators(config: Config, accelerators: Accelerators) -> None:
    """Refuse what this rank cannot do.

    Raises:
        ConfigError: with one line per option.
    """
    problems = list(_problems(config, accelerators))
    if problems:
        raise ConfigError(*problems)


def _problems(config: Config, accelerators: Accelerators) -> Iterator[str]:
    here = "this rank has " + _describe(accelerators)
    kernels, overlap = config.kernels, config.overlap
    for name in FUSIONS:
        if getattr(kernels, name) and name not in accelerators.fusions:
            yield f"kernels.{name}=True: there is no kernel for it ({here}); set it to null or False"
    if kernels.dispatcher not in accelerators.dispatchers:
        yield (
            f"kernels.dispatcher={kernels.dispatcher.value}: needs a GPU and the package "
            f"{PACKAGES[kernels.dispatcher]} ({here}); kernels.dispatcher=alltoall"
        )
    if overlap.overlap_moe_expert_parallel_comm and not accelerators.gpu:
        yield f"overlap.overlap_moe_expert_parallel_comm=True: needs a GPU ({here}); set it to False"
    if config.precision.fp8 is not None and not accelerators.fp8:
        fp8 = config.precision.fp8.value
        yield f"precision.fp8={fp8}: needs Transformer Engine {FP8_VERSION} ({here}); precision=bf16"
    if not accelerators.transformer_engine:
        yield from _without_transformer_engine(config, here)


def _without_transformer_engine(config: Config, here: str) -> Iterator[str]:
    if config.overlap.delay_wgrad_compute:
        yield f"overlap.delay_wgrad_compute=True: needs Transformer Engine ({here}); set it to False"
    if RecomputeModule.moe_act in config.recompute.modules:
        yield f"recompute.modules: moe_act needs Transformer Engine's grouped experts ({here}); moe, or leave it out"


def _describe(accelerators: Accelerators) -> str:
    if not accelerators.gpu:
        return "no GPU"
    return "a GPU, with Transformer Engine" if accelerators.transformer_engine else "a GPU, no Transformer Engine"


def transformer_fields(config: Config, accelerators: Accelerators) -> dict[str, Any]:
    """Of megatron-core's `TransformerConfig`."""
    return {
        **_recompute(config),
        **_kernels(config, accelerators),
        **_fp8(config),
        "moe_grouped_gemm": accelerators.transformer_engine,
        "gradient_accumulation_fusion": accelerators.fused_weight_gradient,
        "moe_shared_expert_overlap": config.overlap.moe_shared_expert_overlap,
        "overlap_moe_expert_parallel_comm": config.overlap.overlap_moe_expert_parallel_comm,
        "delay_wgrad_compute": config.overlap.delay_wgrad_compute,
    }


def _recompute(config: Config) -> dict[str, Any]:
    recompute = config.recompute
    return {
        "recompute_granularity": recompute.granularity and recompute.granularity.value,
        "recompute_modules": [module.value for module in recompute.modules],
        "recompute_method": recompute.method and recompute.method.value,
        "recompute_num_layers": recompute.num_layers,
    }


def _kernels(config: Config, accelerators: Accelerators) -> dict[str, Any]:
    kernels = config.kernels
    dispatch: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if kernels.dispatcher is not Dispatcher.alltoall:
        dispatch = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": kernels.dispatcher.value}
    return {
        **dispatch,
        **{name: is_fused(config, name, accelerators) for name in FUSIONS},
        "cross_entropy_fusion_impl": "te",
    }


def is_fused(config: Config, name: str, accelerators: Accelerators) -> bool:
    """Whether a fusion of `KernelsConfig` is on."""
    asked = getattr(config.kernels, name)
    if asked is not None:
        return asked
    if name == "apply_rope_fusion" and config.model.attention is Attention.mla:
        return False  # experimental, says megatron-core 0.16.1
    return name in accelerators.fusions and accelerators.transformer_engine and why_not_fused(config, name) is None


def _fp8(config: Config) -> dict[str, Any]:
    precision = config.precision
    if precision.fp8 is None:
        return {}
    return {"fp8": precision.fp8.value, "fp8_recipe": precision.fp8_recipe.value}


def data_parallel_fields(config: Config, accelerators: Accelerators) -> dict[str, Any]:
    """Of megatron-core's `DistributedDataParallelConfig`."""
    return {
        "use_distributed_optimizer": True,
        "grad_reduce_in_fp32": config.precision.grad_reduce_in_fp32,
        "overlap_grad_reduce": overlaps_grad_reduce(config.overlap, accelerators),
        "overlap_param_gather": overlaps_param_gather(config.overlap, accelerators),
        "delay_wgrad_compute": config.overlap.delay_wgrad_compute,
    }


def overlaps_grad_reduce(overlap: OverlapConfig, accelerators: Accelerators) -> bool:
    """Whether gradients are reduced during the backward pass."""
    if overlap.overlap_grad_reduce is not None:
        return overlap.overlap_grad_reduce
    return accelerators.gpu or bool(overlap.overlap_param_gather)


def overlaps_param_gather(overlap: OverlapConfig, accelerators: Accelerators) -> bool:
    """Whether weights are gathered during the next forward pass."""
    if overlap.overlap_param_gather is not None:
        return overlap.overlap_param_gather
    return accelerators.gpu and overlap.overlap_grad_reduce is not False


def describe(config: Config, accelerators: Accelerators) -> str:
    """What of it is on, for the start of a run; empty: nothing."""
    overlap = config.overlap
    on = [name for name in FUSIONS if is_fused(config, name, accelerators)]
    if overlaps_grad_reduce(overlap, accelerators):
        on.append("overlap_grad_reduce")
    if overlaps_param_gather(overlap, accelerators):
        on.append("overlap_param_gather")
    names = ("moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm", "delay_wgrad_compute")
    on += [name for name in names if getattr(overlap, name)]
    if config.kernels.dispatcher is not Dispatcher.alltoall:
        on.append(f"dispatcher {config.kernels.dispatcher.value}")
    if config.recompute.granularity is not None:
        on.append(f"recompute {describe_recompute(config.recompute)}")
    return ", ".join(on)
