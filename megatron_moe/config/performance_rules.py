"""Rules between the options that make a run smaller or faster. Pure; imports no torch.

What megatron-core 0.16.1 would assert (transformer_config.py, `__post_init__`) is said here, in words, before anything
is built; and what it would silently compute wrongly. What depends on the machine: model/acceleration.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum

from megatron_moe.config.derived import expert_tensor_parallel_size, num_chunks
from megatron_moe.config.schema import (
    Attention,
    Config,
    Dispatcher,
    Dtype,
    Fp8Recipe,
    RecomputeGranularity,
    RecomputeMethod,
    RecomputeModule,
    Routing,
)

FULL, SELECTIVE = RecomputeGranularity.full, RecomputeGranularity.selective


def performance_problems(config: Config) -> Iterator[str]:
    """What is wrong with these options, one line each."""
    for rule in (_recompute, _precision, _dispatcher, _fusions, _overlap, _expert_parallel_overlap):
        yield from rule(config)


def _recompute(config: Config) -> Iterator[str]:
    recompute = config.recompute
    if recompute.granularity is not SELECTIVE and recompute.modules:
        yield f"recompute.modules={_names(recompute.modules)}: only recompute.granularity=selective reads them"
    if recompute.granularity is not FULL:
        for name in ("method", "num_layers"):
            if (value := getattr(recompute, name)) is not None:
                yield f"recompute.{name}={_text(value)}: recompute.granularity=full reads it only; see recompute=full"
    if recompute.granularity is SELECTIVE:
        yield from _recomputed_modules(config)
    elif recompute.granularity is FULL:
        yield from _recomputed_layers(config)


def _recomputed_modules(config: Config) -> Iterator[str]:
    model, modules = config.model, config.recompute.modules
    if not modules:
        choices = ", ".join(module.value for module in RecomputeModule)
        yield f"recompute.modules=[]: recompute.granularity=selective needs at least one of {choices}"
    absent = {
        RecomputeModule.mla_up_proj: model.attention is not Attention.mla and "model.attention=mla",
        RecomputeModule.moe_act: not model.num_experts and "model.num_experts above 0",
        RecomputeModule.shared_experts: not model.num_shared_experts and "model.num_shared_experts above 0",
    }
    for module in modules:
        if needed := absent.get(module):
            yield f"recompute.modules={_names(modules)}: {module.value} needs {needed}"
    inner = [m for m in (RecomputeModule.moe_act, RecomputeModule.shared_experts) if m in modules]
    if inner and RecomputeModule.moe in modules:
        yield f"recompute.modules={_names(modules)}: moe already computes {_names(inner)} again; leave out one"
    if RecomputeModule.shared_experts in modules and config.overlap.moe_shared_expert_overlap:
        yield (
            f"recompute.modules={_names(modules)}: shared_experts cannot be computed again with "
            "overlap.moe_shared_expert_overlap=True; leave out one"
        )


def _recomputed_layers(config: Config) -> Iterator[str]:
    recompute = config.recompute
    for name, example in (("method", "uniform"), ("num_layers", "1")):
        if getattr(recompute, name) is None:
            yield f"recompute.{name}=null: recompute.granularity=full needs it, such as {example}"
    if recompute.method is not RecomputeMethod.uniform or (recompute.num_layers or 1) == 1:
        return
    chunks = config.parallel.pipeline_layout or [config.model.num_layers]
    is_known = len(chunks) == num_chunks(config.parallel)
    if not is_known or any(layers % recompute.num_layers for layers in chunks):
        yield (
            f"recompute.num_layers={recompute.num_layers}: with recompute.method=uniform it must divide the layers of "
            "each pipeline stage" + (f" ({list(chunks)})" if is_known else ", given by parallel.pipeline_layout") + "; "
            "1 always does"
        )


def _precision(config: Config) -> Iterator[str]:
    precision = config.precision
    if precision.dtype is Dtype.fp32 and not precision.grad_reduce_in_fp32:
        yield (
            "precision.grad_reduce_in_fp32=False: gradients are summed in precision.dtype=fp32 in any case; "
            "only precision.dtype=bf16 has a choice"
        )
    if precision.fp8 is None:
        return
    if precision.dtype is not Dtype.bf16:
        yield f"precision.fp8={_text(precision.fp8)}: needs precision.dtype=bf16, for all that is not a multiplication"
    yield from _recomputed_in_fp8(config)
    # Transformer Engine refuses other operands.
    multiple = 32 if precision.fp8_recipe is Fp8Recipe.mxfp8 else 16
    for option, size in _matrix_sizes(config):
        if size % multiple:
            yield (
                f"precision.fp8_recipe={_text(precision.fp8_recipe)}: multiplies matrices with sides that are "
                f"multiples of {multiple}; {option} is {size} on a rank"
            )


def _recomputed_in_fp8(config: Config) -> Iterator[str]:
    """Transformer Engine recomputes by itself, and model/micro_batch.py does not learn of it."""
    model, recompute = config.model, config.recompute
    whole = recompute.granularity is FULL
    if config.parallel.pipeline_model_parallel_size == 1 or not (whole or RecomputeModule.moe in recompute.modules):
        return
    what = f"recompute.granularity={_text(recompute.granularity)} in a pipeline"
    per_batch = {
        "model.routing=hash": model.routing is Routing.hash,
        f"model.device_capacity_factor={model.device_capacity_factor}": model.device_capacity_factor is not None,
        "data.reset_position_ids=True": config.data.reset_position_ids and whole and model.attention is Attention.mla,
    }
    for option, is_on in per_batch.items():
        if is_on:
            yield (
                f"precision.fp8={_text(config.precision.fp8)}: with {what} a layer would be computed again by the "
                f"tokens of another micro batch, which {option} depends on; leave out one of the three"
            )


def _matrix_sizes(config: Config) -> Iterator[tuple[str, int]]:
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor_model_parallel_size
    tokens = config.data.sequence_length * config.train.micro_batch_size
    yield "model.hidden_size", model.hidden_size
    yield "data.sequence_length x train.micro_batch_size", tokens // (tensor * parallel.context_parallel_size)
    if model.num_dense_layers:
        yield "model.ffn_hidden_size", model.ffn_hidden_size // tensor
    if model.num_experts:
        yield "model.expert_ffn_hidden_size", model.expert_ffn_hidden_size // expert_tensor_parallel_size(parallel)


def _dispatcher(config: Config) -> Iterator[str]:
    dispatcher, parallel = config.kernels.dispatcher, config.parallel
    if dispatcher is Dispatcher.alltoall:
        return
    option = f"kernels.dispatcher={dispatcher.value}"
    if parallel.expert_model_parallel_size * expert_tensor_parallel_size(parallel) == 1:
        yield f"{option}: needs parallel.expert_model_parallel_size of at least 2; with all experts on a rank, alltoall"
    if config.precision.dtype is not Dtype.bf16:
        yield f"{option}: its kernels move bf16 only; precision=bf16, or kernels.dispatcher=alltoall"
    if config.overlap.moe_shared_expert_overlap:
        yield f"overlap.moe_shared_expert_overlap=True: not with {option}; only alltoall leaves room between its steps"


def _fusions(config: Config) -> Iterator[str]:
    for name in WHY_NOT_FUSED:
        if getattr(config.kernels, name) and (reason := why_not_fused(config, name)):
            yield f"kernels.{name}=True: {reason}; null or False"


def why_not_fused(config: Config, name: str) -> str | None:
    """Why a configuration cannot have a fusion of `KernelsConfig`; None: it can."""
    return WHY_NOT_FUSED[name](config) if name in WHY_NOT_FUSED else None


def _why_no_permute_fusion(config: Config) -> str | None:
    return None if config.model.num_experts else "model.num_experts=0 has no tokens to permute"


def _why_no_router_fusion(config: Config) -> str | None:
    """The fused kernel selects by itself, past model/router.py."""
    model = config.model
    if not model.num_experts or model.routing is Routing.hash:
        return "there is no top-k in this model"
    if model.device_limit is not None:
        return f"its kernel knows no model.device_limit={model.device_limit}"
    if model.forced_routing is not None:
        return f"its kernel knows no model.forced_routing={_text(model.forced_routing)}"
    return None


def _why_no_rope_fusion(config: Config) -> str | None:
    if config.data.reset_position_ids:
        return "its kernel has the same positions for all sequences, not data.reset_position_ids=True"
    if config.model.attention is Attention.mla and config.model.yarn.rotary_scaling_factor is None:
        return "model.attention=mla has a kernel for YaRN only (model.yarn.rotary_scaling_factor)"
    return None


def _why_no_cross_entropy_fusion(config: Config) -> str | None:
    return "its kernel sums in any order, not with train.deterministic=True" if config.train.deterministic else None


WHY_NOT_FUSED: dict[str, Callable[[Config], str | None]] = {
    "moe_permute_fusion": _why_no_permute_fusion,
    "moe_router_fusion": _why_no_router_fusion,
    "apply_rope_fusion": _why_no_rope_fusion,
    "cross_entropy_loss_fusion": _why_no_cross_entropy_fusion,
}


def _overlap(config: Config) -> Iterator[str]:
    overlap = config.overlap
    if overlap.overlap_param_gather and overlap.overlap_grad_reduce is False:
        yield "overlap.overlap_param_gather=True: works on the buckets of overlap.overlap_grad_reduce, which is False"
    if overlap.moe_shared_expert_overlap and not config.model.num_shared_experts:
        yield "overlap.moe_shared_expert_overlap=True: needs model.num_shared_experts above 0"
    if overlap.delay_wgrad_compute and not overlap.overlap_moe_expert_parallel_comm:
        yield "overlap.delay_wgrad_compute=True: needs overlap.overlap_moe_expert_parallel_comm=True"


def _expert_parallel_overlap(config: Config) -> Iterator[str]:
    parallel, overlap, modules = config.parallel, config.overlap, config.recompute.modules
    if not overlap.overlap_moe_expert_parallel_comm:
        return
    option = "overlap.overlap_moe_expert_parallel_comm=True"
    if parallel.expert_model_parallel_size == 1:
        yield f"{option}: needs parallel.expert_model_parallel_size of at least 2"
    if parallel.pipeline_model_parallel_size > 1 and parallel.virtual_pipeline_model_parallel_size == 1:
        yield f"{option}: needs parallel.virtual_pipeline_model_parallel_size of at least 2 in a pipeline"
    if config.precision.dtype is not Dtype.bf16:
        yield f"{option}: needs precision.dtype=bf16"
    if config.recompute.granularity is FULL:
        yield f"{option}: not with recompute.granularity=full, which computes a layer as a whole"
    if RecomputeModule.moe in modules:  # the schedule calls the parts of an MoE layer one by one
        yield f"{option}: not with recompute.modules={_names(modules)}; moe would not be recomputed"
    if overlap.moe_shared_expert_overlap:
        yield f"{option}: not with overlap.moe_shared_expert_overlap=True"


def _names(values: list[Enum]) -> str:
    return f"[{','.join(value.value for value in values)}]"


def _text(value: Enum | int) -> str:
    return str(value.value if isinstance(value, Enum) else value)
