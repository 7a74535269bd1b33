"""Rules that any option may have: its sign, and what it divides. Pure; imports no torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

from megatron_moe.config.schema import Config

POSITIVE = {
    "model": (
        "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels vocab_size expert_ffn_hidden_size "
        "relative_expert_size num_device_groups device_limit device_capacity_factor kv_lora_rank q_lora_rank "
        "qk_head_dim qk_pos_emb_head_dim v_head_dim init_method_std layernorm_epsilon rotary_base "
        "routed_scaling_factor"
    ),
    "model.yarn": "rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow",
    "parallel": (
        "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
        "context_parallel_size expert_model_parallel_size expert_tensor_parallel_size data_parallel_size "
        "timeout_minutes"
    ),
    "recompute": "num_layers",
    "data": "sequence_length tokenizer_vocab_size",
    "optimizer": "lr adam_eps clip_grad",
    "train": "train_steps exit_step global_batch_size micro_batch_size max_skipped_steps spike_sigma spike_window",
    "train.batch_ramp": "start increment tokens",
    "evaluation": "interval num_samples",
    "checkpoint": "save_interval keep_last keep_every",
    "logger": "log_interval heat_map_interval",
}
NOT_NEGATIVE = {
    "model": (
        "num_dense_layers num_experts num_shared_experts router_topk expert_balance_factor device_balance_factor "
        "communication_balance_factor"
    ),
    "model.yarn": "mscale mscale_all_dim",
    "optimizer": "weight_decay",
    "scheduler": "warmup_steps decay_factor",
    "train": "seed",
    "data": "seed num_workers",
}
BELOW_ONE = {
    "model": "undropped_fraction",
    "optimizer": "adam_beta1 adam_beta2",
    "data": "valid_fraction test_fraction",
}


def divisors(number: int) -> str:
    """All divisors of a number, as text."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def wrong_signs(config: Config) -> Iterator[tuple[str, str]]:
    """Options of the wrong sign, and what is wrong with them."""
    for table, is_wrong, rule in (
        (POSITIVE, lambda value: not 0 < value < math.inf, "must be positive"),
        (NOT_NEGATIVE, lambda value: not 0 <= value < math.inf, "must not be negative"),
        (BELOW_ONE, lambda value: not 0 <= value < 1, "must be at least 0 and below 1"),
    ):
        for group, names in table.items():
            for name in names.split():
                value = getattr(lookup(config, group), name)
                if value is not None and is_wrong(value):
                    yield f"{group}.{name}", f"{group}.{name}={value}: {rule}"


def divides(config: Config, part: str, whole: str) -> Iterator[str]:
    """A problem unless one option divides another, both given as group.option."""
    part_value, whole_value = (lookup(config, name) for name in (part, whole))
    if whole_value % part_value:
        yield f"{part}={part_value}: must divide {whole}={whole_value}; possible: {divisors(whole_value)}"


def lookup(config: Config, name: str) -> Any:
    """The value of group.option, or a group."""
    return functools.reduce(getattr, name.split("."), config)
