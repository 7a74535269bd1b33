"""Loss on held-out data."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_moe.data.dataset import SequenceDataset
from megatron_moe.data.sampler import micro_batches
from megatron_moe.train.step import Pipeline


def round_up(num_samples: int, pipeline: Pipeline) -> int:
    """At least `num_samples` in whole micro batches on every rank, and a multiple of the stages if interleaved."""
    step = pipeline.micro_batch_size * pipeline.pg_collection.dp.size()
    if len(pipeline.model) > 1:
        step *= pipeline.pg_collection.pp.size()
    return math.ceil(num_samples / step) * step


@torch.no_grad()
def held_out_loss(pipeline: Pipeline, dataset: SequenceDataset, num_samples: int, device: torch.device) -> float:
    """Mean language-model loss in nats per token over the first samples, without balance losses.

    Args:
        pipeline: of this rank.
        dataset: held-out sequences.
        num_samples: as `round_up` gives it; the numbers wrap around.
        device: of the batches.
    """
    for chunk in pipeline.model:
        chunk.eval()
    at_once = pipeline.micro_batch_size * pipeline.pg_collection.dp.size()
    batches = [
        micro_batches(
            dataset,
            first_sample=0,
            micro_batch_size=pipeline.micro_batch_size,
            pg_collection=pipeline.pg_collection,
            device=device,
        )
        for _ in pipeline.model
    ]
    loss = pipeline.run(batches, num_samples // at_once, forward_only=True)
    dist.all_reduce(loss)
    return (loss[0] / loss[1]).item()
