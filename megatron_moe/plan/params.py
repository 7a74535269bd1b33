"""Parameter counts in closed form. Pure; equal to the instantiated model (tests/golden)."""

from __future__ import annotations

from megatron_moe.config.schema import Attention, ModelConfig, Routing


def attention_params(model: ModelConfig) -> int:
    """Parameters of one attention block, its latent norms included and the layer's norm not.

    Source: MHA as in the released 16B code; MLA as in DeepSeek-V2, arXiv:2405.04434, 2.1 and appendix C.
    """
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.attention is Attention.mha:
        return 4 * hidden * heads * model.kv_channels
    query_width = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    if model.q_lora_rank is None:
        query = hidden * query_width
    else:
        query = model.q_lora_rank * (hidden + query_width + 1)
    latent = model.kv_lora_rank * (hidden + heads * (model.qk_head_dim + model.v_head_dim) + 1)
    return query + latent + hidden * model.qk_pos_emb_head_dim + heads * model.v_head_dim * hidden


def moe_params(model: ModelConfig, *, routed_experts: int) -> int:
    """Parameters of one MoE block with `routed_experts` of its routed experts counted; a learned router always."""
    expert = 3 * model.hidden_size * model.expert_ffn_hidden_size
    router = model.hidden_size * model.num_experts if model.routing is Routing.topk else 0
    return expert * (routed_experts + model.num_shared_experts) + router


def _params(model: ModelConfig, *, routed_experts: int) -> int:
    hidden = model.hidden_size
    dense = 3 * hidden * model.ffn_hidden_size
    per_layer = attention_params(model) + 2 * hidden
    num_moe_layers = model.num_layers - model.num_dense_layers
    return (
        model.num_layers * per_layer
        + model.num_dense_layers * dense
        + num_moe_layers * moe_params(model, routed_experts=routed_experts)
        + 2 * model.vocab_size * hidden
        + hidden
    )


def total_params(model: ModelConfig) -> int:
    """All parameters, input embedding and head included."""
    return _params(model, routed_experts=model.num_experts)


def activated_params(model: ModelConfig) -> int:
    """Parameters that a token passes through, input embedding, head and router included."""
    return _params(model, routed_experts=model.router_topk)


def activated_matrix_params(model: ModelConfig) -> int:
    """Entries of the matrices that a token is multiplied by: activated parameters but input embedding and norms."""
    norms = (2 * model.num_layers + 1) * model.hidden_size
    if model.attention is Attention.mla:
        norms += model.num_layers * ((model.q_lora_rank or 0) + model.kv_lora_rank)
    return activated_params(model) - model.vocab_size * model.hidden_size - norms
