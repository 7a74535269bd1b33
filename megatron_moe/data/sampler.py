"""Which samples a rank sees when: a function of the samples consumed so far."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import DataConfig
from megatron_moe.data.dataset import BlendedDataset, SequenceDataset
from megatron_moe.distributed import signals


def micro_batches(
    dataset: SequenceDataset,
    *,
    first_sample: int,
    end: int | None = None,
    micro_batch_size: int,
    options: DataConfig,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
    record: Path | None = None,
) -> Iterator[dict[str, Tensor]]:
    """This rank's micro batches, without end, from sample `first_sample` on.

    Every `micro_batch_size` samples go to the next data-parallel rank, so a global batch is a contiguous range of
    samples for any number of ranks and any micro batch. From sample `end` on, the loss mask is 0.
    Each sample's number, number of its source and digest of its tokens go to `record`, a JSON object a line.

    Raises:
        ConfigError: a sample cannot be read.

    Yields:
        tokens, labels, position_ids: [b, s] int64; under context parallelism this rank's two chunks of s.
        loss_mask: [b, s] float32, 1 where the loss counts.
        attention_mask: [b, 1, s, whole s] bool, True where attention is not allowed; only if documents are to be apart.
        sample_ids: [b] int64.
    """
    stride = micro_batch_size * pg_collection.dp.size()
    start = first_sample + micro_batch_size * pg_collection.dp.rank()
    loader = DataLoader(
        _MicroBatches(dataset, micro_batch_size, options, end),
        batch_size=None,
        sampler=itertools.count(start, stride),
        num_workers=options.num_workers,
        worker_init_fn=_init_reader,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # it draws a seed, which is not to come from the run's own numbers
    )
    for first, batch in zip(itertools.count(start, stride), loader, strict=False):
        if isinstance(batch, ConfigError):
            raise batch
        if record is not None:
            _write_record(record, dataset, first, batch["tokens"])
        here = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        here = get_batch_on_this_cp_rank(here, cp_group=pg_collection.cp)
        yield {**here, "sample_ids": torch.arange(first, first + micro_batch_size, device=device)}


def _init_reader(_: int) -> None:
    """In a process that reads ahead; a function with a name can be sent to it."""
    signals.leave_to_parent()


class _MicroBatches(Dataset):
    """Micro batches by their first sample."""

    def __init__(self, dataset: SequenceDataset, size: int, options: DataConfig, end: int | None) -> None:
        self.dataset = dataset
        self.size = size
        self.options = options
        self.end = end

    def __getitem__(self, first: int) -> dict[str, Tensor] | ConfigError:
        try:
            return self._read(first)
        except ConfigError as error:
            return error  # raised here in a reader's process, it would arrive as the text of a traceback

    def _read(self, first: int) -> dict[str, Tensor]:
        samples = range(first, first + self.size)
        if self.end is not None:
            samples = [min(sample, self.end - 1) for sample in samples]  # those beyond do not count
        ids = torch.from_numpy(np.stack([self.dataset[sample] for sample in samples]))  # [b, s + 1]
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        batch = {
            "tokens": tokens,
            "labels": labels,
            "position_ids": torch.arange(tokens.shape[1]).repeat(self.size, 1),
            "loss_mask": torch.ones(tokens.shape),
        }
        options = self.options
        if options.eod_mask_loss or options.reset_position_ids or options.reset_attention_mask:
            lengths = [self.dataset.document_lengths(sample) for sample in samples]
            batch |= by_document(lengths, options)
        if self.end is not None:
            batch["loss_mask"][max(self.end - first, 0) :] = 0.0
        return batch


def by_document(lengths: list[np.ndarray], options: DataConfig) -> dict[str, Tensor]:
    """What keeps the documents of a sequence apart, as far as it is asked for.

    Args:
        lengths: of the documents of each sequence, which add up to s + 1.
        options: eod_mask_loss, reset_position_ids, reset_attention_mask.

    Returns:
        Some of loss_mask and position_ids, [b, s], and attention_mask, [b, 1, s, s]; see `micro_batches`.
    """
    number = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths])  # of the document, [b, s + 1]
    begin = np.stack([np.repeat(np.cumsum(row) - row, row) for row in lengths])
    same = torch.from_numpy(number[:, :-1] == number[:, 1:])
    result = {}
    if options.eod_mask_loss:
        result["loss_mask"] = same.float()
    if options.reset_position_ids:
        result["position_ids"] = torch.from_numpy((np.arange(begin.shape[1]) - begin)[:, :-1])
    if options.reset_attention_mask:
        document = torch.from_numpy(number[:, :-1])
        other = document[:, :, None] != document[:, None, :]
        result["attention_mask"] = (other | torch.ones_like(other).triu(diagonal=1))[:, None]
    return result


def _write_record(path: Path, dataset: SequenceDataset, first: int, tokens: Tensor) -> None:
    with path.open("a", encoding="utf-8") as file:
        for sample, row in enumerate(tokens.numpy(), start=first):
            digest = hashlib.sha256(row.astype("<i8").tobytes()).hexdigest()
            source = dataset.place(sample)[0] if isinstance(dataset, BlendedDataset) else 0
            file.write(json.dumps({"sample": sample, "source": source, "sha256": digest}) + "\n")
