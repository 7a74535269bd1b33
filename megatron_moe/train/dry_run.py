"""A run that is not started: each distinct rank is built without memory, and compared with the plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from rich.console import Console
from rich.table import Table

from megatron_moe.checkpoint.compatibility import check_start
from megatron_moe.checkpoint.coverage import Box, Layout, problems_of_coverage
from megatron_moe.config.derived import expert_tensor_parallel_size
from megatron_moe.config.errors import TrainingError
from megatron_moe.config.schema import Config, DataKind, ParallelConfig
from megatron_moe.distributed.context import one_of_many
from megatron_moe.model.build import build_model, sharded_tensors
from megatron_moe.optim.optimizer import build_optimizer
from megatron_moe.plan.memory import static_bytes
from megatron_moe.plan.params import RankParams, rank_params
from megatron_moe.plan.pipeline import layers_by_stage
from megatron_moe.plan.placement import Placement, describe_layout, placements
from megatron_moe.train.restore import without_performance_options

Module = TypeVar("Module", bound=torch.nn.Module)

MOST_UNPLANNED = 0.1  # of the bytes: megatron-core pads its buffers
PADDING = 2**21  # bytes, which are more than that of very small models only


@dataclass(frozen=True)
class Built:
    """What megatron-core gives one rank.

    Attributes:
        params: parameters.
        layers: layer numbers from 0, one list per virtual stage.
        experts: routed experts, one list per MoE layer.
        static_bytes: of weights, gradients and optimizer state.
        boxes: the parts of tensors that it would save: name, shape of the whole, place in it.
    """

    params: RankParams
    layers: list[list[int]]
    experts: list[list[int]]
    static_bytes: int
    boxes: list[tuple[str, tuple[int, ...], Box]]


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: what is planned for each of its ranks, and what distinct ones were given.

    Attributes:
        places: of its ranks.
        params: planned for each rank.
        static_bytes: planned for the fullest.
        built: by rank.
    """

    places: list[Placement]
    params: RankParams
    static_bytes: float
    built: dict[int, Built]

    @property
    def most_bytes(self) -> int:
        """Of the fullest rank."""
        return max(found.static_bytes for found in self.built.values())


def dry_run(config: Config, world_size: int) -> None:
    """Print what the ranks hold, a line for each pipeline stage.

    Args:
        config: validated for `world_size` ranks.
        world_size: of the run.

    Raises:
        ConfigError: the run's folder, or that of `checkpoint.init_from`, holds checkpoints that do not fit.
        TrainingError: what is built differs from the plan.
    """
    check_start(config)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"dry run of {describe_layout(config.parallel, world_size)}", markup=False)
    stages = build_stages(config, world_size)
    console.print(_table(config, stages))
    found = [each for stage in stages for each in stage.built.values()]
    if problems := [*(line for stage in stages for line in differences(stage)), *problems_of_tensors(config, found)]:
        raise TrainingError("\n".join(("what is built is not what was planned:", *problems)))
    if config.data.kind is DataKind.blend and not config.data.train:
        console.print("data.train=[]: the run itself needs at least one {path: PREFIX, weight: W}", markup=False)
    console.print(f"dry run: {world_size:,} ranks, {len(found):,} distinct, all as planned", markup=False)


def build_stages(config: Config, world_size: int) -> list[Stage]:
    """Build the distinct ranks, one after the other, in this process."""
    places = placements(config.model, config.parallel, world_size)
    distinct = distinct_ranks(config.parallel, world_size)
    return [
        Stage(
            places=[place for place in places if place.stage == stage],
            params=rank_params(config.model, config.parallel, layers),
            static_bytes=sum(static_bytes(config, world_size, layers)),
            built={rank: build_rank(config, rank, world_size) for rank in distinct[stage]},
        )
        for stage, layers in enumerate(layers_by_stage(config.model, config.parallel))
    ]


def distinct_ranks(parallel: ParallelConfig, world_size: int) -> list[list[int]]:
    """Of each pipeline stage the ranks that stand for all.

    The first ones, which are each other's tensor- and expert-parallel ranks, hold every part of every tensor; the share
    of the optimizer's state is largest on the first and smallest on the last.
    """
    per_stage = world_size // parallel.pipeline_model_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * expert_tensor_parallel_size(parallel)
    first = max(parallel.tensor_model_parallel_size, expert_ranks)
    within = sorted({*range(first), per_stage - 1})
    return [[start + rank for rank in within] for start in range(0, world_size, per_stage)]


def build_rank(config: Config, rank: int, world_size: int) -> Built:
    """Build model and optimizer of a rank as a start does, on the meta device, and nothing that needs a GPU."""
    config = without_performance_options(config)
    with one_of_many(config.parallel, rank, world_size) as context:
        model = build_model(config, context.pg_collection, context.device)
        optimizer = build_optimizer(config, model, context.pg_collection)
        return Built(
            params=_params(model),
            layers=[[layer.layer_number - 1 for layer in _modules(chunk, TransformerLayer)] for chunk in model],
            experts=[layer.local_expert_indices for chunk in model for layer in _modules(chunk, MoELayer)],
            static_bytes=_buffer_bytes(model) + _optimizer_bytes(optimizer),
            boxes=[
                (tensor.key, tensor.global_shape, _box(tensor))
                for chunk in model
                for tensor in sharded_tensors(chunk.module.sharded_state_dict())
                if is_main_replica(tensor.replica_id)
            ],
        )


def _modules(chunk: torch.nn.Module, kind: type[Module]) -> list[Module]:
    return [module for module in chunk.modules() if isinstance(module, kind)]


def _params(model: list[DistributedDataParallel]) -> RankParams:
    sizes = [(".experts." in name, param.numel()) for chunk in model for name, param in chunk.named_parameters()]
    routed = sum(size for is_routed, size in sizes if is_routed)
    return RankParams(dense=sum(size for _, size in sizes) - routed, experts=routed)


def _buffer_bytes(model: list[DistributedDataParallel]) -> int:
    """Of weights and gradients, which lie in megatron-core's buffers."""
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return sum(buffer.param_data.nbytes + buffer.grad_data.nbytes for buffer in buffers)


def _optimizer_bytes(optimizer: ChainedOptimizer) -> int:
    """Of the moments, and of the main parameters where they are not the weights themselves."""
    parts = optimizer.chained_optimizers
    main = [param for part in parts for group in part.shard_fp32_from_float16_groups for param in group]
    moments = [value for part in parts for state in part.optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in (*main, *moments))


def _box(tensor: ShardedTensor) -> Box:
    sizes = (*(1 for _ in range(tensor.prepend_axis_num)), *tensor.local_shape)
    return tuple((start, start + size) for start, size in zip(tensor.global_offset, sizes, strict=True))


def differences(stage: Stage) -> Iterator[str]:
    """What ranks were given that was not planned: parameters, layers, experts, bytes; a line each."""
    for rank, found in stage.built.items():
        (place,) = (place for place in stage.places if rank in place.ranks)
        for what, planned, there in (
            ("parameters", stage.params, found.params),
            ("layers", place.layers, found.layers),
            ("experts", [list(place.experts or ())] * len(found.experts), found.experts),
        ):
            if planned != there:
                yield f"rank {rank}: {what} {there}, planned {planned}"
    most = stage.most_bytes
    if not (1 - MOST_UNPLANNED) * most - PADDING <= stage.static_bytes <= most:
        yield f"stage {place.stage}: {most:,} bytes of weights, gradients and optimizer, planned {stage.static_bytes:,}"


def problems_of_tensors(config: Config, built: Iterable[Built]) -> list[str]:
    """What of the model's tensors no rank would save, or more than one; a line each."""
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, list[Box]] = defaultdict(list)
    for name, shape, box in (entry for found in built for entry in found.boxes):
        shapes[name] = shape
        boxes[name].append(box)
    layouts = {name: Layout(shape, tuple(boxes[name])) for name, shape in shapes.items()}
    return problems_of_coverage(layouts, config.model, with_optimizer=False)


def _table(config: Config, stages: list[Stage]) -> Table:
    table = Table("stage", "ranks", "layers", "parameters", "planned", "GiB", "planned", box=None)
    for number, stage in enumerate(stages):
        ranks = sorted(rank for place in stage.places for rank in place.ranks)
        _, layers, _ = stage.places[0].describe(config.model)
        first = next(iter(stage.built.values()))
        table.add_row(
            str(number),
            f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]),
            layers,
            f"{first.params.total:,}",
            f"{stage.params.total:,}",
            f"{stage.most_bytes / 2**30:.2f}",
            f"{stage.static_bytes / 2**30:.2f}",
        )
    return table
