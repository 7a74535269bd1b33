"""What a run may change when it goes on, and what a model may change when it takes the weights of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.config.derived import source_name
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import from_plain
from megatron_moe.config.schema import Config, ModelConfig

# What a run may not change on the way: other weights, or another sequence of samples.
FIXED_OPTIONS = (
    "model",
    "data.kind",
    "data.seed",
    "data.sequence_length",
    "data.valid_fraction",
    "data.test_fraction",
    "data.eod_mask_loss",
    "data.reset_position_ids",
    "data.reset_attention_mask",
    "data.tokenizer_vocab_size",
    "precision.dtype",
    "train.seed",
    "train.global_batch_size",
    "train.batch_ramp",
)

# Options of a model that may differ from those of the run that its weights come from: they act in training only, or, as
# YaRN, are there to be changed between runs.
FREE_OPTIONS = {
    "name",
    "relative_expert_size",
    "init_method_std",
    "expert_balance_factor",
    "device_balance_factor",
    "communication_balance_factor",
    "device_capacity_factor",
    "undropped_fraction",
    "yarn",
}


def check_same_model(saved: ModelConfig, expected: ModelConfig, checkpoint: Path) -> None:
    """Refuse the weights of another architecture.

    Raises:
        ConfigError: with one line per option that differs.
    """
    theirs, ours = plain(saved), plain(expected)
    free = FREE_OPTIONS if expected.device_limit else FREE_OPTIONS | {"num_device_groups"}
    problems = [
        f"model.{name}={ours[name]}: {checkpoint} has {theirs[name]}"
        for name in ours
        if name not in free and ours[name] != theirs[name]
    ]
    if problems:
        raise ConfigError(*problems)


def check_same_run(saved: dict[str, Any], config: Config) -> None:
    """Refuse to continue a run with another model or other data.

    Raises:
        ConfigError: with one line per option that differs.
    """
    now = plain(config)
    problems = [
        f"{option}={_lookup(now, option)}: {config.run.dir} was trained with {_lookup(saved, option)}"
        for name in FIXED_OPTIONS
        for option in _leaves(now, name)
        if _lookup(saved, option) != _lookup(now, option)
    ]
    mixes = [mix(from_plain(saved)), mix(config)]
    if list(mixes[0].items()) != list(mixes[1].items()):
        problems.append(f"data.train weights {mixes[1]}: {config.run.dir} was trained with {mixes[0]}, in this order")
    if problems:
        raise ConfigError(*(f"{problem}; start another run with run.name=NEW" for problem in problems))


def check_same_schedule(saved: dict[str, Any], config: Config) -> None:
    """Refuse to go on with another learning-rate schedule, unless `checkpoint.allow_schedule_change`.

    Raises:
        ConfigError: with one line per option that differs.
    """
    now = plain(config)
    names = ["scheduler", "optimizer.lr"]
    if config.scheduler.milestones:
        names.append("train.train_steps")  # milestones are fractions of it
    problems = [
        f"{option}={_lookup(now, option)}: {config.run.dir} was trained with {_lookup(saved, option)}, another "
        "learning-rate schedule; go on with it by checkpoint.allow_schedule_change=true"
        for name in names
        for option in _leaves(now, name)
        if _lookup(saved, option) != _lookup(now, option)
    ]
    if problems and not config.checkpoint.allow_schedule_change:
        raise ConfigError(*problems)


def mix(config: Config) -> dict[str, float]:
    """Weights of the training sources by name, in their order, which decides whose turn it is first.

    Their paths may change: what they hold is compared.
    """
    return {source_name(source): source.weight for source in config.data.train}


def check_same_data(saved: dict[str, str], now: dict[str, str], checkpoint: Path) -> None:
    """Refuse to go on with other documents than a checkpoint's, even under the same path.

    Raises:
        ConfigError: with one line per source that differs.
    """
    problems = [
        f"data {name}: holds other documents than when {checkpoint} was saved (fingerprint {digest[:12]}..., then "
        f"{saved.get(name, 'none')[:12]}...); restore them, or start another run with run.name=NEW"
        for name, digest in now.items()
        if saved.get(name) != digest
    ]
    if problems:
        raise ConfigError(*problems)


def changed_options(saved: dict[str, Any], config: Config) -> list[str]:
    """Options that differ from those of a checkpoint, as 'optimizer.lr: 0.004 -> 0.001'."""
    now = plain(config)
    return [
        f"{option}: {_lookup(saved, option)} -> {_lookup(now, option)}"
        for group in now
        for option in _leaves(now, group)
        if _lookup(saved, option) != _lookup(now, option)
    ]


def _leaves(config: dict[str, Any], name: str) -> list[str]:
    value = _lookup(config, name)
    return [leaf for key in value for leaf in _leaves(config, f"{name}.{key}")] if isinstance(value, dict) else [name]


def _lookup(config: dict[str, Any], name: str) -> Any:
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
