"""Loss on held-out data."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_moe.config.schema import DataConfig
from megatron_moe.data.dataset import SequenceDataset
from megatron_moe.data.sampler import micro_batches
from megatron_moe.train.step import Pipeline


@torch.no_grad()
def held_out_loss(
    pipeline: Pipeline, dataset: SequenceDataset, num_samples: int, options: DataConfig, device: torch.device
) -> float:
    """Mean language-model loss in nats per token over the first samples, without balance losses.

    The layout runs whole micro batches on every rank, and a multiple of the stages if interleaved: samples that this
    adds do not count.

    Args:
        pipeline: of this rank.
        dataset: held-out sequences.
        num_samples: to count.
        options: how documents are kept apart.
        device: of the batches.
    """
    for chunk in pipeline.model:
        chunk.eval()
    at_once = pipeline.micro_batch_size * pipeline.pg_collection.dp.size()
    multiple = pipeline.pg_collection.pp.size() if len(pipeline.model) > 1 else 1
    batches = [
        micro_batches(
            dataset,
            first_sample=0,
            end=num_samples,
            micro_batch_size=pipeline.micro_batch_size,
            options=options,
            pg_collection=pipeline.pg_collection,
            device=device,
        )
        for _ in pipeline.model
    ]
    num_micro_batches = math.ceil(num_samples / (at_once * multiple)) * multiple
    loss = pipeline.run(batches, num_micro_batches, forward_only=True)
    dist.all_reduce(loss)
    return (loss[0] / loss[1]).item()
