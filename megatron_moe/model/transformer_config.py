"""The one mapping from our options to megatron-core's `TransformerConfig`. Pure."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_moe.config.derived import expert_tensor_parallel_size, is_moe_layer
from megatron_moe.config.schema import Attention, Config, Dtype, ModelConfig, ParallelConfig, YarnConfig
from megatron_moe.model.acceleration import CPU_ONLY, Accelerators, transformer_fields
from megatron_moe.plan.pipeline import mcore_layout


def transformer_config(config: Config, accelerators: Accelerators = CPU_ONLY) -> TransformerConfig:
    """Map a configuration to megatron-core's.

    Args:
        config: validated (config/validate.py).
        accelerators: that this rank has.
    """
    fields = {
        **_architecture(config.model),
        **_routing(config.model),
        **_placement(config.model, config.parallel),
        **_precision(config.precision.dtype),
        **transformer_fields(config, accelerators),
        "deterministic_mode": config.train.deterministic,
    }
    if config.model.attention is Attention.mla:
        return MLATransformerConfig(**fields, **_latent_attention(config.model))
    return TransformerConfig(**fields)


def _architecture(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "kv_channels": model.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method": _leave_uninitialized,
        "output_layer_init_method": _leave_uninitialized,
        "embedding_init_method": _leave_uninitialized,
        "rotary_interleaved": False,
    }


def _leave_uninitialized(tensor: torch.Tensor) -> None:
    """model/build.py draws the weights, the same in every layout."""


def _routing(model: ModelConfig) -> dict[str, Any]:
    if model.num_experts == 0:
        return {}
    return {
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": [int(is_moe_layer(model, layer)) for layer in range(model.num_layers)],
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": (model.num_shared_experts * model.expert_ffn_hidden_size or None),
        "moe_router_topk": model.router_topk,
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # model/router.py adds the paper's losses
        # Never reached: it makes the dispatcher count what model/router.py leaves (token_dispatcher.py:514).
        "moe_expert_capacity_factor": model.num_experts if model.device_capacity_factor else None,
    }


def _placement(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    virtual = parallel.virtual_pipeline_model_parallel_size
    pipelined = parallel.pipeline_model_parallel_size > 1
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.tensor_model_parallel_size > 1,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": expert_tensor_parallel_size(parallel),
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "pipeline_model_parallel_layout": mcore_layout(model, parallel) if pipelined else None,
        # One by one: in a batch, two stages that are each other's next and previous mix up activations and gradients.
        "overlap_p2p_comm": virtual > 1,
        "batch_p2p_comm": virtual == 1,
    }


def _precision(dtype: Dtype) -> dict[str, Any]:
    torch_dtype = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}[dtype]
    return {"params_dtype": torch_dtype, "pipeline_dtype": torch_dtype, "bf16": dtype is Dtype.bf16}


def _latent_attention(model: ModelConfig) -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_head_dim,
        "qk_pos_emb_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "qk_layernorm": True,
        "rotary_base": model.rotary_base,
        **_latent_positions(model.yarn),
    }


def _latent_positions(yarn: YarnConfig) -> dict[str, Any]:
    """DeepSeek-V2 pretrains on plain RoPE and applies YaRN afterwards (arXiv:2405.04434, 3.1.4).

    The softmax scale follows `mscale_all_dim` even then (mcore 0.16.1, multi_latent_attention.py:125).
    """
    if yarn.rotary_scaling_factor is None:
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    return {"rope_type": "yarn", **dataclasses.asdict(yarn)}
