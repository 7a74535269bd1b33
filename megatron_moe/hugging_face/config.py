"""Hugging Face's `config.json` of DeepSeekMoE (`deepseek`) and DeepSeek-V2 (`deepseek_v2`), from ours and back. Pure.

Source: config.json and configuration_deepseek.py of deepseek-moe-16b-base, DeepSeek-V2-Lite and DeepSeek-V2, whose
defaults apply where a file leaves a field out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Attention, ModelConfig, Routing, YarnConfig

V1, V2 = "deepseek", "deepseek_v2"
# Fields that are integers of the same meaning in both; the dense ones must be there, the others where they apply.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
}
MOE_SIZES = {
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "router_topk",
    "moe_intermediate_size": "expert_ffn_hidden_size",
}
MLA_SIZES = {
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
OTHER_NAMES = {
    "n_shared_experts": "num_shared_experts",
    "first_k_dense_replace": "num_dense_layers",
    "n_group": "num_device_groups",
    "topk_group": "device_limit",
    "q_lora_rank": "q_lora_rank",
    "routed_scaling_factor": "routed_scaling_factor",
    "aux_loss_alpha": "expert_balance_factor",
    "initializer_range": "init_method_std",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
}
YARN = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
# Fields with one value that our model has; left out, they have it too.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
    "quantization_config": None,
    "ep_size": 1,
}
ONLY_V2 = "; deepseek_v2, of models with model.attention=mla, has it"
LATENT_NORM_EPSILON = 1e-6  # of the released code, whatever rms_norm_eps is


def to_hf_config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """The fields that describe a model, without its number format and special tokens.

    Args:
        model: `num_device_groups` must be set if `device_limit` is.
        sequence_length: of its training; Hugging Face's max_position_embeddings.

    Raises:
        ConfigError: neither model type can express it.
    """
    if problems := list(_inexpressible(model)):
        raise ConfigError(*problems)
    fields: dict[str, Any] = {
        **{name: getattr(model, ours) for name, ours in (SIZES | MOE_SIZES).items()},
        "n_routed_experts": model.num_experts or None,
        "num_experts_per_tok": model.router_topk or None,
        "n_shared_experts": model.num_shared_experts or None,
        "first_k_dense_replace": model.num_dense_layers,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "aux_loss_alpha": model.expert_balance_factor,
        "seq_aux": True,
        "num_key_value_heads": model.num_attention_heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": model.init_method_std,
        "max_position_embeddings": sequence_length,
        "pretraining_tp": 1,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    if model.attention is Attention.mha:
        return _classes(V1, "Deepseek") | fields
    fields |= {name: getattr(model, ours) for name, ours in MLA_SIZES.items()}
    fields |= {"q_lora_rank": model.q_lora_rank, "routed_scaling_factor": model.routed_scaling_factor}
    return _classes(V2, "DeepseekV2") | fields | _device_limit(model) | {"rope_scaling": _scaling(model)}


def _classes(model_type: str, prefix: str) -> dict[str, Any]:
    """The model's type, and for V1, which transformers has no class of, where the released repository has them."""
    fields: dict[str, Any] = {"architectures": [f"{prefix}ForCausalLM"], "model_type": model_type}
    if model_type == V1:
        names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
        files = {"Config": "configuration_deepseek"}
        fields["auto_map"] = {
            auto: f"{files.get(name, 'modeling_deepseek')}.{prefix}{name}" for auto, name in names.items()
        }
    return fields


def _device_limit(model: ModelConfig) -> dict[str, Any]:
    if model.device_limit is None:
        return {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    return {
        "topk_method": "group_limited_greedy",
        "n_group": model.num_device_groups,
        "topk_group": model.device_limit,
    }


def _scaling(model: ModelConfig) -> dict[str, Any] | None:
    if model.yarn.rotary_scaling_factor is None:
        return None
    return {"type": "yarn", **{name: getattr(model.yarn, ours) for name, ours in YARN.items()}}


def _inexpressible(model: ModelConfig) -> Iterator[str]:
    if model.forced_routing is not None:
        yield f"model.forced_routing={model.forced_routing.value}: was for measurements only, the model learned nothing"
    if model.routing is Routing.hash:
        yield "model.routing=hash: neither model type has it; model.routing=topk can be exported"
    if model.attention is Attention.mla:
        if model.layernorm_epsilon != LATENT_NORM_EPSILON:
            yield _only(f"model.layernorm_epsilon={model.layernorm_epsilon}", V2, LATENT_NORM_EPSILON)
        if model.yarn.rotary_scaling_factor is not None:
            yield from _mscale_problems("model.yarn", model.yarn)
        return
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        width = f"{model.hidden_size} / {model.num_attention_heads}"
        yield _only(f"model.kv_channels={model.kv_channels}", V1, f"hidden_size / num_attention_heads = {width}")
    if model.routed_scaling_factor != 1.0 and model.num_experts:
        yield _only(f"model.routed_scaling_factor={model.routed_scaling_factor}", V1, 1.0) + ONLY_V2
    if model.device_limit is not None:
        yield _only(f"model.device_limit={model.device_limit}", V1, "null") + ONLY_V2


def _only(option: str, model_type: str, value: Any) -> str:
    return f"{option}: model type {model_type} has only {value}"


def _mscale_problems(where: str, yarn: YarnConfig) -> Iterator[str]:
    """In transformers a zero is "not given", in the released code it is not."""
    scales = (yarn.mscale, yarn.mscale_all_dim)
    if not all(scales) and scales != (1.0, 0.0):
        yield f"{where}: mscale={scales[0]}, mscale_all_dim={scales[1]}: must both be positive, or 1 and 0"


def from_hf_config(config: dict[str, Any], name: str) -> ModelConfig:
    """Our options of a model that a `config.json` describes.

    Args:
        config: contents of the file, as written by the releases or by transformers.
        name: of the model.

    Raises:
        ConfigError: with one line for each field that our model does not have, or that is missing.
    """
    problems = list(_unsupported(config))
    if problems:
        raise ConfigError(*problems)
    is_mla, is_moe = config["model_type"] == V2, config["n_routed_experts"] is not None
    theta, scaling = _rope(config)
    layers, heads, hidden = (config[n] for n in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    options: dict[str, Any] = {ours: config[theirs] for theirs, ours in SIZES.items()}
    options |= {
        "num_dense_layers": (config.get("first_k_dense_replace") or 0) if is_moe else layers,
        "kv_channels": config["qk_nope_head_dim"] if is_mla else hidden // heads,
        "rotary_base": int(theta),
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
        "init_method_std": config.get("initializer_range", 0.02),
    }
    options |= _moe_options(config) if is_moe else _dense_options(config)
    if is_mla:
        options |= {ours: config[theirs] for theirs, ours in MLA_SIZES.items()}
        options |= {"attention": Attention.mla, "q_lora_rank": config["q_lora_rank"], "yarn": _yarn(scaling)}
    return ModelConfig(name=name, **options)


def _moe_options(config: dict[str, Any]) -> dict[str, Any]:
    options = {ours: config[theirs] for theirs, ours in MOE_SIZES.items()}
    options["num_shared_experts"] = config.get("n_shared_experts") or 0
    options["expert_balance_factor"] = config.get("aux_loss_alpha", 0.001)
    if config["model_type"] == V2:
        options["routed_scaling_factor"] = config.get("routed_scaling_factor", 1.0)
        if config.get("topk_method") == "group_limited_greedy":
            options |= {"num_device_groups": config["n_group"], "device_limit": config["topk_group"]}
    return options


def _dense_options(config: dict[str, Any]) -> dict[str, Any]:
    # The width of an expert must be given, and is not used.
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    unused = ("num_experts", "num_shared_experts", "router_topk", "expert_balance_factor")
    return {**dict.fromkeys(unused, 0), "expert_ffn_hidden_size": width}


def _yarn(scaling: dict[str, Any] | None) -> YarnConfig:
    if scaling is None:
        return YarnConfig()
    return YarnConfig(**{ours: (YARN_DEFAULTS | scaling)[theirs] for theirs, ours in YARN.items()})


def _written_rope(config: dict[str, Any]) -> Any:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope(config: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Base and scaling, as the releases and transformers 4 write them, or in `rope_parameters` of transformers 5."""
    found = dict(_written_rope(config))
    theta = found.pop("rope_theta", config.get("rope_theta", 10000))
    kind = found.pop("rope_type", None) or found.get("type") or "default"
    found.pop("type", None)
    scaling = {name: value for name, value in found.items() if value is not None}
    if kind == "default" and not scaling:
        return theta, None
    return theta, {"type": kind, **scaling}


def in_their_names(problem: str) -> str:
    """A problem of our options in the words of `config.json`."""
    theirs = {ours: name for name, ours in (SIZES | MOE_SIZES | MLA_SIZES | OTHER_NAMES).items()}
    return re.sub(r"model\.(\w+)", lambda match: theirs.get(match[1], match[0]), problem)


def _unsupported(config: dict[str, Any]) -> Iterator[str]:
    model_type = config.get("model_type")
    if model_type not in (V1, V2):
        yield _refusal("model_type", model_type, f"{V1} and {V2}")
        return
    yield from _wrong_sizes(config)
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            yield _refusal(name, config[name], value)
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads") not in (None, heads):
        yield _refusal("num_key_value_heads", config["num_key_value_heads"], f"num_attention_heads={heads}")
    if config.get("norm_topk_prob") and config.get("num_experts_per_tok") != 1:
        yield _refusal("norm_topk_prob", config["norm_topk_prob"], False)
    yield from _unsupported_rope(config)
    yield from (_unsupported_v1 if model_type == V1 else _unsupported_v2)(config)


def _needed_sizes(config: dict[str, Any]) -> Iterator[str]:
    yield from SIZES
    if config.get("n_routed_experts", 0) is not None:
        yield from MOE_SIZES
    if config["model_type"] == V2:
        yield from MLA_SIZES
        if config.get("q_lora_rank") is not None:
            yield "q_lora_rank"
        if config.get("topk_method") == "group_limited_greedy":
            yield from ("n_group", "topk_group")


def _wrong_sizes(config: dict[str, Any]) -> Iterator[str]:
    for name in _needed_sizes(config):
        if name not in config:
            yield f"{name}: missing; it is needed"
        elif not _is_integer(config[name], 1):
            yield _refusal(name, config[name], "positive integers")
    for name in ("first_k_dense_replace", "n_shared_experts"):
        if not _is_integer(config.get(name) or 0, 0):
            yield _refusal(name, config[name], "integers from 0")
    for name in ("rms_norm_eps", "initializer_range", "routed_scaling_factor", "aux_loss_alpha"):
        if not _is_number(config.get(name, 1)):
            yield _refusal(name, config[name], "numbers from 0")


def _unsupported_rope(config: dict[str, Any]) -> Iterator[str]:
    if not isinstance(written := _written_rope(config), dict):
        yield _refusal("rope_scaling", written, "null or an object")
        return
    theta, scaling = _rope(config)
    if not _is_number(theta) or theta < 1 or theta != int(theta):
        yield _refusal("rope_theta", theta, "positive integers")
    if scaling is None:
        return
    kind = scaling.pop("type")
    if kind != "yarn" or config["model_type"] == V1:
        what = kind if kind != "default" else f"default with {', '.join(scaling)}"
        yield _refusal("rope_scaling", what, "null" if config["model_type"] == V1 else "null and yarn")
        return
    for name in sorted(YARN.keys() - YARN_DEFAULTS.keys() - scaling.keys()):
        yield f"rope_scaling.{name}: missing; it is needed"
    wrong = [n for n, value in scaling.items() if n not in YARN or not _is_number(value)]
    for name in wrong:
        yield _refusal(f"rope_scaling.{name}", scaling[name], f"{', '.join(YARN)}, all numbers")
    original = scaling.get("original_max_position_embeddings", 1)
    if _is_number(original) and not _is_integer(original, 1):
        yield _refusal("rope_scaling.original_max_position_embeddings", original, "positive integers")
    if not wrong and YARN.keys() <= (YARN_DEFAULTS | scaling).keys():
        yield from _mscale_problems("rope_scaling", _yarn(scaling))


def _unsupported_v1(config: dict[str, Any]) -> Iterator[str]:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not (_is_integer(hidden, 1) and _is_integer(heads, 1)):
        return
    if hidden % heads:
        yield _refusal("hidden_size", hidden, f"multiples of num_attention_heads={heads}")
    elif config.get("head_dim") not in (None, hidden // heads):
        yield _refusal("head_dim", config["head_dim"], f"hidden_size / num_attention_heads = {hidden // heads}")


def _unsupported_v2(config: dict[str, Any]) -> Iterator[str]:
    if config.get("topk_method", "greedy") not in ("greedy", "group_limited_greedy"):
        yield _refusal("topk_method", config["topk_method"], "greedy and group_limited_greedy")
    if "q_lora_rank" not in config:
        yield "q_lora_rank: missing; it is needed (null: queries are not compressed)"
    if config.get("rms_norm_eps", LATENT_NORM_EPSILON) != LATENT_NORM_EPSILON:
        yield _refusal("rms_norm_eps", config["rms_norm_eps"], f"{LATENT_NORM_EPSILON}, which the latent norms have")


def _refusal(name: str, value: Any, supported: Any) -> str:
    return f"{name}={value}: not supported; supported: {supported}"


def _is_integer(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf
