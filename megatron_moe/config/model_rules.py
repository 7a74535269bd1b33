"""Rules between the options of a model. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.derived import experts_within_reach
from megatron_moe.config.rules import divides
from megatron_moe.config.schema import Attention, Config, ForcedRouting, ModelConfig, Routing


def model_problems(config: Config) -> Iterator[str]:
    """What is wrong with a model, one line each."""
    model = config.model
    rotary = "kv_channels" if model.attention is Attention.mha else "qk_pos_emb_head_dim"
    if getattr(model, rotary) % 2:
        yield f"model.{rotary}={getattr(model, rotary)}: must be even, rotary embedding turns pairs"
    if model.yarn.rotary_scaling_factor is not None and model.attention is Attention.mha:
        yield (
            f"model.yarn.rotary_scaling_factor={model.yarn.rotary_scaling_factor}: only model.attention=mla has YaRN; "
            "set it to null"
        )
    if model.num_dense_layers > model.num_layers:
        yield f"model.num_dense_layers={model.num_dense_layers}: there are only model.num_layers={model.num_layers}"
    elif model.num_experts == 0:
        yield from _dense_model(config)
    elif model.num_dense_layers == model.num_layers:
        yield (
            f"model.num_dense_layers={model.num_dense_layers}: must be below model.num_layers={model.num_layers}, "
            "or no layer has experts; a dense model has model.num_experts=0"
        )
    else:
        yield from _experts(config)
        yield from _forced_routing(config)
        yield from _device_groups(config)


def _dense_model(config: Config) -> Iterator[str]:
    model = config.model
    if model.num_dense_layers < model.num_layers:
        yield (
            f"model.num_experts=0: needs model.num_dense_layers={model.num_layers} (all layers of a dense model), "
            f"not {model.num_dense_layers}"
        )
        return
    names = (
        "num_shared_experts router_topk expert_balance_factor device_balance_factor communication_balance_factor "
        "device_limit device_capacity_factor"
    )
    if model.forced_routing is not None:
        yield f"model.forced_routing={model.forced_routing.value}: must be null with model.num_experts=0"
    for name in names.split():
        if value := getattr(model, name):
            default = "null" if name in ("device_limit", "device_capacity_factor") else 0
            yield f"model.{name}={value}: must be {default} with model.num_experts=0"
    if model.routing is not Routing.topk:
        yield f"model.routing={model.routing.value}: must be {Routing.topk.value} with model.num_experts=0"
    if config.parallel.expert_model_parallel_size > 1:
        yield (
            f"parallel.expert_model_parallel_size={config.parallel.expert_model_parallel_size}: must be 1, "
            "no layer has experts"
        )


def _experts(config: Config) -> Iterator[str]:
    model = config.model
    if not 1 <= model.router_topk <= model.num_experts:
        yield f"model.router_topk={model.router_topk}: must be from 1 to model.num_experts={model.num_experts}"
    if model.routing is Routing.hash:
        if model.router_topk != 1:
            yield f"model.router_topk={model.router_topk}: model.routing=hash sends a token to 1 expert"
        if model.routed_scaling_factor != 1:
            yield f"model.routed_scaling_factor={model.routed_scaling_factor}: model.routing=hash has a gate of 1"
        names = (
            "expert_balance_factor device_balance_factor communication_balance_factor device_limit "
            "device_capacity_factor"
        )
        for name in names.split():
            if value := getattr(model, name):
                yield f"model.{name}={value}: model.routing=hash has no affinities to balance, limit or drop by"


def _forced_routing(config: Config) -> Iterator[str]:
    forced = config.model.forced_routing
    if forced is not None and config.model.routing is Routing.hash:
        yield f"model.forced_routing={forced.value}: model.routing=hash is forced already; model.routing=topk"
    if forced is ForcedRouting.skewed and config.parallel.expert_model_parallel_size == 1:
        yield (
            "model.forced_routing=skewed: needs parallel.expert_model_parallel_size of at least 2; one rank has all "
            "the load in any case"
        )


def _device_groups(config: Config) -> Iterator[str]:
    model = config.model
    if model.num_device_groups is not None:
        yield from divides(config, "model.num_device_groups", "model.num_experts")
    if model.communication_balance_factor and model.device_limit is None:
        yield (
            f"model.communication_balance_factor={model.communication_balance_factor}: needs model.device_limit, "
            "the number of devices that it is relative to"
        )
    for name in ("device_limit", "device_capacity_factor"):
        if getattr(model, name) is not None and (model.num_device_groups or 1) < 2:
            yield (
                f"model.{name}={getattr(model, name)}: needs model.num_device_groups of at least 2, so that the model "
                "is the same in every layout"
            )
            return
    if model.device_limit is not None:
        yield from _device_limit(model)
    if model.device_capacity_factor is not None and config.parallel.context_parallel_size > 1:
        yield (
            f"model.device_capacity_factor={model.device_capacity_factor}: not with "
            f"parallel.context_parallel_size={config.parallel.context_parallel_size}, whose ranks would each drop by "
            "their own part of a sequence; set it to null"
        )


def _device_limit(model: ModelConfig) -> Iterator[str]:
    limit, groups = model.device_limit, model.num_device_groups
    within = experts_within_reach(model)
    if limit > groups:
        yield f"model.device_limit={limit}: there are only model.num_device_groups={groups}"
    elif within < model.router_topk:
        yield (
            f"model.device_limit={limit}: {limit} of {groups} device groups hold {within} experts, fewer than "
            f"model.router_topk={model.router_topk}"
        )
