"""Names and shapes of Hugging Face's DeepSeek tensors, and where their rows are in megatron-core's. Pure.

Both keep a matrix as [out, in], so that all differences are in rows (`model/names.py` has megatron-core's).

Source: the released checkpoints of deepseek-moe-16b-base and DeepSeek-V2-Lite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_moe.config.derived import is_moe_layer
from megatron_moe.config.schema import Attention, ModelConfig
from megatron_moe.model.names import norm_names


@dataclass(frozen=True)
class Place:
    """Rows of a tensor of ours: `count` from `first` on, of matrix `index` where the tensor stacks several."""

    key: str
    first: int
    count: int
    index: int | None = None


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a Hugging Face checkpoint: its rows, in order, are those of `places`."""

    name: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Source:
    """Rows of a Hugging Face tensor: `count` from `first` on."""

    name: str
    first: int
    count: int


def hf_tensors(model: ModelConfig) -> Iterator[HfTensor]:
    """All tensors of a model, in the order of its layers."""
    vocabulary = (model.vocab_size, model.hidden_size)
    yield _same("model.embed_tokens.weight", vocabulary, "embedding.word_embeddings.weight")
    for layer in range(model.num_layers):
        tensors = _layer(model, layer)
        yield from tensors if model.num_experts else (_stacked(tensor, layer) for tensor in tensors)
    yield _same("model.norm.weight", (model.hidden_size,), "decoder.final_layernorm.weight")
    yield _same("lm_head.weight", vocabulary, "output_layer.weight")


def _layer(model: ModelConfig, layer: int) -> Iterator[HfTensor]:
    theirs, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
    hidden = model.hidden_size
    before_attention, before_mlp = norm_names(model)
    yield _same(f"{theirs}.input_layernorm.weight", (hidden,), f"{ours}.{before_attention}")
    attention = _heads if model.attention is Attention.mha else _latent_attention
    yield from attention(model, f"{theirs}.self_attn", f"{ours}.self_attention")
    yield _same(f"{theirs}.post_attention_layernorm.weight", (hidden,), f"{ours}.{before_mlp}")
    if is_moe_layer(model, layer):
        yield from _experts(model, f"{theirs}.mlp", f"{ours}.mlp")
    else:
        yield from _mlp(hidden, model.ffn_hidden_size, f"{theirs}.mlp", f"{ours}.mlp")


def _heads(model: ModelConfig, theirs: str, ours: str) -> Iterator[HfTensor]:
    """Multi-head attention: of each head the query, the key and the value rows."""
    size, heads = model.kv_channels, model.num_attention_heads
    for number, name in enumerate("qkv"):
        places = (Place(f"{ours}.linear_qkv.weight", (3 * head + number) * size, size) for head in range(heads))
        yield HfTensor(f"{theirs}.{name}_proj.weight", (heads * size, model.hidden_size), tuple(places))
    yield _same(f"{theirs}.o_proj.weight", (model.hidden_size, heads * size), f"{ours}.linear_proj.weight")


def _latent_attention(model: ModelConfig, theirs: str, ours: str) -> Iterator[HfTensor]:
    """Latent attention: the same rows under other names. Both rotate neighbouring values."""
    hidden, latent, rotary = model.hidden_size, model.kv_lora_rank, model.qk_pos_emb_head_dim
    heads = model.num_attention_heads
    queries = heads * (model.qk_head_dim + rotary)
    names = [
        ("kv_a_proj_with_mqa", (latent + rotary, hidden), "linear_kv_down_proj"),
        ("kv_a_layernorm", (latent,), "kv_layernorm"),
        ("kv_b_proj", (heads * (model.qk_head_dim + model.v_head_dim), latent), "linear_kv_up_proj"),
        ("o_proj", (hidden, heads * model.v_head_dim), "linear_proj"),
    ]
    if model.q_lora_rank is None:
        names.append(("q_proj", (queries, hidden), "linear_q_proj"))
    else:
        names += [
            ("q_a_proj", (model.q_lora_rank, hidden), "linear_q_down_proj"),
            ("q_a_layernorm", (model.q_lora_rank,), "q_layernorm"),
            ("q_b_proj", (queries, model.q_lora_rank), "linear_q_up_proj"),
        ]
    for name, shape, key in names:
        yield _same(f"{theirs}.{name}.weight", shape, f"{ours}.{key}.weight")


def _experts(model: ModelConfig, theirs: str, ours: str) -> Iterator[HfTensor]:
    hidden, width = model.hidden_size, model.expert_ffn_hidden_size
    yield _same(f"{theirs}.gate.weight", (model.num_experts, hidden), f"{ours}.router.weight")
    for expert in range(model.num_experts):
        yield from _mlp(hidden, width, f"{theirs}.experts.{expert}", f"{ours}.experts.experts", expert)
    if model.num_shared_experts:
        shared = model.num_shared_experts * width
        yield from _mlp(hidden, shared, f"{theirs}.shared_experts", f"{ours}.shared_experts")


def _mlp(hidden: int, width: int, theirs: str, ours: str, expert: int | None = None) -> Iterator[HfTensor]:
    """A gated network: the gate's rows are above those of the up projection."""
    for number, name in enumerate(("gate", "up")):
        place = Place(f"{ours}.linear_fc1.weight", number * width, width, expert)
        yield HfTensor(f"{theirs}.{name}_proj.weight", (width, hidden), (place,))
    place = Place(f"{ours}.linear_fc2.weight", 0, hidden, expert)
    yield HfTensor(f"{theirs}.down_proj.weight", (hidden, width), (place,))


def _same(name: str, shape: tuple[int, ...], key: str) -> HfTensor:
    return HfTensor(name, shape, (Place(key, 0, shape[0]),))


def _stacked(tensor: HfTensor, layer: int) -> HfTensor:
    """A layer's tensor where all layers are equal."""
    one, all_layers = f"decoder.layers.{layer}.", "decoder.layers."
    places = (replace(p, key=p.key.replace(one, all_layers), index=layer) for p in tensor.places)
    return replace(tensor, places=tuple(places))


def sources(model: ModelConfig) -> dict[tuple[str, int | None], list[Source]]:
    """Of each matrix of ours, by name and number in its stack, the rows of theirs that it is made of, in order."""
    found: dict[tuple[str, int | None], list[tuple[int, Source]]] = defaultdict(list)
    for tensor in hf_tensors(model):
        first = 0
        for place in tensor.places:
            found[place.key, place.index].append((place.first, Source(tensor.name, first, place.count)))
            first += place.count
    return {matrix: [source for _, source in sorted(parts, key=lambda p: p[0])] for matrix, parts in found.items()}
