"""Saving and resuming with megatron-core's distributed checkpoints, which any layout of the same model can load."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer

from megatron_moe.checkpoint.run_folder import find_checkpoint, plain, read_json, saved_config, saved_steps
from megatron_moe.checkpoint.state import TrainState
from megatron_moe.config.derived import source_name
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import from_plain
from megatron_moe.config.schema import Config, ModelConfig
from megatron_moe.optim.optimizer import load_state

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


@dataclasses.dataclass(frozen=True)
class Checkpointer:
    """Checkpoints of one run, in `checkpoints/step_NNNNNNNN` of its folder.

    `fingerprints` are those of the training data, by source.

    A save is written beside its final name, which it gets when every rank has finished: what has that name is whole.
    """

    config: Config
    model: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    fingerprints: dict[str, str]

    @property
    def folder(self) -> Path:
        """All checkpoints of the run."""
        return Path(self.config.run.dir) / "checkpoints"

    def save(self, state: TrainState) -> Path:
        """Save after `state.step` steps; on all ranks."""
        final = self.folder / f"step_{state.step:08}"
        partial = final.with_suffix(".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(self.sharded_state_dict(is_loading=False), str(partial))
        if dist.get_rank() == 0:
            description = {
                **dataclasses.asdict(state),
                "world_size": dist.get_world_size(),
                "data": self.fingerprints,
                "config": plain(self.config),
            }
            (partial / "state.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in saved_steps(self.folder)[: -self.config.checkpoint.keep_last]:
                shutil.rmtree(old)
        dist.barrier()
        return final

    def load_latest(self) -> tuple[TrainState, list[str]]:
        """Load the newest checkpoint, or where there is none the weights of `checkpoint.init_from`; on all ranks.

        Returns:
            Where the run stands, and the options that have changed since.

        Raises:
            ConfigError: the checkpoint is of another model or of other data.
        """
        saved = saved_steps(self.folder)
        if not saved:
            if self.config.checkpoint.init_from is not None:
                load_weights(self.model, find_checkpoint(Path(self.config.checkpoint.init_from)), self.config.model)
                self.optimizer.reload_model_params()
            return TrainState(), []
        description, saved_options = read_json(saved[-1] / "state.json"), plain(saved_config(saved[-1]))
        if description.get("weights_only"):
            raise ConfigError(
                f"run.dir={self.config.run.dir}: holds an imported model, weights only; start another run with "
                f"checkpoint.init_from={self.config.run.dir} and another run.name"
            )
        check_same_run(saved_options, self.config)
        check_same_data(description.get("data", {}), self.fingerprints, saved[-1])
        same_ranks = description["world_size"] == dist.get_world_size()
        request = self.sharded_state_dict(is_loading=True, with_rng=same_ranks)
        loaded = dist_checkpointing.load(request, str(saved[-1]))
        for name, chunk in _named_chunks(self.model):
            chunk.load_state_dict(loaded[name])
        for part, state in zip(self._optimizer_parts(), loaded["optimizer"], strict=True):
            load_state(part, state, description["step"])
        if same_ranks:
            torch.set_rng_state(loaded["rng"].view(-1))
        state = TrainState(description["step"], description["consumed_samples"])
        return state, changed_options(saved_options, self.config)

    def sharded_state_dict(self, *, is_loading: bool, with_rng: bool = True) -> dict[str, Any]:
        """This rank's tensors with their names and places in the whole model."""
        state: dict[str, Any] = {name: chunk.sharded_state_dict() for name, chunk in _named_chunks(self.model)}
        # Only the tensors, each under its parameter's name: how many optimizers and groups there are depends on the
        # layout (mcore 0.16.1, distrib_optimizer.py, sharded_state_dict).
        state["optimizer"] = [
            part.sharded_param_state_fully_reshardable(state, is_loading, metadata={})
            for part in self._optimizer_parts()
        ]
        if with_rng:
            place = (0, dist.get_rank(), dist.get_world_size())
            state["rng"] = ShardedTensor.from_rank_offsets("rng", torch.get_rng_state()[None], place)
        return state

    def _optimizer_parts(self) -> list[DistributedOptimizer]:
        """Of this rank; the experts' has nothing on a stage without experts."""
        return [part for part in self.optimizer.chained_optimizers if part.optimizer.state]


def load_weights(model: list[torch.nn.Module], checkpoint: Path, expected: ModelConfig) -> None:
    """Load the parameters of a checkpoint of the same architecture, whatever its layout; on all ranks.

    Args:
        model: chunks of this rank, with or without their data-parallel wrapper.
        checkpoint: a folder `step_NNNNNNNN`.
        expected: of `model`.

    Raises:
        ConfigError: the checkpoint is of another architecture.
    """
    saved, wanted = plain(saved_config(checkpoint).model), plain(expected)
    free = FREE_OPTIONS if expected.device_limit else FREE_OPTIONS | {"num_device_groups"}
    problems = [
        f"model.{name}={wanted[name]}: {checkpoint} has {saved[name]}"
        for name in wanted
        if name not in free and wanted[name] != saved[name]
    ]
    if problems:
        raise ConfigError(*problems)
    request = {name: chunk.sharded_state_dict() for name, chunk in _named_chunks(model)}
    loaded = dist_checkpointing.load(request, str(checkpoint))
    for name, chunk in _named_chunks(model):
        chunk.load_state_dict(loaded[name])


def _named_chunks(model: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """megatron-core's own names for virtual stages, which its optimizer expects."""
    chunks = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in model]
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


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
