"""Rules between options. Pure; imports no torch. Every problem is collected, none stops the search for others."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_moe.config.derived import (
    expert_tensor_parallel_size,
    model_parallel_size,
    num_chunks,
    required_world_size,
    source_name,
)
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.model_rules import model_problems
from megatron_moe.config.performance_rules import performance_problems
from megatron_moe.config.rules import divides, divisors, lookup, wrong_signs
from megatron_moe.config.schema import Config, DataConfig, DataKind, DataSource


def validate(config: Config, launched: int | None) -> int:
    """Check a configuration.

    Args:
        config: typed, options in place.
        launched: ranks that a launcher has started; None without one.

    Returns:
        Ranks that run it: those launched, or as many as it asks for.

    Raises:
        ConfigError: with one line per problem: option, value, rule, what would work.
    """
    of_wrong_sign = dict(wrong_signs(config))
    if of_wrong_sign:
        config = _with_ones(config, of_wrong_sign)  # so that the rules below can divide
    problems = [*of_wrong_sign.values()]
    world_size = launched or required_world_size(config.parallel)
    for problem in _rule_problems(config, world_size):
        if not any(re.search(rf"\b{option.split('.')[-1]}\b", problem) for option in of_wrong_sign):
            problems.append(problem)
    if problems:
        raise ConfigError(*problems)
    return world_size


def _rule_problems(config: Config, world_size: int) -> Iterator[str]:
    for rule in (_run, _logger, model_problems, performance_problems, _data, _schedule):
        yield from rule(config)
    yield from _profile(config, world_size)
    misplaced = [*_placement(config), *_pipeline(config)]
    yield from misplaced
    # How many replicas there will be is open while the layout is wrong.
    yield from _batch(config, 1) if misplaced else _ranks(config, world_size)


def _with_ones(config: Config, options: Iterable[str]) -> Config:
    config = copy.deepcopy(config)
    for option in options:
        group, _, name = option.rpartition(".")
        setattr(lookup(config, group), name, 1)
    return config


def _run(config: Config) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=,+-]*", config.run.name):
        yield (
            f"run.name={config.run.name!r}: letters, digits and any of _ . = , + - only, and no leading dot "
            "(it is a folder's name)"
        )


def _logger(config: Config) -> Iterator[str]:
    """What Weights & Biases would refuse."""
    options = config.logger
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", options.wandb_project):
        yield f"logger.wandb_project={options.wandb_project!r}: 1 to 128 characters, and none of / \\ # ? % :"
    for tag in options.wandb_tags:
        if not 1 <= len(tag) <= 64:
            yield f"logger.wandb_tags={options.wandb_tags}: {tag!r} must have 1 to 64 characters"


def _placement(config: Config) -> Iterator[str]:
    if config.model.num_experts:
        yield from divides(config, "parallel.expert_model_parallel_size", "model.num_experts")
    for whole in ("num_attention_heads", "vocab_size", "ffn_hidden_size"):
        yield from divides(config, "parallel.tensor_model_parallel_size", f"model.{whole}")
    if config.model.num_experts:
        yield from _expert_placement(config)
    tensor = config.parallel.tensor_model_parallel_size
    context = config.parallel.context_parallel_size
    slices = tensor * (2 * context if context > 1 else 1)
    if config.data.sequence_length % slices:
        yield (
            f"data.sequence_length={config.data.sequence_length}: must be a multiple of {slices} "
            f"(tensor_model_parallel_size={tensor} slices of each of {slices // tensor} context-parallel chunks)"
        )


def _expert_placement(config: Config) -> Iterator[str]:
    parallel, width = config.parallel, config.model.expert_ffn_hidden_size
    tensor, expert_tensor = parallel.tensor_model_parallel_size, expert_tensor_parallel_size(parallel)
    if width % expert_tensor:
        yield (
            f"parallel.expert_tensor_parallel_size={expert_tensor}: must divide model.expert_ffn_hidden_size={width}; "
            f"possible: {divisors(width)}"
        )
    if parallel.expert_model_parallel_size == 1 and expert_tensor != tensor:
        yield (
            f"parallel.expert_tensor_parallel_size={expert_tensor}: must equal tensor_model_parallel_size={tensor} "
            "while expert_model_parallel_size=1 (megatron-core would not reduce the experts' gradients)"
        )
    shared_width = config.model.num_shared_experts * width
    if shared_width % tensor:
        yield (
            f"parallel.tensor_model_parallel_size={tensor}: must divide the shared experts' width {shared_width}; "
            f"possible: {divisors(shared_width)}"
        )


def _pipeline(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    chunks = num_chunks(parallel)
    if virtual > 1 and stages == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size={virtual}: needs "
            "parallel.pipeline_model_parallel_size of at least 2"
        )
    layout = parallel.pipeline_layout
    if layout is None:
        if chunks > model.num_layers:
            yield (
                f"parallel.pipeline_model_parallel_size={stages} x virtual_pipeline_model_parallel_size={virtual}: "
                f"{chunks} stages for model.num_layers={model.num_layers}, and none may be empty; at most "
                f"{model.num_layers}"
            )
    elif len(layout) != chunks or sum(layout) != model.num_layers or min(layout) < 1:
        yield (
            f"parallel.pipeline_layout={list(layout)}: must list {chunks} numbers (pipeline_model_parallel_size="
            f"{stages} x virtual_pipeline_model_parallel_size={virtual}), each at least 1, that add up to "
            f"model.num_layers={model.num_layers}"
        )


def _ranks(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    replica = model_parallel_size(parallel)
    if world_size % replica:
        yield (
            f"{world_size} ranks: must be a multiple of {replica} (tensor_model_parallel_size="
            f"{parallel.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{parallel.pipeline_model_parallel_size} x context_parallel_size={parallel.context_parallel_size})"
        )
        return
    replicas = world_size // replica
    if parallel.data_parallel_size not in (None, replicas):
        yield (
            f"parallel.data_parallel_size={parallel.data_parallel_size}: {world_size} ranks hold {replicas} replicas "
            f"of {replica} ranks; start {replica * parallel.data_parallel_size} ranks, or leave it null"
        )
    per_stage = world_size // parallel.pipeline_model_parallel_size
    expert_tensor = expert_tensor_parallel_size(parallel)
    expert_ranks = parallel.expert_model_parallel_size * expert_tensor
    if per_stage % expert_ranks:
        yield (
            f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} x expert_tensor_parallel_size="
            f"{expert_tensor}: must divide the {per_stage} ranks of a pipeline stage, "
            f"of {world_size} in all; possible: {divisors(per_stage)}, or a multiple of "
            f"{required_world_size(parallel)} ranks"
        )
    yield from _batch(config, replicas)


def _batch(config: Config, replicas: int) -> Iterator[str]:
    train = config.train
    at_once = train.micro_batch_size * replicas
    if train.global_batch_size % at_once:
        below = train.global_batch_size // at_once * at_once
        yield (
            f"train.global_batch_size={train.global_batch_size}: must be a multiple of {at_once} (micro_batch_size="
            f"{train.micro_batch_size} x data_parallel_size={replicas}); nearest: {below or at_once}, {below + at_once}"
        )
    elif config.parallel.virtual_pipeline_model_parallel_size > 1:
        yield from _interleaving(config, train.global_batch_size // at_once)
    if train.batch_ramp.start is not None:
        yield from _batch_ramp(config, at_once)


def _interleaving(config: Config, micro_batches: int) -> Iterator[str]:
    stages = config.parallel.pipeline_model_parallel_size
    if micro_batches % stages:
        yield (
            f"train.global_batch_size={config.train.global_batch_size}: gives {micro_batches} micro batches a rank; "
            f"the interleaved schedule needs a multiple of parallel.pipeline_model_parallel_size={stages}"
        )


def _batch_ramp(config: Config, at_once: int) -> Iterator[str]:
    ramp, full = config.train.batch_ramp, config.train.global_batch_size
    if ramp.increment is None or ramp.tokens is None or ramp.tokens < 1:
        yield (
            f"train.batch_ramp.increment={ramp.increment}, train.batch_ramp.tokens={ramp.tokens}: must both be given "
            f"with train.batch_ramp.start={ramp.start}, and at least 1"
        )
        return
    if config.parallel.virtual_pipeline_model_parallel_size > 1:
        at_once *= config.parallel.pipeline_model_parallel_size
    for name in ("start", "increment"):
        if getattr(ramp, name) % at_once:
            yield (
                f"train.batch_ramp.{name}={getattr(ramp, name)}: must be a multiple of {at_once} (micro_batch_size x "
                "data_parallel_size, x the stages of an interleaved pipeline)"
            )
    if ramp.start > full or (full - ramp.start) % ramp.increment:
        yield (
            f"train.batch_ramp.start={ramp.start}: must reach train.global_batch_size={full} in whole increments of "
            f"train.batch_ramp.increment={ramp.increment}"
        )


def _data(config: Config) -> Iterator[str]:
    data, vocab_size = config.data, config.model.vocab_size
    if data.kind is DataKind.python_stdlib:
        if data.tokenizer_vocab_size > vocab_size:
            yield (
                f"data.tokenizer_vocab_size={data.tokenizer_vocab_size}: must not exceed model.vocab_size={vocab_size}"
            )
        if data.valid_fraction == 0:
            yield "data.valid_fraction=0.0: must be above 0 with data=python_stdlib"
        if data.tokenizer_vocab_size < 260:
            yield (
                f"data.tokenizer_vocab_size={data.tokenizer_vocab_size}: a byte-level tokenizer needs at least 260 "
                "entries (256 bytes and the special tokens)"
            )
    if data.kind is DataKind.blend:
        if not data.train and not config.run.dry_run:
            yield "data.train=[]: data=blend needs at least one {path: PREFIX, weight: W}"
        for name in ("train", "valid", "test"):
            yield from _source_problems(f"data.{name}", getattr(data, name))
        yield from _held_out_problems(data)
        if data.tokenizer is not None and not any(p.is_file() for p in _tokenizer_paths(data.tokenizer)):
            yield (
                f"data.tokenizer={data.tokenizer}: no such file; the tokenizer.json that made the ids, its folder, or "
                "null"
            )
    elif data.train or data.valid or data.test or data.test_fraction or data.tokenizer:
        yield (
            "data.train, data.valid, data.test, data.test_fraction, data.tokenizer: only data=blend reads them; "
            f"data.kind is {data.kind.value}"
        )


def _tokenizer_paths(tokenizer: str) -> list[Path]:
    return [Path(tokenizer), Path(tokenizer) / "tokenizer.json"]


def _held_out_problems(data: DataConfig) -> Iterator[str]:
    for part in ("valid", "test"):
        share = getattr(data, f"{part}_fraction")
        if share and getattr(data, part):
            yield f"data.{part}_fraction={share}: must be 0 where data.{part} names datasets; give one of the two"
    if data.valid_fraction + data.test_fraction >= 1:
        yield (
            f"data.valid_fraction={data.valid_fraction}, data.test_fraction={data.test_fraction}: must leave documents "
            "to train on"
        )


def _source_problems(option: str, sources: list[DataSource]) -> Iterator[str]:
    for source in sources:
        missing = [
            f"{source.path}{ending}" for ending in (".bin", ".idx") if not Path(f"{source.path}{ending}").is_file()
        ]
        if missing:
            yield (
                f"{option} path={source.path}: no such file: {', '.join(missing)}; give the path without its ending "
                "(tools/preprocess_data.py writes both files)"
            )
        if not 0 < source.weight < math.inf:
            yield f"{option} path={source.path} weight={source.weight}: must be positive"
    names = [source_name(source) for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{option} name={name}: of several datasets; give each its own with name=..., for the metrics"
    for name in names:
        if not re.fullmatch(r"[\w.=,+-]+", name):
            yield f"{option} name={name!r}: letters, digits and any of _ . = , + - only (it is part of a metric)"


def _schedule(config: Config) -> Iterator[str]:
    milestones = list(config.scheduler.milestones)
    if milestones != sorted(milestones) or not all(0 < m <= 1 for m in milestones):
        yield f"scheduler.milestones={milestones}: must rise within 0 and 1, as fractions of the run"
    train = config.train
    if train.exit_step is not None and train.exit_step > train.train_steps:
        yield f"train.exit_step={train.exit_step}: must not exceed train.train_steps={train.train_steps}"
    if train.spike_window < 2:
        yield f"train.spike_window={train.spike_window}: must be at least 2, for a standard deviation"
    source = config.checkpoint.init_from
    if source is not None and not (Path(source) / "checkpoints").is_dir():
        yield f"checkpoint.init_from={source}: holds no checkpoints; the folder of a run or of an imported model"


def _profile(config: Config, world_size: int) -> Iterator[str]:
    profile, train_steps = config.profile, config.train.train_steps
    if not all(1 <= step <= train_steps for step in profile.steps):
        yield f"profile.steps={list(profile.steps)}: must be steps from 1 to train.train_steps={train_steps}"
    if profile.steps and not (profile.ranks and all(0 <= rank < world_size for rank in profile.ranks)):
        yield f"profile.ranks={list(profile.ranks)}: must be ranks from 0 to {world_size - 1}, at least one"
