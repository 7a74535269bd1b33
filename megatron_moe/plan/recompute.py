"""What is computed again in the backward pass. Pure; imports no torch.

Source: megatron-core 0.16.1: transformer_block.py, `_checkpointed_forward`, and `recompute_modules` in
transformer_layer.py, attention.py, multi_latent_attention.py, moe_layer.py and experts.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.schema import (
    ModelConfig,
    RecomputeConfig,
    RecomputeGranularity,
    RecomputeMethod,
    RecomputeModule,
)
from megatron_moe.plan.attention import attention_size
from megatron_moe.plan.flops import ForwardFlops
from megatron_moe.plan.pipeline import Layers

NO_LAYERS = Layers(0, 0)


@dataclass(frozen=True)
class Again:
    """What of a chunk is computed again, in numbers of layers.

    Attributes:
        whole: layers.
        attention_cores: without projections.
        up_projections: of latent attention.
        dense_ffns: of layers without experts.
        routed_experts: of layers with experts, with router, dispatch and combine.
        shared_experts: of the same.
    """

    whole: Layers
    attention_cores: int = 0
    up_projections: int = 0
    dense_ffns: int = 0
    routed_experts: int = 0
    shared_experts: int = 0


NOTHING = Again(NO_LAYERS)


def computed_again(model: ModelConfig, recompute: RecomputeConfig, layers: Layers) -> Again:
    """Of a chunk. Norms and activations of experts (`layernorm`, `moe_act`) have no matrices: they take no time."""
    if recompute.granularity is not RecomputeGranularity.selective:
        return Again(whole=whole_layers(recompute, layers))
    has = {module: module in recompute.modules for module in RecomputeModule}
    shared = has[RecomputeModule.moe] or has[RecomputeModule.shared_experts]
    return Again(
        whole=NO_LAYERS,
        attention_cores=(layers.dense + layers.moe) * has[RecomputeModule.core_attn],
        up_projections=(layers.dense + layers.moe) * has[RecomputeModule.mla_up_proj],
        dense_ffns=layers.dense * has[RecomputeModule.mlp],
        routed_experts=layers.moe * has[RecomputeModule.moe],
        shared_experts=layers.moe * shared * bool(model.num_shared_experts),
    )


def whole_layers(recompute: RecomputeConfig, layers: Layers) -> Layers:
    """Those of a chunk that keep their inputs only: all, or with `block` the first."""
    if recompute.granularity is not RecomputeGranularity.full:
        return NO_LAYERS
    if recompute.method is RecomputeMethod.uniform:
        return Layers(layers.dense, layers.moe)
    dense = min(recompute.num_layers, layers.dense)
    return Layers(dense, min(recompute.num_layers - dense, layers.moe))


def flops_of_parts(model: ModelConfig, again: Again, sequence_length: int) -> ForwardFlops:
    """Of a forward pass through what is no whole layer, a token, as `forward_flops` counts."""
    attention = attention_size(model)
    ffn = 6 * model.hidden_size  # for each entry of its width
    expert = ffn * model.expert_ffn_hidden_size
    return ForwardFlops(
        routed=again.routed_experts * model.router_topk * expert,
        rest=again.attention_cores * 2 * model.num_attention_heads * sequence_length * attention.width
        + again.up_projections * 2 * attention.up
        + again.dense_ffns * ffn * model.ffn_hidden_size
        + again.shared_experts * model.num_shared_experts * expert,
    )


def describe_recompute(recompute: RecomputeConfig) -> str:
    """What is computed again, as text; "none"."""
    if recompute.granularity is None:
        return "none"
    what = [module.value for module in recompute.modules] or [f"{recompute.method.value} {recompute.num_layers}"]
    return f"{recompute.granularity.value} ({', '.join(what)})"
