"""Which samples a rank sees when: a function of the samples consumed so far."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_moe.data.dataset import SequenceDataset


def micro_batches(
    dataset: SequenceDataset,
    *,
    first_sample: int,
    micro_batch_size: int,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro batches, without end, from sample `first_sample` on.

    Every `micro_batch_size` samples go to the next data-parallel rank, so a global batch is a contiguous range of
    samples for any number of ranks and any micro batch.

    Yields:
        tokens, labels, position_ids: [b, s] int64; under context parallelism this rank's two chunks of s.
        sample_ids: [b] int64.
    """
    stride = micro_batch_size * pg_collection.dp.size()
    start = first_sample + micro_batch_size * pg_collection.dp.rank()
    while True:
        rows = np.stack([dataset[start + i] for i in range(micro_batch_size)])  # [b, s + 1]
        ids = torch.from_numpy(rows).to(device, non_blocking=True)
        batch = {
            "tokens": ids[:, :-1].contiguous(),
            "labels": ids[:, 1:].contiguous(),
            "position_ids": torch.arange(ids.shape[1] - 1, device=device).repeat(micro_batch_size, 1),
        }
        batch = get_batch_on_this_cp_rank(batch, cp_group=pg_collection.cp)
        yield {**batch, "sample_ids": torch.arange(start, start + micro_batch_size, device=device)}
        start += stride
