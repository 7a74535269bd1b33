"""A tiny model trained as pretrain.py trains, with what tests look at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from megatron_moe.config.load import compose_config
from megatron_moe.config.schema import Config
from megatron_moe.config.validate import validate

TINY = [
    "data=mock",
    "data.sequence_length=32",
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.kv_channels=16",
    "model.vocab_size=256",
    "model.num_experts=8",
    "model.num_shared_experts=1",
    "model.router_topk=2",
    "model.expert_ffn_hidden_size=32",
    "model.expert_balance_factor=0.01",
    "model.init_method_std=0.05",  # so that 20 steps move the loss
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.train_steps=20",
    "scheduler.warmup_steps=2",
    "optimizer.lr=1e-3",
]
MLA = [
    "model.attention=mla",
    "model.kv_lora_rank=24",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=8",
    "model.v_head_dim=16",
]


def tiny_config(*overrides: str, world_size: int = 1) -> Config:
    """The tiny model, validated."""
    config = compose_config([*TINY, *overrides])
    validate(config, world_size)
    return config


@contextmanager
def tiny_run(overrides: list[str]) -> Iterator[tuple[Any, list, int]]:
    """Inside a rank: what the loop works with, its micro batches, and their number per step."""
    from megatron_moe.config.derived import num_micro_batches
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train.loop import next_batches, set_up

    world_size = int(os.environ["WORLD_SIZE"])
    config = tiny_config(*overrides, world_size=world_size)
    rendezvous = os.environ["MEGATRON_MOE_INIT_METHOD"]
    with distributed(config.parallel, init_method=rendezvous, deterministic_only=config.train.deterministic) as context:
        run = set_up(config, context)
        yield run, next_batches(run), num_micro_batches(config, world_size, 0)


def train_tiny(overrides: list[str], steps: int = 20) -> dict[str, Any]:
    """On each rank: the metrics of each step, the first step's gradients, and the held-out loss."""
    from megatron_moe.optim.optimizer import set_learning_rate
    from megatron_moe.optim.scheduler import learning_rate
    from megatron_moe.train.evaluate import held_out_loss
    from megatron_moe.train.step import train_step
    from megatron_moe.train.step_metrics import step_metrics

    with tiny_run(["run.dir=without_checkpoints", *overrides]) as (run, batches, num_micro_batches):
        metrics, gradients = [], []
        for step in range(steps):
            set_learning_rate(run.optimizer, learning_rate(run.config, step))
            result = train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
            metrics.append(step_metrics(run.config, run.context, run.pipeline.model, result))
            if step == 0:
                gradients = optimizer_shards(run.checkpointer, "exp_avg")
        valid = held_out_loss(run.pipeline, run.datasets.valid[0].sequences, 8, run.config.data, run.context.device)
        return {"metrics": metrics, "gradients": gradients, "valid": valid}


Shard = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]  # name, shape of the whole, place in it, values


def optimizer_shards(checkpointer: Any, state: str) -> list[Shard]:
    """This rank's part of one optimizer state, which after the first step is the gradient times 1 - beta 1."""
    from megatron_moe.model.build import sharded_tensors

    prefix = f"optimizer.state.{state}."
    shards = sharded_tensors(checkpointer.sharded_state_dict()["optimizer"])
    return [
        (t.key.removeprefix(prefix), t.global_shape, t.global_offset, t.data.numpy().copy())
        for t in shards
        if t.key.startswith(prefix)
    ]


def assemble(by_rank: list[list[Shard]]) -> dict[str, np.ndarray]:
    """Whole tensors from the shards of all ranks."""
    wholes: dict[str, np.ndarray] = {}
    for name, shape, offset, values in (shard for rank in by_rank for shard in rank):
        whole = wholes.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
        sizes = (1,) * (len(shape) - values.ndim) + values.shape
        window = tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))
        whole[window] = values.reshape(sizes)
    assert not any(np.isnan(whole).any() for whole in wholes.values()), "values that no rank has"
    return wholes
