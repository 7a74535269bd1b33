"""Process groups: the only place that reads rank variables and megatron-core's `parallel_state`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from megatron_moe.config.derived import expert_tensor_parallel_size
from megatron_moe.config.errors import ConfigError, Preempted
from megatron_moe.config.schema import ParallelConfig
from megatron_moe.distributed import cpu, deterministic, in_place, launch, without_te
from megatron_moe.distributed.accelerators import has_transformer_engine

T = TypeVar("T")

CREATE_GROUP = parallel_state.create_group
LIST_GROUPS = parallel_state.generate_masked_orthogonal_rank_groups


@dataclass(frozen=True)
class DistributedContext:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    pg_collection: ProcessGroupCollection

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on the main rank."""
        if self.is_main:
            print(text, flush=True)  # noqa: T201


@contextmanager
def distributed(
    parallel: ParallelConfig, *, init_method: str = "env://", deterministic_only: bool = False
) -> Iterator[DistributedContext]:
    """Join the other ranks: NCCL where every local rank has a GPU, else gloo and megatron-core on CPUs.

    Args:
        parallel: sizes of the groups; their product must fit the number of ranks (config/validate.py checks it).
        init_method: rendezvous for `torch.distributed.init_process_group`.
        deterministic_only: use nothing that may compute other bits another time.

    Yields:
        The context; all groups exist and have communicated once, so that none hangs on first use in mid-step.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if deterministic_only:
        deterministic.switch_on()
    device = _local_device()
    if not has_transformer_engine():
        without_te.install()
    _init_process_group(device, rank, world_size, init_method, timedelta(minutes=parallel.timeout_minutes))
    pg_collection = _init_model_parallel(parallel)
    _communicate_once(pg_collection, device)
    try:
        yield DistributedContext(rank, world_size, device, pg_collection)
    except Preempted:  # on all ranks
        _leave()
        raise
    _leave()  # not after an error: the other ranks do not answer, and what went wrong must be told


@contextmanager
def one_of_many(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[DistributedContext]:
    """The groups of one rank as if all others were there, for a model on the meta device: nothing is communicated.

    No GPU and no Transformer Engine is used, here or later in this process.

    Args:
        parallel: sizes of the groups, which fit `world_size`.
        rank: whose groups.
        world_size: of all ranks.

    Yields:
        The context; what is built within takes no memory.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu.install()
    without_te.install()
    _make_own_groups_only()
    dist.init_process_group(dist.Backend.FAKE, rank=rank, world_size=world_size, store=FakeStore())
    try:
        with cpu.on_meta():
            yield DistributedContext(rank, world_size, torch.device("meta"), _init_model_parallel(parallel))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        parallel_state.generate_masked_orthogonal_rank_groups, parallel_state.create_group = LIST_GROUPS, CREATE_GROUP


def _make_own_groups_only() -> None:
    """Of a thousand ranks megatron-core lists and makes thousands of groups, for each rank anew: most of a dry run."""
    parallel_state.generate_masked_orthogonal_rank_groups = lambda world_size, sizes, mask: _listed(
        world_size, tuple(sizes), tuple(mask)
    )
    parallel_state.create_group = lambda ranks, **options: (
        CREATE_GROUP(ranks, **options) if dist.get_rank() in ranks else dist.GroupMember.NON_GROUP_MEMBER
    )


@functools.cache
def _listed(world_size: int, sizes: tuple[int, ...], mask: tuple[bool, ...]) -> list[list[int]]:
    return LIST_GROUPS(world_size, list(sizes), list(mask))


def _leave() -> None:
    dist.barrier()  # rank 0 may still send what it logged, and launchers end what is left when a rank has ended
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def from_main(function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, on every rank; what it raises, too. Without process groups, here.

    Raises:
        ConfigError, OSError: as raised there.
        RuntimeError: instead of anything else, which rank 0 raises itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    answer: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            answer = [(function(), None)]
        except Exception as error:
            is_expected = isinstance(error, ConfigError | OSError)
            dist.broadcast_object_list([(None, error if is_expected else RuntimeError(f"rank 0: {error!r}"))])
            raise
    dist.broadcast_object_list(answer)
    ((result, error),) = answer
    if error is not None:
        raise error
    return result


def _local_device() -> torch.device:
    """A GPU of its own, or the CPU where there is none and where a laptop's GPUs are fewer than the workers."""
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    started_here = launch.PARENT in os.environ
    if gpus == 0 or (gpus < ranks and started_here):
        cpu.install()
        in_place.install()
        return cpu.CPU
    if 1 < gpus < ranks:
        raise ConfigError(f"{ranks} ranks on this node see {gpus} GPUs: start one rank per GPU, or none sees a GPU")
    # Slurm may show each task its own GPU only, as number 0.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    torch.cuda.set_device(device)
    return device


def _init_process_group(device: torch.device, rank: int, world_size: int, init_method: str, timeout: timedelta) -> None:
    alone = {"store": dist.HashStore()}  # needs no address and no port
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        **(alone if world_size == 1 else {"init_method": init_method}),
    )


def _init_model_parallel(parallel: ParallelConfig) -> ProcessGroupCollection:
    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size(parallel),
        distributed_timeout_minutes=parallel.timeout_minutes,
        create_gloo_process_groups=False,
    )
    # A null tracker: there is no dropout, so nothing random happens after initialization, which has its own generators.
    initialize_rng_tracker(inference_rng_tracker=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def _communicate_once(pg_collection: ProcessGroupCollection, device: torch.device) -> None:
    for field in fields(pg_collection):
        group = getattr(pg_collection, field.name)
        if isinstance(group, dist.ProcessGroup):
            dist.all_reduce(torch.ones(1, device=device), group=group)
