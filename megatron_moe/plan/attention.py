"""What an attention block has and does, in closed form. Pure; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.schema import Attention, ModelConfig


@dataclass(kw_only=True)
class GroupedQueryModel(ModelConfig):
    """A model of others with multi-head attention that we do not train, to compare formulas with its published figures.

    `num_query_groups` query heads share a key and a value head each; `qk_layernorm`: queries and keys are normalized.
    """

    num_query_groups: int = 1
    qk_layernorm: bool = False


@dataclass(frozen=True)
class AttentionSize:
    """Of one block.

    Attributes:
        cut: entries of matrices that tensor-parallel ranks share.
        replicated: entries of matrices that each of them has.
        norms: parameters of norms within the block.
        width: of a head: the mean of its keys' and its values'.
        keys_and_values: elements a token that context-parallel ranks exchange.
        gathered: elements a token that tensor-parallel ranks gather for the block.
        kept_bytes: for the backward pass, a token, in bf16 and with an attention that keeps no scores.
        up: entries of the matrices from latents to queries, keys and values, of `cut`.
        up_gathered: elements a token that tensor-parallel ranks gather for these.
        up_bytes: of `kept_bytes`, what is computed with them.
    """

    cut: int
    replicated: int
    norms: int
    width: float
    keys_and_values: int
    gathered: int
    kept_bytes: int
    up: int = 0
    up_gathered: int = 0
    up_bytes: int = 0


def attention_size(model: ModelConfig) -> AttentionSize:
    """Of a model's attention blocks.

    Source: MHA as in the released 16B code; MLA as in DeepSeek-V2, arXiv:2405.04434, 2.1 and appendix C.
    """
    return _latent(model) if model.attention is Attention.mla else _multi_head(model)


def _multi_head(model: ModelConfig) -> AttentionSize:
    hidden, heads, width = model.hidden_size, model.num_attention_heads, model.kv_channels
    groups, normalized = heads, False
    if isinstance(model, GroupedQueryModel):
        groups, normalized = model.num_query_groups, model.qk_layernorm
    projected = 2 * width * (heads + groups)  # query and output, key and value
    return AttentionSize(
        cut=hidden * projected,
        replicated=0,
        norms=2 * width * normalized,
        width=width,
        keys_and_values=2 * width * groups,
        gathered=hidden,
        kept_bytes=4 * hidden + 2 * projected + 4 * heads + 2 * width * (heads + groups) * normalized,
    )


def _latent(model: ModelConfig) -> AttentionSize:
    hidden, heads = model.hidden_size, model.num_attention_heads
    query_rank, latent, rotary = model.q_lora_rank or 0, model.kv_lora_rank, model.qk_pos_emb_head_dim
    key, value = model.qk_head_dim + rotary, model.v_head_dim
    up = (query_rank or hidden) * heads * key + latent * heads * (model.qk_head_dim + value)
    return AttentionSize(
        cut=up + heads * value * hidden,
        replicated=hidden * (query_rank + latent + rotary),
        norms=query_rank + latent,
        width=(key + value) / 2,
        keys_and_values=heads * (key + value),
        gathered=(query_rank or hidden) + latent + rotary,
        kept_bytes=4 * hidden + 4 * (query_rank + latent + heads * (key + value)) + 2 * rotary + 4 * heads,
        up=up,
        up_gathered=(query_rank or hidden) + latent,
        up_bytes=2 * (query_rank + latent) + 2 * heads * (2 * key + value),
    )
