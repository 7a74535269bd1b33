"""Memory of a rank in closed form: an estimate to choose a layout by. Pure; imports no torch."""

from __future__ import annotations

from megatron_moe.config.derived import (
    data_parallel_size,
    expert_tensor_parallel_size,
    is_moe_layer,
)
from megatron_moe.config.schema import Attention, Config, ModelConfig
from megatron_moe.plan.params import attention_params, moe_params
from megatron_moe.plan.pipeline import layers_of_stage

WEIGHT_AND_GRADIENT = 2 + 4  # bytes of a bf16 parameter and its fp32 gradient
OPTIMIZER = 12  # bytes of an fp32 parameter and its two moments


def memory_of_stage(config: Config, world_size: int, stage: int) -> float:
    """Bytes that a rank of a pipeline stage needs in bf16: parameters, optimizer, activations, logits.

    Estimated with balanced experts and no recomputation, without buffers of communication and fragmentation.
    """
    last = stage == config.parallel.pipeline_model_parallel_size - 1
    return (
        static_bytes(config, world_size, stage) + activation_bytes(config, stage) + (logit_bytes(config) if last else 0)
    )


def static_bytes(config: Config, world_size: int, stage: int) -> float:
    """Bytes of parameters, gradients and optimizer state of a rank; the latter spread over the data-parallel ranks.

    Every dense parameter counts as cut by tensor parallelism, which norms and MLA's down-projections are not.
    """
    parallel = config.parallel
    dense, experts = stage_params(config, stage)
    expert_ranks = parallel.expert_model_parallel_size * expert_tensor_parallel_size(parallel)
    expert_replicas = world_size // parallel.pipeline_model_parallel_size // expert_ranks
    replicas = data_parallel_size(parallel, world_size) * parallel.context_parallel_size
    return (
        dense / parallel.tensor_model_parallel_size * (WEIGHT_AND_GRADIENT + OPTIMIZER / replicas)
        + experts / expert_ranks * (WEIGHT_AND_GRADIENT + OPTIMIZER / expert_replicas)
    )  # fmt: skip


def stage_params(config: Config, stage: int) -> tuple[int, int]:
    """Parameters of a pipeline stage, all its ranks together: those outside and those of the routed experts."""
    model, stages = config.model, config.parallel.pipeline_model_parallel_size
    layers = [layer for chunk in layers_of_stage(model, config.parallel, stage) for layer in chunk]
    num_moe = sum(is_moe_layer(model, layer) for layer in layers)
    first, last = stage == 0, stage == stages - 1
    dense = (
        (first + last) * model.vocab_size * model.hidden_size
        + last * model.hidden_size
        + len(layers) * (attention_params(model) + 2 * model.hidden_size)
        + (len(layers) - num_moe) * 3 * model.hidden_size * model.ffn_hidden_size
        + num_moe * moe_params(model, routed_experts=0)
    )
    routed = num_moe * 3 * model.hidden_size * model.expert_ffn_hidden_size * model.num_experts
    return dense, routed


def activation_bytes(config: Config, stage: int) -> float:
    """Bytes of activations that a stage keeps for the backward passes of its micro batches in flight.

    Source of the number in flight: 1F1B and interleaved 1F1B, arXiv:2104.04473, 2.2.
    """
    parallel = config.parallel
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    in_flight = stages - stage if virtual == 1 else stages * (1 + (stages - 1) / (stages * virtual))
    layers = [layer for chunk in layers_of_stage(config.model, parallel, stage) for layer in chunk]
    per_token = sum(layer_activation_bytes(config.model, layer) for layer in layers)
    return _tokens_of_rank(config) * per_token * in_flight


def layer_activation_bytes(model: ModelConfig, layer: int) -> int:
    """Bytes that a layer keeps for the backward pass of one token, in bf16, with an attention that keeps no scores."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.attention is Attention.mha:
        attention = 16 * heads * model.kv_channels // 2
    else:
        width = model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim
        latent = (model.q_lora_rank or 0) + model.kv_lora_rank
        attention = 4 * heads * width + 4 * latent + 2 * model.qk_pos_emb_head_dim
    if not is_moe_layer(model, layer):
        return 8 * hidden + attention + 4 * heads + 6 * model.ffn_hidden_size
    expert = model.expert_ffn_hidden_size
    routed = 2 * model.router_topk * (hidden + 3 * expert) + 12 * model.num_experts
    return 8 * hidden + attention + 4 * heads + routed + 6 * model.num_shared_experts * expert


def logit_bytes(config: Config) -> float:
    """Bytes of the last stage's logits: bf16, and fp32 for the loss."""
    return 6 * _tokens_of_rank(config) * config.model.vocab_size


def _tokens_of_rank(config: Config) -> float:
    """Of a micro batch, a tensor- or context-parallel rank's share."""
    parallel = config.parallel
    cut = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return config.train.micro_batch_size * config.data.sequence_length / cut
