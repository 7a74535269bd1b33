"""Which modules the model is built of: megatron-core's, with our router, and our attention and experts without TE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe.config.errors import ConfigError
from megatron_moe.distributed.accelerators import has_transformer_engine
from megatron_moe.distributed.without_te import ReplicatedLinear
from megatron_moe.model.attention import ScaledDotProductAttention
from megatron_moe.model.experts import GroupedExperts
from megatron_moe.model.norm import RMSNorm
from megatron_moe.model.router import Router


def use_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and this rank has a GPU (distributed/context.py sets it)."""
    return has_transformer_engine() and torch.cuda.is_available() and torch.cuda.is_initialized()


def block_spec(
    config: TransformerConfig,
    router: Callable[..., Router],
    *,
    vp_stage: int | None,
    pp_rank: int,
    within_documents: bool = False,
) -> TransformerBlockSubmodules:
    """The layers of one model chunk.

    Raises:
        ConfigError: Transformer Engine cannot keep attention within documents under context parallelism.
    """
    with_te = use_transformer_engine()
    if with_te and within_documents and config.context_parallel_size > 1:
        raise ConfigError(
            f"data.reset_attention_mask=True: Transformer Engine has no such attention under context parallelism; "
            f"parallel.context_parallel_size={config.context_parallel_size} must be 1"
        )
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=with_te,
        normalization=config.normalization,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    if not with_te:
        _replace_local_modules(spec)
    for layer in spec.layer_specs:
        if within_documents:  # else Transformer Engine does not look at the mask
            layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.arbitrary
        if isinstance(moe := layer.submodules.mlp.submodules, MoESubmodules):
            moe.router = router
    return spec


def _replace_local_modules(spec: TransformerBlockSubmodules) -> None:
    """Our modules for those of megatron-core that are slow, or wrong under tensor or context parallelism."""
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = ScaledDotProductAttention
        if isinstance(attention, MLASelfAttentionSubmodules):
            attention.q_layernorm = attention.kv_layernorm = RMSNorm
            attention.linear_q_down_proj = attention.linear_kv_down_proj = ReplicatedLinear
        if isinstance(moe := layer.submodules.mlp.submodules, MoESubmodules):
            moe.experts = ModuleSpec(GroupedExperts)
