"""A Hugging Face folder as a run with one checkpoint of weights, a few rows at a time; without megatron-core."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from megatron_moe.checkpoint.dcp import NewTensor, Rows, write_checkpoint
from megatron_moe.checkpoint.manifest import write_manifest
from megatron_moe.checkpoint.run_folder import new_folder, plain, read_json
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import CONF_DIR, compose_config
from megatron_moe.config.schema import Config, Dtype, ModelConfig, PrecisionConfig, RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.files import write_json
from megatron_moe.hugging_face.config import from_hf_config, in_their_names
from megatron_moe.hugging_face.exporter import SHOWN, Summary
from megatron_moe.hugging_face.names import Source, hf_tensors, sources
from megatron_moe.hugging_face.safetensors import TORCH_DTYPES, StoredTensor, open_folder
from megatron_moe.hugging_face.tokenizer import FILE, find_tokenizer
from megatron_moe.model.names import extra_states, other_name, our_tensors

IGNORED = ".rotary_emb.inv_freq"  # follows from rope_theta; older files hold it
EMBEDDING = "model.embed_tokens.weight"
Sources = dict[tuple[str, int | None], list[Source]]


def import_model(hf: Path, output: Path, *, tokenizer: Path | None = None) -> Summary:
    """Write a run's folder with the weights of a Hugging Face folder; it appears whole or not at all.

    Args:
        hf: with `config.json` and safetensors files.
        output: new, or empty.
        tokenizer: a `tokenizer.json` or its folder; the folder's own if None.

    Raises:
        ConfigError: files are missing or damaged, or describe a model that ours cannot be; nothing is written.
    """
    fields = read_json(hf / "config.json")
    model = from_hf_config(fields, _model_name(output))
    stored = {name: tensor for name, tensor in open_folder(hf).items() if not name.endswith(IGNORED)}
    _check_tensors(hf, model, stored)
    parts = sources(model)
    _check_types(hf, parts, stored)
    vocabulary = find_tokenizer(hf, tokenizer, model.vocab_size)
    config = _config(model, fields, output, stored)
    tensors = _new_tensors(model, parts, stored)
    with new_folder(output) as partial:
        _write_settings(partial, config)
        if vocabulary:
            shutil.copyfile(vocabulary.path, partial / FILE)
        checkpoint = partial / "checkpoints" / "step_00000000"
        checkpoint.mkdir(parents=True)
        write_checkpoint(checkpoint, tensors, extra_states(model), _reader(parts, stored))
        state = {"step": 0, "consumed_samples": 0, "world_size": 0, "weights_only": True, "config": plain(config)}
        write_json(checkpoint / "state.json", state)
        write_manifest(checkpoint)
    sizes = [(math.prod(tensor.shape), tensor.dtype.itemsize) for tensor in tensors]
    return Summary(
        tensors=len(tensors),
        parameters=sum(size for size, _ in sizes),
        nbytes=sum(size * item for size, item in sizes),
        files=1,
        tokenizer=vocabulary is not None,
        model=model.name,
    )


def _model_name(output: Path) -> str:
    """The folder's name as the choice `model=NAME`; not that of one of our own models, which would go before it."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", output.resolve().name) or "model"
    return f"{name}_hf" if (CONF_DIR / "model" / f"{name}.yaml").exists() else name


def _check_tensors(hf: Path, model: ModelConfig, stored: dict[str, StoredTensor]) -> None:
    shapes = {tensor.name: tensor.shape for tensor in hf_tensors(model)}
    missing = [name for name in shapes if name not in stored]
    extra = [name for name in stored if name not in shapes]
    wrong = [
        f"{name} is {list(stored[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in stored and stored[name].shape != shape
    ]
    kinds = (
        (missing, "tensors that config.json asks for are missing"),
        (extra, "tensors are of no model that config.json describes"),
        (wrong, "tensors have another shape than config.json asks for"),
    )
    problems = [f"{hf}: {len(names)} {what}: {_first(names)}" for names, what in kinds if names]
    if problems:
        raise ConfigError(*problems)


def _check_types(hf: Path, parts: Sources, stored: dict[str, StoredTensor]) -> None:
    """Refuse types that no model of ours has, and parts of one tensor of ours in different types."""
    odd = [f"{name} is {tensor.dtype}" for name, tensor in stored.items() if tensor.dtype not in TORCH_DTYPES]
    if odd:
        raise ConfigError(f"{hf}: {len(odd)} tensors are neither F32 nor BF16: {_first(odd)}")
    types: dict[str, tuple[str, str]] = {}
    for (key, _), group in parts.items():
        for source in group:
            dtype = stored[source.name].dtype
            name, first = types.setdefault(key, (source.name, dtype))
            if dtype != first:
                raise ConfigError(f"{hf}: {name} is {first}, {source.name} {dtype}: must be the same, as in {key}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _config(model: ModelConfig, fields: dict, output: Path, stored: dict[str, StoredTensor]) -> Config:
    """A whole configuration around the model; validated."""
    length = fields.get("max_position_embeddings")
    if type(length) is not int:
        raise ConfigError(f"max_position_embeddings={length}: not supported; supported: positive integers")
    config = compose_config(["data=mock"])
    config = dataclasses.replace(
        config,
        run=RunConfig(name=model.name, dir=str(output)),
        model=model,
        data=dataclasses.replace(config.data, sequence_length=length),
        precision=PrecisionConfig(dtype=Dtype.bf16 if stored[EMBEDDING].dtype == "BF16" else Dtype.fp32),
    )
    try:
        validate(config, None)
    except ConfigError as error:
        raise ConfigError(*(in_their_names(problem) for problem in error.problems)) from None
    return config


def _new_tensors(model: ModelConfig, parts: Sources, stored: dict[str, StoredTensor]) -> list[NewTensor]:
    """The tensors of the checkpoint; norms under both names that megatron-core may ask for."""
    tensors = []
    for key, tensor in our_tensors(model).items():
        stacked = tensor.stack is not None
        source = parts[key, 0 if stacked else None][0]
        alias = other_name(key)
        dtype = TORCH_DTYPES[stored[source.name].dtype]
        tensors.append(NewTensor(key, dtype, tensor.shape, stacked, () if alias is None else (alias,)))
    return tensors


def _reader(parts: Sources, stored: dict[str, StoredTensor]) -> Callable[[str, Rows], torch.Tensor]:
    def read(key: str, rows: Rows) -> torch.Tensor:
        group = parts[key, rows.index]
        example = stored[group[0].name]
        out = torch.empty((rows.count, *example.shape[1:]), dtype=TORCH_DTYPES[example.dtype])
        end = rows.first + rows.count
        position = 0
        for source in group:
            first, last = max(position, rows.first), min(position + source.count, end)
            if first < last:
                part = out[first - rows.first : last - rows.first]
                stored[source.name].read_rows(source.first + first - position, part)
            position += source.count
        return out

    return read


def _write_settings(folder: Path, config: Config) -> None:
    """`config.yaml` of the run, and the model as a choice of the group `model`."""
    options = plain(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    (folder / "model").mkdir()
    model_file = folder / "model" / f"{config.model.name}.yaml"
    model_file.write_text(yaml.safe_dump(options["model"], sort_keys=False), encoding="utf-8")
