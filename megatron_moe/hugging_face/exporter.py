"""A run's checkpoint as a Hugging Face folder, a few rows at a time; without megatron-core."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.dcp import Rows, SavedTensors, pieces
from megatron_moe.checkpoint.manifest import check_whole
from megatron_moe.checkpoint.run_folder import find_checkpoint, new_folder, saved_config
from megatron_moe.config.derived import num_device_groups
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Config
from megatron_moe.files import write_json
from megatron_moe.hugging_face.config import to_hf_config
from megatron_moe.hugging_face.names import HfTensor, hf_tensors
from megatron_moe.hugging_face.safetensors import NAMES, TensorToWrite, write_folder
from megatron_moe.hugging_face.tokenizer import TokenizerFile, find_tokenizer
from megatron_moe.model.names import other_name, our_tensors

TORCH_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
SHOWN = 3  # names in an error


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was written."""

    tensors: int
    parameters: int
    nbytes: int
    files: int
    tokenizer: bool
    model: str


def export_run(
    run: Path,
    output: Path,
    *,
    step: int | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Summary:
    """Write a checkpoint as a Hugging Face folder, which appears whole or not at all.

    Args:
        run: its folder.
        output: new, or empty.
        step: of the checkpoint; the newest if None.
        tokenizer: a `tokenizer.json` or its folder; the run's own if None.
        dtype: of the tensors; as they are saved if None.
        max_shard_bytes: of a file's tensors.

    Raises:
        ConfigError: there is no such checkpoint, or Hugging Face has no such model.
    """
    checkpoint = find_checkpoint(run, step)
    check_whole(checkpoint)
    config = saved_config(checkpoint)
    fields = _fields(config)
    vocabulary = find_tokenizer(run, tokenizer, config.model.vocab_size)
    saved = SavedTensors(checkpoint)
    shapes = {key: tensor.shape for key, tensor in our_tensors(config.model).items()}
    keys = _saved_names(saved, shapes)
    tensors = {tensor.name: tensor for tensor in hf_tensors(config.model)}
    planned = [
        TensorToWrite(name, dtype or saved.dtype(keys[tensor.places[0].key]), tensor.shape)
        for name, tensor in tensors.items()
    ]

    def values(tensor: TensorToWrite) -> Iterator[torch.Tensor]:
        return (part.to(tensor.dtype) for part in _rows(saved, keys, tensors[tensor.name]))

    with new_folder(output) as partial:
        files = write_folder(partial, planned, values, max_shard_bytes)
        _write_settings(partial, fields, planned[0].dtype, vocabulary)
    return Summary(
        tensors=len(planned),
        parameters=sum(math.prod(tensor.shape) for tensor in planned),
        nbytes=sum(tensor.nbytes for tensor in planned),
        files=files,
        tokenizer=vocabulary is not None,
        model=fields["model_type"],
    )


def _fields(config: Config) -> dict[str, Any]:
    groups = num_device_groups(config.model, config.parallel)
    model = dataclasses.replace(config.model, num_device_groups=groups)
    return to_hf_config(model, config.data.sequence_length)


def _saved_names(saved: SavedTensors, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """The name in the checkpoint of each tensor of ours.

    Raises:
        ConfigError: one is missing, has another shape, or a type that is not exported.
    """
    names = {key: next((n for n in (key, other_name(key)) if n in saved.tensors), None) for key in shapes}
    missing = [key for key, name in names.items() if name is None]
    problems = [f"{len(missing)} tensors missing: {', '.join(missing[:SHOWN])}"] if missing else []
    for key, name in names.items():
        if name is None:
            continue
        if saved.shape(name) != shapes[key]:
            problems.append(f"{name}: shape {saved.shape(name)}, the configuration asks for {shapes[key]}")
        if saved.dtype(name) not in NAMES:
            problems.append(f"{name}: {saved.dtype(name)}; float32 and bfloat16 are exported")
    if problems:
        raise ConfigError(*(f"{saved.folder}: {problem}" for problem in problems[:SHOWN]))
    return names


def _rows(saved: SavedTensors, keys: dict[str, str], tensor: HfTensor) -> Iterator[torch.Tensor]:
    """The values of a Hugging Face tensor, in consecutive parts."""
    for place in tensor.places:
        key = keys[place.key]
        row_bytes = math.prod(tensor.shape[1:]) * saved.dtype(key).itemsize
        for rows in pieces(Rows(place.index, place.first, place.count), row_bytes):
            yield saved.read(key, rows)


def _write_settings(folder: Path, fields: dict[str, Any], dtype: torch.dtype, tokenizer: TokenizerFile | None) -> None:
    """Everything but the tensors. Without a tokenizer, its tokens are null: transformers' defaults are another's."""
    tokens = {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": tokenizer.eos_id if tokenizer else None,
    }
    write_json(folder / "config.json", fields | {"torch_dtype": TORCH_NAMES[dtype]} | tokens)
    write_json(folder / "generation_config.json", {**tokens, "pad_token_id": tokens["eos_token_id"]})
    if tokenizer:
        tokenizer.write(folder, fields["max_position_embeddings"])
