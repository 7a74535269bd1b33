"""One forward and backward pass through the pipeline, and one update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_moe.distributed import in_place, watchdog
from megatron_moe.metrics.timers import Timers, all_to_all_measured
from megatron_moe.model.build import routers
from megatron_moe.model.router import Batch, Router
from megatron_moe.optim.optimizer import clip_and_update, prepare_gradients
from megatron_moe.train.agreement import Agreement, agree
from megatron_moe.train.guard import Guard

Batches = Iterator[Batch]


@dataclass(frozen=True)
class StepResult:
    """What one training step yields, the same on all ranks.

    Attributes:
        agreement: the loss, and what else all ranks know.
        grad_norm: of all parameters on all ranks, before clipping.
        num_micro_batches: that each rank ran.
        skipped: why nothing was updated; None: it was.
    """

    agreement: Agreement
    grad_norm: float
    num_micro_batches: int
    skipped: str | None


@dataclass(frozen=True)
class Pipeline:
    """How this rank runs micro batches: megatron-core's schedule for its place in the pipeline."""

    model: list[DistributedDataParallel]
    pg_collection: ProcessGroupCollection
    sequence_length: int
    micro_batch_size: int

    def run(self, batches: list[Batches], num_micro_batches: int, *, forward_only: bool) -> Tensor:
        """Forward, and backward unless `forward_only`, of `num_micro_batches` from one iterator per model chunk.

        Returns:
            Sum of the language-model loss in nats, and number of targets that count, [2] float32; of this rank, 0 but
            on the last pipeline stage. Balance losses are in the gradient only.
        """
        schedule = get_forward_backward_func(
            self.pg_collection.pp.size(), len(self.model) if len(self.model) > 1 else None
        )
        pipelined = self.pg_collection.pp.size() > 1
        losses = schedule(
            forward_step_func=self._forward_step,
            data_iterator=batches if len(batches) > 1 else batches[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=num_micro_batches,
            seq_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
            pg_collection=self.pg_collection,
            **({"p2p_communicator": self._communicator()} if pipelined else {}),
        )
        return sum(losses, torch.zeros(2, device=self.device))

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.model[0].parameters()).device

    @cached_property
    def timers(self) -> Timers:
        """Of the training steps."""
        return Timers(self.device)

    @cached_property
    def routers(self) -> list[Router]:
        """Of all chunks, in layer order."""
        return routers(self.model)

    def _forward_step(
        self, batches: Batches, model: torch.nn.Module, return_schedule_plan: bool = False
    ) -> tuple[Any, Any]:
        """The losses of the next micro batch; for overlap.overlap_moe_expert_parallel_comm the plan of its layers."""
        watchdog.alive()
        batch = next(batches)
        self.begin_micro_batch(batch)
        forward = model.build_schedule_plan if return_schedule_plan else model
        losses = forward(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
        return losses, partial(_sum_loss, batch["loss_mask"])

    def gather_weights(self) -> None:
        """Wait for the weights that overlap.overlap_param_gather leaves to the next forward pass. On all ranks."""
        for chunk in self.model:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def begin_micro_batch(self, batch: Batch) -> None:
        """Tell the modules that work with more than their input which micro batch comes."""
        for module in self._listeners:
            module.begin_micro_batch(batch)

    @cached_property
    def _listeners(self) -> list[Any]:
        return [m for chunk in self.model for m in chunk.modules() if hasattr(m, "begin_micro_batch")]

    def _communicator(self) -> P2PCommunicator:
        return P2PCommunicator(self.pg_collection.pp, get_model_config(self.model[0]))


def train_step(
    pipeline: Pipeline,
    optimizer: ChainedOptimizer,
    batches: list[Batches],
    num_micro_batches: int,
    guard: Guard | None = None,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    save_ready: Callable[[], bool] = lambda: True,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward, backward and update over one global batch.

    Args:
        pipeline: of this rank.
        optimizer: of its parameters.
        batches: one iterator over the same micro batches for each model chunk.
        num_micro_batches: to take from each.
        guard: skips the update where it must not be done; None: it always is.
        stop_requested: whether this rank was asked to stop, asked once after the backward pass.
        save_ready: whether this rank is ready for what comes next of the save under way, asked at the same time.
        before_update: waits until nothing else reads weights and moments.

    Raises:
        TrainingError: on all ranks: too many steps were skipped in a row.
    """
    timers = pipeline.timers
    timers.begin_step()
    for chunk in pipeline.model:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    for router in pipeline.routers:
        router.reset_counters()
    get_model_config(pipeline.model[0]).finalize_model_grads_func = _finalize_gradients
    with timers.measure("forward_backward"), all_to_all_measured(timers):
        loss = pipeline.run(batches, num_micro_batches, forward_only=False)
    with timers.measure("optimizer"):
        grad_norm, finite_gradient = prepare_gradients(optimizer)
        agreement = agree(loss, finite_gradient=finite_gradient, stop=stop_requested(), saved=save_ready())
    skipped = guard.judge(agreement.loss, grad_norm, finite=agreement.finite) if guard is not None else None
    if skipped is None:
        before_update()
        with timers.measure("optimizer"):
            clip_and_update(optimizer, grad_norm)
    return StepResult(agreement, grad_norm, num_micro_batches, skipped)


def _finalize_gradients(model: list[DistributedDataParallel], *args: Any, **options: Any) -> None:
    for chunk in model:
        in_place.reset_unwritten(chunk.parameters())
    finalize_model_grads(model, *args, **options)


def _sum_loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of losses [b, s]: the sum of those that count, what the gradient divides it by, and sum and number to report.

    The gradient divides by all of b * s: divided by those that count in this micro batch, it would depend on how
    sequences are spread over micro batches and ranks.
    """
    total = (losses.float() * mask).sum()
    size = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, size, torch.stack((total.detach(), mask.sum()))
