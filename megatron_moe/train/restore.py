"""A trained run in one process: to evaluate, take apart or talk to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatron_moe.checkpoint.checkpointer import load_weights
from megatron_moe.checkpoint.run_folder import find_checkpoint, run_config
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Config, KernelsConfig, OverlapConfig, ParallelConfig, RecomputeConfig
from megatron_moe.data.tokenizer import load_tokenizer, num_ids
from megatron_moe.distributed.context import distributed
from megatron_moe.model.acceleration import accelerators_of
from megatron_moe.model.build import build_chunks, in_precision
from megatron_moe.model.transformer_config import transformer_config
from megatron_moe.train.step import Pipeline


@dataclass(frozen=True)
class RestoredRun:
    """A run's configuration and its newest weights, on one device."""

    config: Config
    folder: Path
    checkpoint: Path
    pipeline: Pipeline
    device: torch.device

    def tokenizer(self, path: Path | None = None) -> Tokenizer:
        """The tokenizer at `path`, by default the run's own.

        Raises:
            ConfigError: there is none, or it has more entries than the model.
        """
        path = path or self.folder / "tokenizer.json"
        if not path.exists():
            raise ConfigError(f"{path}: no such file; give the model's tokenizer.json with --tokenizer")
        tokenizer, vocab_size = load_tokenizer(path), self.config.model.vocab_size
        if num_ids(tokenizer) > vocab_size:
            raise ConfigError(
                f"tokenizer {path}: has {num_ids(tokenizer)} entries, the model model.vocab_size={vocab_size}; "
                "give the one that it was trained with"
            )
        return tokenizer

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Of the next token after each, [b, s] ids to [b, s, vocab_size]."""
        (model,) = self.pipeline.model
        positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        self.pipeline.begin_micro_batch({"tokens": tokens, "position_ids": positions, "sample_ids": positions[:, 0]})
        mask = None  # causal, but for a model that was built to be given one
        if self.config.data.reset_attention_mask:
            mask = torch.ones(1, 1, *2 * tokens.shape[1:], dtype=torch.bool, device=self.device).triu(diagonal=1)
        return model(tokens, positions, mask)


@contextmanager
def restored(folder: Path) -> Iterator[RestoredRun]:
    """Build the model of a run in this process and load its newest checkpoint, of any layout.

    Raises:
        ConfigError: the folder is no run, holds no checkpoint, or one of forced routing.
    """
    config = read_config(folder)
    if config.model.forced_routing is not None:
        raise ConfigError(
            f"{folder}: model.forced_routing={config.model.forced_routing.value} was for measurements only, the model "
            "learned nothing; give another run"
        )
    checkpoint = find_checkpoint(folder)
    with distributed(config.parallel) as context:
        mcore_config = transformer_config(config, accelerators_of(context.device))
        chunks = build_chunks(config, mcore_config, context.pg_collection, context.device)
        model = in_precision(chunks, mcore_config)
        load_weights(model, checkpoint, config.model)
        for chunk in model:
            chunk.eval()
        pipeline = Pipeline(model, context.pg_collection, config.data.sequence_length, config.train.micro_batch_size)
        yield RestoredRun(config, folder, checkpoint, pipeline, context.device)


def read_config(folder: Path) -> Config:
    """The configuration a run left, laid out for one process; device groups stay as trained.

    What makes training smaller or faster is left out.
    """
    config = without_performance_options(run_config(folder))
    config.model.num_device_groups = config.model.num_device_groups or config.parallel.expert_model_parallel_size
    config.parallel = ParallelConfig()
    config.train.deterministic = False
    return config


def without_performance_options(config: Config) -> Config:
    """A copy without what makes training smaller or faster and may need a GPU; the parameters are the same."""
    return dataclasses.replace(
        config,
        recompute=RecomputeConfig(),
        kernels=KernelsConfig(),
        overlap=OverlapConfig(),
        precision=dataclasses.replace(config.precision, fp8=None),
    )
