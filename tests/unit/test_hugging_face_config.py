"""`config.json` of the releases and of transformers against our options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import CONF_DIR, compose_config
from megatron_moe.config.schema import ModelConfig, YarnConfig
from megatron_moe.hugging_face.config import from_hf_config, to_hf_config
from megatron_moe.hugging_face.names import hf_tensors, sources
from megatron_moe.model.names import extra_states, other_name, our_tensors
from megatron_moe.plan.params import total_params

# deepseek-ai/deepseek-moe-16b-base/config.json, whole.
RELEASED_16B = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 102400,
}
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
WITHOUT_FACTOR = {name: value for name, value in YARN.items() if name != "factor"}
# deepseek-ai/DeepSeek-V2-Lite/config.json and DeepSeek-V2/config.json: after the extension of their context.
RELEASED_V2_LITE = {
    **{name: value for name, value in RELEASED_16B.items() if name not in ("auto_map", "transformers_version")},
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "aux_loss_alpha": 0.001,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "n_group": 1,
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": YARN,
    "routed_scaling_factor": 1.0,
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
}
RELEASED_V2 = {
    **RELEASED_V2_LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
EXTENDED = YarnConfig(
    rotary_scaling_factor=40,
    original_max_position_embeddings=4096,
    beta_fast=32,
    beta_slow=1,
    mscale=0.707,
    mscale_all_dim=0.707,
)
# Of the run, not of the model's function; transformers writes its own version.
NOT_OF_THE_MODEL = {"bos_token_id", "eos_token_id", "torch_dtype", "transformers_version"}
# What Hugging Face's file has no field for: how the model was trained, and the name.
WITHOUT_A_FIELD = {
    "communication_balance_factor",
    "device_balance_factor",
    "device_capacity_factor",
    "relative_expert_size",
    "undropped_fraction",
}


def model_of(name: str) -> ModelConfig:
    return compose_config([f"model={name}"]).model


@pytest.mark.parametrize(
    ("released", "name", "differing"),
    [
        (RELEASED_16B, "deepseekmoe_16b", {"init_method_std": 0.02}),
        (RELEASED_V2_LITE, "deepseek_v2_lite", {"init_method_std": 0.02, "yarn": EXTENDED}),
        (
            RELEASED_V2,
            "deepseek_v2",
            {"init_method_std": 0.02, "yarn": EXTENDED, "expert_balance_factor": 0.001},  # 0.003 in the paper, 3.1.2
        ),
    ],
)
def test_released_models_are_our_models(released: dict, name: str, differing: dict[str, Any]) -> None:
    ours, theirs = (dataclasses.asdict(m) for m in (model_of(name), from_hf_config(released, name)))
    for option in WITHOUT_A_FIELD:
        ours.pop(option), theirs.pop(option)
    found = {option: value for option, value in theirs.items() if value != ours[option]}
    assert found == {o: dataclasses.asdict(v) if o == "yarn" else v for o, v in differing.items()}
    again = to_hf_config(from_hf_config(released, name), released["max_position_embeddings"])
    assert {name: again.get(name, "missing") for name in released.keys() - NOT_OF_THE_MODEL} == {
        name: value for name, value in released.items() if name not in NOT_OF_THE_MODEL
    }


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml")))
def test_every_model_is_exported_or_refused(name: str) -> None:
    model = model_of(name)
    if name.startswith("hash_"):
        with pytest.raises(ConfigError, match=r"model\.routing=hash: neither model type has it"):
            to_hf_config(model, 4096)
        return
    fields = to_hf_config(model, 4096)
    kept = dataclasses.replace(
        model,
        **{option: getattr(from_hf_config(fields, name), option) for option in WITHOUT_A_FIELD},
        num_device_groups=model.num_device_groups if model.device_limit else None,
    )
    assert from_hf_config(fields, name) == kept
    tensors = list(hf_tensors(model))
    sizes = [tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) > 1 else 1) for tensor in tensors]
    assert sum(sizes) == total_params(model)
    # Every row of ours is of one row of theirs.
    ours = our_tensors(model)
    columns = {tensor.name: tensor.shape[1:] for tensor in tensors}
    for (key, _), group in sources(model).items():
        assert (sum(source.count for source in group), *columns[group[0].name]) == ours[key].matrix, key
    matrices = {(key, index) for key, t in ours.items() for index in ([None] if t.stack is None else range(t.stack))}
    assert sources(model).keys() == matrices


@pytest.mark.parametrize(("released", "count"), [(RELEASED_16B, 5_466), (RELEASED_V2_LITE, 5_291)])
def test_the_released_checkpoints_have_as_many_tensors(released: dict, count: int) -> None:
    assert len(list(hf_tensors(from_hf_config(released, "x")))) == count


def test_names_of_transformer_engine() -> None:
    assert other_name("decoder.layers.1.pre_mlp_layernorm.weight") == (
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    )
    assert other_name("decoder.layers.1.mlp.linear_fc1.layer_norm_weight") == (
        "decoder.layers.1.pre_mlp_layernorm.weight"
    )
    assert other_name("decoder.layers.1.mlp.linear_fc1.weight") is None
    assert "decoder.layers.1.mlp.experts.experts.linear_fc2._extra_state/shard_63_64" in extra_states(
        model_of("deepseekmoe_16b")
    )


def test_fields_as_transformers_5_writes_them() -> None:
    renamed = {name: value for name, value in RELEASED_V2_LITE.items() if not name.startswith(("rope_", "torch_"))}
    yarn = {name: value for name, value in YARN.items() if name != "type"}
    renamed |= {"dtype": "bfloat16", "rope_parameters": {**yarn, "rope_type": "yarn", "rope_theta": 10000.0}}
    assert from_hf_config(renamed, "x") == from_hf_config(RELEASED_V2_LITE, "x")
    plain = {**renamed, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert from_hf_config(plain, "x").rotary_base == 500_000
    assert from_hf_config(plain, "x").yarn == YarnConfig()


def test_what_a_file_leaves_out_is_as_in_the_released_code() -> None:
    optional = ("first_k_dense_replace", "rope_theta", "rms_norm_eps", "scoring_func", "tie_word_embeddings")
    short = {name: value for name, value in RELEASED_16B.items() if name not in optional}
    model = from_hf_config(short, "x")
    assert (model.num_dense_layers, model.rotary_base, model.layernorm_epsilon) == (0, 10000, 1e-6)


@pytest.mark.parametrize(
    ("released", "change", "expected"),
    [
        (RELEASED_16B, {"num_key_value_heads": 4}, "num_key_value_heads=4: not supported; supported: num_attention"),
        (RELEASED_16B, {"scoring_func": "sigmoid"}, "scoring_func=sigmoid: not supported; supported: softmax"),
        (RELEASED_16B, {"norm_topk_prob": True}, "norm_topk_prob=True: not supported; supported: False"),
        (RELEASED_V2, {"topk_method": "noaux_tc"}, "topk_method=noaux_tc: not supported; supported: greedy and group_"),
        (RELEASED_16B, {"attention_bias": True}, "attention_bias=True"),
        (RELEASED_16B, {"hidden_act": "gelu"}, "hidden_act=gelu: not supported; supported: silu"),
        (RELEASED_16B, {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        (RELEASED_16B, {"moe_layer_freq": 2}, "moe_layer_freq=2: not supported; supported: 1"),
        (RELEASED_16B, {"rope_scaling": YARN}, "rope_scaling=yarn: not supported; supported: null"),
        (RELEASED_V2, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling=linear: .* null and yarn"),
        (RELEASED_V2, {"rope_scaling": WITHOUT_FACTOR}, "rope_scaling.factor: missing"),
        (RELEASED_V2, {"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate=False"),
        (RELEASED_V2, {"rope_scaling": {**YARN, "mscale": 0}}, "mscale=0, mscale_all_dim=0.707: must both be"),
        (
            RELEASED_V2,
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 0.5}},
            "original_max_position_embeddings=0.5",
        ),
        (RELEASED_16B, {"head_dim": 64}, "head_dim=64: .* hidden_size / num_attention_heads = 128"),
        (RELEASED_16B, {"hidden_size": 2050}, "hidden_size=2050: .* multiples of num_attention_heads=16"),
        (RELEASED_16B, {"model_type": "llama"}, "model_type=llama: not supported; supported: deepseek and deepseek_v2"),
        (RELEASED_16B, {"quantization_config": {"bits": 4}}, "quantization_config="),
        (RELEASED_16B, {"vocab_size": None}, "vocab_size=None: not supported; supported: positive integers"),
        (RELEASED_16B, {"num_hidden_layers": "28"}, "num_hidden_layers=28: .* positive integers"),
        (RELEASED_16B, {"n_shared_experts": -1}, "n_shared_experts=-1: .* integers from 0"),
        (RELEASED_16B, {"rope_theta": 0.5}, "rope_theta=0.5"),
        (RELEASED_16B, {"rope_theta": float("inf")}, "rope_theta=inf"),
        (RELEASED_16B, {"aux_loss_alpha": float("inf")}, "aux_loss_alpha=inf: .* numbers"),
        (RELEASED_V2, {"rope_scaling": "linear"}, "rope_scaling=linear: .* null or an object"),
        (RELEASED_V2, {"rope_parameters": {"full_attention": YARN}}, "rope_scaling=default with full_attention"),
        (RELEASED_16B, {"rms_norm_eps": "1e-6"}, "rms_norm_eps=1e-6: .* numbers"),
        (RELEASED_V2, {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05: .* 1e-06, which the latent norms have"),
    ],
)
def test_what_we_do_not_do_is_refused(released: dict, change: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as refusal:
        from_hf_config({**released, **change}, "x")
    assert len(refusal.value.problems) == 1


@pytest.mark.parametrize(
    "name", ["vocab_size", "n_routed_experts", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank", "n_group"]
)
def test_missing_fields_are_named(name: str) -> None:
    fields = {key: value for key, value in RELEASED_V2.items() if key != name}
    with pytest.raises(ConfigError, match=f"^{name}: missing; it is needed"):
        from_hf_config(fields, "x")


def test_all_problems_are_told_at_once() -> None:
    wrong = {"scoring_func": "sigmoid", "norm_topk_prob": True, "hidden_act": "gelu", "topk_method": "noaux_tc"}
    fields = {name: value for name, value in {**RELEASED_V2, **wrong}.items() if name != "kv_lora_rank"}
    with pytest.raises(ConfigError) as refusal:
        from_hf_config(fields, "x")
    assert {problem.split("=")[0].split(":")[0] for problem in refusal.value.problems} == {*wrong, "kv_lora_rank"}


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("deepseekmoe_16b", "kv_channels", 64, "kv_channels=64: model type deepseek has only hidden_size / num_"),
        ("deepseekmoe_16b", "routed_scaling_factor", 2.0, "routed_scaling_factor=2.0: model type deepseek has only 1"),
        ("deepseekmoe_16b", "device_limit", 3, "device_limit=3: model type deepseek has only null"),
        ("deepseek_v2", "layernorm_epsilon", 1e-5, "layernorm_epsilon=1e-05: model type deepseek_v2 has only 1e-06"),
        (
            "deepseek_v2",
            "yarn",
            dataclasses.replace(EXTENDED, mscale_all_dim=0.0),
            "model.yarn: mscale=0.707, mscale_all_dim=0.0",
        ),
    ],
)
def test_what_hugging_face_does_not_have_is_not_exported(name: str, option: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        to_hf_config(dataclasses.replace(model_of(name), **{option: value}), 4096)
