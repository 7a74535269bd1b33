"""What a run may change when it goes on, and what a model may change when it takes the weights of another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.run_folder import find_checkpoint, plain, saved_config, saved_steps
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


def check_start(config: Config) -> None:
    """Refuse, without loading them, checkpoints that a run would go on from and whose options do not fit.

    Raises:
        ConfigError: with one line per option that differs.
    """
    if saved := saved_steps(Path(config.run.dir) / "checkpoints"):
        options = plain(saved_config(saved[-1]))
        check_same_run(options, config)
        check_same_schedule(options, config)
    elif config.checkpoint.init_from is not None:
        source = find_checkpoint(Path(config.checkpoint.init_from))
        check_same_model(saved_config(source).model, config.model, source)


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
    problems = [
        f"{option}={now}: {config.run.dir} was trained with {then}"
        for option, then, now in _differences_among(FIXED_OPTIONS, saved, config)
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
    names = ["scheduler", "optimizer.lr"]
    if config.scheduler.milestones:
        names.append("train.train_steps")  # milestones are fractions of it
    problems = [
        f"{option}={now}: {config.run.dir} was trained with {then}, another learning-rate schedule; go on with it by "
        "checkpoint.allow_schedule_change=true"
        for option, then, now in _differences_among(names, saved, config)
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
    return [f"{option}: {then} -> {now}" for option, then, now in differences(saved, plain(config))]


def differences(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The options in which two configurations as JSON values differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            yield from differences(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))
    elif before != after:
        yield name, before, after


def _differences_among(names: Iterable[str], saved: dict[str, Any], config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Those of some options and groups, in their order."""
    found = list(differences(saved, plain(config)))
    for name in names:
        yield from (each for each in found if each[0] == name or each[0].startswith(f"{name}."))
