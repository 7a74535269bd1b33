"""Rules between options. Pure; imports no torch. Every problem is collected, none stops the search for others."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_moe.config.derived import (
    expert_tensor_parallel_size,
    model_parallel_size,
    num_chunks,
    num_device_groups,
    required_world_size,
)
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Attention, Config, DataKind, Routing

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
    "data": "sequence_length tokenizer_vocab_size valid_fraction",
    "optimizer": "lr adam_eps clip_grad",
    "train": "train_steps exit_step global_batch_size micro_batch_size",
    "train.batch_ramp": "start increment tokens",
    "evaluation": "interval num_samples",
    "checkpoint": "save_interval keep_last",
    "logger": "log_interval",
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
    "data": "seed",
}
BELOW_ONE = {"model": "undropped_fraction", "optimizer": "adam_beta1 adam_beta2", "data": "valid_fraction"}


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
    of_wrong_sign = dict(_wrong_signs(config))
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
    for rule in (_run, _model, _data, _schedule):
        yield from rule(config)
    misplaced = [*_placement(config), *_pipeline(config)]
    yield from misplaced
    # How many replicas there will be is open while the layout is wrong.
    yield from _batch(config, 1) if misplaced else _ranks(config, world_size)


def _with_ones(config: Config, options: Iterable[str]) -> Config:
    config = copy.deepcopy(config)
    for option in options:
        group, _, name = option.rpartition(".")
        setattr(_lookup(config, group), name, 1)
    return config


def divisors(number: int) -> str:
    """All divisors of a number, as text."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _wrong_signs(config: Config) -> Iterator[tuple[str, str]]:
    """Options of the wrong sign, and what is wrong with them."""
    for table, is_wrong, rule in (
        (POSITIVE, lambda value: not 0 < value < math.inf, "must be positive"),
        (NOT_NEGATIVE, lambda value: not 0 <= value < math.inf, "must not be negative"),
        (BELOW_ONE, lambda value: not 0 <= value < 1, "must be at least 0 and below 1"),
    ):
        for group, names in table.items():
            for name in names.split():
                value = getattr(_lookup(config, group), name)
                if value is not None and is_wrong(value):
                    yield f"{group}.{name}", f"{group}.{name}={value}: {rule}"


def _divides(config: Config, part: str, whole: str) -> Iterator[str]:
    part_value, whole_value = (_lookup(config, name) for name in (part, whole))
    if whole_value % part_value:
        yield f"{part}={part_value}: must divide {whole}={whole_value}; possible: {divisors(whole_value)}"


def _lookup(config: Config, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def _run(config: Config) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=,+-]*", config.run.name):
        yield (
            f"run.name={config.run.name!r}: letters, digits and any of _ . = , + - only, and no leading dot "
            "(it is a folder's name)"
        )


def _model(config: Config) -> Iterator[str]:
    model = config.model
    rotary = "kv_channels" if model.attention is Attention.mha else "qk_pos_emb_head_dim"
    if getattr(model, rotary) % 2:
        yield f"model.{rotary}={getattr(model, rotary)}: must be even, rotary embedding turns pairs"
    if model.yarn.rotary_scaling_factor is not None and model.attention is Attention.mha:
        yield (
            f"model.yarn.rotary_scaling_factor={model.yarn.rotary_scaling_factor}: only model.attention=mla has YaRN; "
            "set it to null"
        )
    if model.num_dense_layers > model.num_layers:
        yield f"model.num_dense_layers={model.num_dense_layers}: there are only model.num_layers={model.num_layers}"
    elif model.num_experts == 0:
        yield from _dense_model(config)
    elif model.num_dense_layers == model.num_layers:
        yield (
            f"model.num_dense_layers={model.num_dense_layers}: must be below model.num_layers={model.num_layers}, "
            "or no layer has experts; a dense model has model.num_experts=0"
        )
    else:
        yield from _experts(config)
        yield from _device_groups(config)


def _dense_model(config: Config) -> Iterator[str]:
    model = config.model
    if model.num_dense_layers < model.num_layers:
        yield (
            f"model.num_experts=0: needs model.num_dense_layers={model.num_layers} (all layers of a dense model), "
            f"not {model.num_dense_layers}"
        )
        return
    names = (
        "num_shared_experts router_topk expert_balance_factor device_balance_factor communication_balance_factor "
        "device_limit device_capacity_factor"
    )
    for name in names.split():
        if value := getattr(model, name):
            default = "null" if name in ("device_limit", "device_capacity_factor") else 0
            yield f"model.{name}={value}: must be {default} with model.num_experts=0"
    if config.parallel.expert_model_parallel_size > 1:
        yield (
            f"parallel.expert_model_parallel_size={config.parallel.expert_model_parallel_size}: must be 1, "
            "no layer has experts"
        )


def _experts(config: Config) -> Iterator[str]:
    model = config.model
    if not 1 <= model.router_topk <= model.num_experts:
        yield f"model.router_topk={model.router_topk}: must be from 1 to model.num_experts={model.num_experts}"
    if model.routing is Routing.hash:
        if model.router_topk != 1:
            yield f"model.router_topk={model.router_topk}: model.routing=hash sends a token to 1 expert"
        names = (
            "expert_balance_factor device_balance_factor communication_balance_factor device_limit "
            "device_capacity_factor"
        )
        for name in names.split():
            if value := getattr(model, name):
                yield f"model.{name}={value}: model.routing=hash has no affinities to balance, limit or drop by"


def _device_groups(config: Config) -> Iterator[str]:
    model = config.model
    groups = num_device_groups(model, config.parallel)
    if model.num_device_groups is not None:
        yield from _divides(config, "model.num_device_groups", "model.num_experts")
    if model.communication_balance_factor and model.device_limit is None:
        yield (
            f"model.communication_balance_factor={model.communication_balance_factor}: needs model.device_limit, "
            "the number of devices that it is relative to"
        )
    if model.device_limit is not None and model.num_experts % groups == 0:
        within = model.device_limit * model.num_experts // groups
        if model.device_limit > groups:
            yield f"model.device_limit={model.device_limit}: there are only {groups} device groups"
        elif within < model.router_topk:
            yield (
                f"model.device_limit={model.device_limit}: {model.device_limit} of {groups} device groups hold "
                f"{within} experts, fewer than model.router_topk={model.router_topk}"
            )
    if model.device_capacity_factor is not None and config.parallel.context_parallel_size > 1:
        yield (
            f"model.device_capacity_factor={model.device_capacity_factor}: not with "
            f"parallel.context_parallel_size={config.parallel.context_parallel_size}, whose ranks would each drop by "
            "their own part of a sequence; set it to null"
        )


def _placement(config: Config) -> Iterator[str]:
    if config.model.num_experts:
        yield from _divides(config, "parallel.expert_model_parallel_size", "model.num_experts")
    for whole in ("num_attention_heads", "vocab_size", "ffn_hidden_size"):
        yield from _divides(config, "parallel.tensor_model_parallel_size", f"model.{whole}")
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
            f"{expert_tensor}: must divide the {per_stage} ranks of a pipeline stage; "
            f"possible: {divisors(per_stage)}"
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
        if data.tokenizer_vocab_size < 260:
            yield (
                f"data.tokenizer_vocab_size={data.tokenizer_vocab_size}: a byte-level tokenizer needs at least 260 "
                "entries (256 bytes and the special tokens)"
            )
    if data.kind is DataKind.blend:
        if not data.train:
            yield "data.train=[]: data=blend needs at least one {path: PREFIX, weight: W}"
        for name, sources in (("train", data.train), ("valid", data.valid)):
            yield from _source_problems(f"data.{name}", sources)
        if data.tokenizer is not None and not Path(data.tokenizer).is_file():
            yield f"data.tokenizer={data.tokenizer}: no such file; the tokenizer.json that made the ids, or null"
    elif data.train or data.valid or data.tokenizer:
        yield f"data.train, data.valid, data.tokenizer: only data=blend reads them; data.kind is {data.kind.value}"


def _source_problems(option: str, sources: list) -> Iterator[str]:
    for source in sources:
        missing = [
            f"{source.path}{ending}" for ending in (".bin", ".idx") if not Path(f"{source.path}{ending}").is_file()
        ]
        if missing:
            yield (
                f"{option} path={source.path}: no such file: {', '.join(missing)}; give the path without its ending "
                "(tools/preprocess_data.py writes both files)"
            )
        if source.weight <= 0:
            yield f"{option} path={source.path} weight={source.weight}: must be positive"


def _schedule(config: Config) -> Iterator[str]:
    milestones = list(config.scheduler.milestones)
    if milestones != sorted(milestones) or not all(0 < m <= 1 for m in milestones):
        yield f"scheduler.milestones={milestones}: must rise within 0 and 1, as fractions of the run"
    train = config.train
    if train.exit_step is not None and train.exit_step > train.train_steps:
        yield f"train.exit_step={train.exit_step}: must not exceed train.train_steps={train.train_steps}"
    source = config.checkpoint.init_from
    if source is not None and not (Path(source) / "checkpoints").is_dir():
        yield f"checkpoint.init_from={source}: holds no checkpoints; the folder of a run or of an imported model"
