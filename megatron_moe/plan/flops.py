"""Floating-point operations in closed form. Pure; imports no torch."""

from __future__ import annotations

from megatron_moe.config.schema import Attention, ModelConfig
from megatron_moe.plan.params import activated_matrix_params


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


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of training on one token by which speed and MFU are reported.

    6 for each entry of a matrix that a token is multiplied by (attention as it is trained, router, shared and selected
    experts, head), and 3 times the forward pass of the attention scores, of which a token has `sequence_length / 2` on
    average, as attention is causal. What is computed again, dropped tokens and boundaries of documents change nothing.

    Source: PaLM, arXiv:2204.02311, appendix B, but for the causal half, which is Megatron-LM's convention.
    """
    if model.attention is Attention.mha:
        width = 2 * model.kv_channels
    else:
        width = model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim
    scores = 3 * model.num_layers * model.num_attention_heads * width * sequence_length
    return 6 * activated_matrix_params(model) + scores
