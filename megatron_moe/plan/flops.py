"""Floating-point operations in closed form. Pure; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.schema import ModelConfig
from megatron_moe.plan.attention import attention_size
from megatron_moe.plan.params import multiplied_params
from megatron_moe.plan.pipeline import Layers, all_layers


def activated_ffn_ratio(model: ModelConfig) -> float:
    """FFN parameters that a token activates in a layer, over a standard FFN of 8 hidden_size^2 (the paper's 4.1.1).

    By the nominal `relative_expert_size` where the model has one, else by the real width; first dense layers count as
    the others do.
    """
    width = model.expert_ffn_hidden_size if model.num_experts else model.ffn_hidden_size
    size = model.relative_expert_size or width / (8 / 3 * model.hidden_size)
    return size * (model.router_topk + model.num_shared_experts if model.num_experts else 1)


def paper_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of training on one token as the DeepSeekMoE paper counts them; for multi-head attention only.

    Attention is counted in full, not its causal half; the head is counted, the input embedding is not.

    Source: derived, as the paper prints no formula: the one that gives every printed TFLOPs of arXiv:2401.06066, tables
    1 to 3 and 6, to its digit. The last term, of the router, counts the activated experts only.
    """
    layers, hidden = model.num_layers, model.hidden_size
    attention = 24 * layers * hidden**2 + 12 * layers * hidden * sequence_length
    ffn = 48 * activated_ffn_ratio(model) * layers * hidden**2
    return attention + ffn + 6 * model.vocab_size * hidden + 6 * layers * hidden * model.router_topk


@dataclass(frozen=True)
class ForwardFlops:
    """Of a forward pass, a token: in routed experts, and in all else."""

    routed: float
    rest: float


def forward_flops(model: ModelConfig, layers: Layers, sequence_length: int) -> ForwardFlops:
    """Of some layers, as `model_flops_per_token` counts."""
    routed, rest = multiplied_params(model, layers)
    pairs = model.num_attention_heads * sequence_length / 2 * attention_size(model).width
    return ForwardFlops(routed=2 * routed, rest=2 * rest + 4 * (layers.dense + layers.moe) * pairs)


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of training on one token by which speed and MFU are reported: Megatron-LM's convention.

    A backward pass is twice a forward pass. This is 2 for each entry of a matrix that a token is multiplied by
    (attention as it is trained, shared and selected experts, head, but not the router), and 4 for each element of query
    and value and each earlier position, of which a token has `sequence_length / 2` on average, as attention is causal.
    What is computed again, dropped tokens and boundaries of documents change nothing.

    Source: PaLM, arXiv:2204.02311, appendix B; the causal half and the router as in Megatron-LM, training.py,
    `num_floating_point_operations`.
    """
    forward = forward_flops(model, all_layers(model), sequence_length)
    return 3 * (forward.routed + forward.rest)
