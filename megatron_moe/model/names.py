"""Names and shapes of a model's tensors in a checkpoint, as megatron-core files them. Pure; imports no torch.

A matrix is [out, in]. The query, key and value rows of each head are together, the gate is above the up projection,
and the same matrix of a layer's experts (of a dense model: of all layers) is one stacked tensor.

Source: megatron-core 0.16.1, mlp.py (gate and up), attention.py (heads), multi_latent_attention.py, moe/experts.py,
transformer_block.py (equal layers are stacked).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.derived import is_moe_layer
from megatron_moe.config.schema import Attention, ModelConfig, Routing

# Where layers are built with Transformer Engine, a norm may be part of the projection after it; without, it may be
# filed as if it were (megatron-core 0.16.1, gpt_layer_specs.py). The values are the same.
NORM_NAMES = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ("self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
    ("self_attention.kv_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight"),
)


@dataclass(frozen=True)
class OurTensor:
    """A tensor of ours: the shape of a matrix (or vector), and how many are stacked, if they are."""

    matrix: tuple[int, ...]
    stack: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return self.matrix if self.stack is None else (self.stack, *self.matrix)


Tensors = dict[str, OurTensor]


def our_tensors(model: ModelConfig) -> Tensors:
    """All parameters, by name; a norm under one of its two names (`other_name`)."""
    vocabulary = (model.vocab_size, model.hidden_size)
    found = {"embedding.word_embeddings.weight": OurTensor(vocabulary)}
    if model.num_experts:
        for layer in range(model.num_layers):
            found |= _in(f"decoder.layers.{layer}", _layer(model, layer))
    else:
        layer = {name: OurTensor(tensor.matrix, model.num_layers) for name, tensor in _layer(model, 0).items()}
        found |= _in("decoder.layers", layer)
    final = {"decoder.final_layernorm.weight": OurTensor((model.hidden_size,))}
    return found | final | {"output_layer.weight": OurTensor(vocabulary)}


def norm_names(model: ModelConfig) -> tuple[str, str]:
    """Of a layer's norms before the attention and before the network, within the layer, without Transformer Engine."""
    is_mha = model.attention is Attention.mha
    before_attention, before_mlp = (names[is_mha] for names in NORM_NAMES[:2])
    return before_attention, before_mlp


def other_name(key: str) -> str | None:
    """The name that the same norm has where layers are built with Transformer Engine or without, if it is one."""
    for pair in NORM_NAMES:
        for name, other in (pair, pair[::-1]):
            if key.endswith(f".{name}"):
                return key.removesuffix(name) + other
    return None


def extra_states(model: ModelConfig) -> list[str]:
    """Names of the empty extra states that megatron-core 0.16.1 keeps for each linear layer but the output layer."""
    names = []
    for key, tensor in our_tensors(model).items():
        module = key.removesuffix(".weight")
        if module.rpartition(".")[2] in ("linear_q_down_proj", "linear_kv_down_proj") or ".linear_" not in module:
            continue
        if key.endswith(".weight"):
            count = tensor.stack or 1
            names += [f"{module}._extra_state/shard_{number}_{count}" for number in range(count)]
    return names


def _in(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _layer(model: ModelConfig, layer: int) -> Tensors:
    hidden = model.hidden_size
    attention = _heads(model) if model.attention is Attention.mha else _latent_attention(model)
    network = _experts(model) if is_moe_layer(model, layer) else _mlp(hidden, model.ffn_hidden_size)
    norms = {name: OurTensor((hidden,)) for name in norm_names(model)}
    return norms | _in("self_attention", attention) | _in("mlp", network)


def _heads(model: ModelConfig) -> Tensors:
    width = model.num_attention_heads * model.kv_channels
    return {
        "linear_qkv.weight": OurTensor((3 * width, model.hidden_size)),
        "linear_proj.weight": OurTensor((model.hidden_size, width)),
    }


def _latent_attention(model: ModelConfig) -> Tensors:
    hidden, latent, rotary = model.hidden_size, model.kv_lora_rank, model.qk_pos_emb_head_dim
    heads = model.num_attention_heads
    queries = heads * (model.qk_head_dim + rotary)
    tensors = {
        "linear_kv_down_proj.weight": OurTensor((latent + rotary, hidden)),
        "kv_layernorm.weight": OurTensor((latent,)),
        "linear_kv_up_proj.weight": OurTensor((heads * (model.qk_head_dim + model.v_head_dim), latent)),
        "linear_proj.weight": OurTensor((hidden, heads * model.v_head_dim)),
    }
    if model.q_lora_rank is None:
        return tensors | {"linear_q_proj.weight": OurTensor((queries, hidden))}
    return tensors | {
        "linear_q_down_proj.weight": OurTensor((model.q_lora_rank, hidden)),
        "q_layernorm.weight": OurTensor((model.q_lora_rank,)),
        "linear_q_up_proj.weight": OurTensor((queries, model.q_lora_rank)),
    }


def _experts(model: ModelConfig) -> Tensors:
    hidden, width = model.hidden_size, model.expert_ffn_hidden_size
    found = _in("experts.experts", _mlp(hidden, width, model.num_experts))
    if model.routing is Routing.topk:  # the tables of hash routing follow from its seed
        found["router.weight"] = OurTensor((model.num_experts, hidden))
    if model.num_shared_experts:
        found |= _in("shared_experts", _mlp(hidden, model.num_shared_experts * width))
    return found


def _mlp(hidden: int, width: int, stack: int | None = None) -> Tensors:
    return {
        "linear_fc1.weight": OurTensor((2 * width, hidden), stack),
        "linear_fc2.weight": OurTensor((hidden, width), stack),
    }
