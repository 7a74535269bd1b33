"""What layers keep for the backward pass, in closed form. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.config.schema import (
    Attention,
    ModelConfig,
    RecomputeConfig,
    RecomputeGranularity,
    RecomputeMethod,
    RecomputeModule,
)
from megatron_moe.plan.attention import attention_size
from megatron_moe.plan.pipeline import Layers
from megatron_moe.plan.recompute import whole_layers


def activation_bytes(
    model: ModelConfig,
    recompute: RecomputeConfig,
    chunks: Sequence[Layers],
    in_flight: float,
    *,
    imbalance: float = 1.0,
) -> float:
    """Bytes of the chunks of a pipeline stage, a token of each micro batch, in bf16.

    What `in_flight` micro batches keep, and what the backward pass of one computes again at a time: the layers of a
    group, or what is left out of one layer.
    """
    dense, moe = (_layer_bytes(model, recompute, moe=kind, imbalance=imbalance) for kind in (False, True))
    sizes = {layers: _chunk_bytes(model, recompute, layers, dense, moe) for layers in set(chunks)}
    return in_flight * sum(sizes[layers][0] for layers in chunks) + max(again for _, again in sizes.values())


@dataclass(frozen=True)
class LayerBytes:
    """Of one layer, a token.

    Attributes:
        all: that its backward pass needs.
        dropped: of these, what selective recomputation computes again.
    """

    all: float
    dropped: float

    @property
    def kept(self) -> float:
        """The others."""
        return self.all - self.dropped


def _layer_bytes(model: ModelConfig, recompute: RecomputeConfig, *, moe: bool, imbalance: float) -> LayerBytes:
    everything = layer_activation_bytes(model, moe=moe, imbalance=imbalance)
    if recompute.granularity is not RecomputeGranularity.selective:
        return LayerBytes(everything, 0.0)
    dropped = _dropped_bytes(model, moe=moe, imbalance=imbalance)
    return LayerBytes(everything, sum(dropped.get(module, 0.0) for module in set(recompute.modules)))


def _chunk_bytes(
    model: ModelConfig, recompute: RecomputeConfig, layers: Layers, dense: LayerBytes, moe: LayerBytes
) -> tuple[float, float]:
    """What a chunk keeps of a micro batch, and what is computed again at a time."""
    whole = whole_layers(recompute, layers)
    kept = (layers.dense - whole.dense) * dense.kept + (layers.moe - whole.moe) * moe.kept
    if not whole.dense + whole.moe:
        return kept, max(dense.dropped * bool(layers.dense), moe.dropped * bool(layers.moe))
    group = recompute.num_layers if recompute.method is RecomputeMethod.uniform else 1
    an_input = 2 * model.hidden_size
    largest = max(dense.all * bool(whole.dense), moe.all * bool(whole.moe))
    return kept + (whole.dense + whole.moe) / group * an_input, group * largest - an_input


def layer_activation_bytes(model: ModelConfig, *, moe: bool, imbalance: float = 1.0) -> float:
    """Bytes that a layer keeps for the backward pass of one token, in bf16 and with nothing computed again."""
    always = attention_size(model).kept_bytes + 4 * model.hidden_size
    if not moe:
        return always + 6 * model.ffn_hidden_size
    return always + _routed_bytes(model, imbalance) + _shared_bytes(model)


def _routed_bytes(model: ModelConfig, imbalance: float) -> float:
    """Of what a token's experts are given and compute, and of the router."""
    hidden, width = model.hidden_size, model.expert_ffn_hidden_size
    return 2 * model.router_topk * (hidden + 3 * width) * imbalance + 12 * model.num_experts


def _shared_bytes(model: ModelConfig) -> int:
    return 6 * model.num_shared_experts * model.expert_ffn_hidden_size


def _dropped_bytes(model: ModelConfig, *, moe: bool, imbalance: float) -> dict[RecomputeModule, float]:
    """What a layer need not keep for a part that is computed again; its inputs are kept in any case.

    Norms are as with Transformer Engine, where those before multi-head attention, dense FFNs and up-projections belong
    to the matrix that follows: the first cannot be computed again, the others are with that matrix.
    """
    hidden, attention = model.hidden_size, attention_size(model)
    own_norm = 2 * hidden * (model.attention is Attention.mla)
    dropped: dict[RecomputeModule, float] = {
        RecomputeModule.core_attn: 4 * model.num_attention_heads,  # of the softmax
        RecomputeModule.mla_up_proj: attention.up_bytes,
        RecomputeModule.layernorm: own_norm + 2 * hidden * moe,
    }
    if not moe:
        return dropped | {RecomputeModule.mlp: 2 * hidden + 6 * model.ffn_hidden_size}
    return dropped | {
        RecomputeModule.moe: _routed_bytes(model, imbalance) + _shared_bytes(model),
        RecomputeModule.shared_experts: _shared_bytes(model),
        RecomputeModule.moe_act: 2 * model.router_topk * model.expert_ffn_hidden_size * imbalance,
    }
