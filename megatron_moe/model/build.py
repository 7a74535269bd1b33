"""From a configuration to this rank's model chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.config.schema import Attention, Config
from megatron_moe.model.acceleration import accelerators_of, check_accelerators, data_parallel_fields
from megatron_moe.model.cross_entropy import vocab_parallel_cross_entropy
from megatron_moe.model.layer_spec import block_spec
from megatron_moe.model.local_dispatcher import dispatch_locally
from megatron_moe.model.positions import PositionIds
from megatron_moe.model.router import DeepSeekMoERouter, HashRouter, Router, router_builder
from megatron_moe.model.transformer_config import transformer_config


def build_model(
    config: Config, pg_collection: ProcessGroupCollection, device: torch.device
) -> list[DistributedDataParallel]:
    """This rank's chunks (one per virtual stage), initialized, in megatron-core's data-parallel wrapper.

    Args:
        config: validated.
        pg_collection: groups of this rank.
        device: where parameters live; on the meta device there is nothing to initialize.

    Raises:
        ConfigError: the configuration asks for what this rank does not have.
    """
    accelerators = accelerators_of(device)
    check_accelerators(config, accelerators)
    mcore_config = transformer_config(config, accelerators)
    chunks = build_chunks(config, mcore_config, pg_collection, device)
    if device.type != "meta":
        for chunk in chunks:
            initialize(chunk, seed=config.train.seed, std=config.model.init_method_std)
    chunks = in_precision(chunks, mcore_config)
    ddp_config = DistributedDataParallelConfig(**data_parallel_fields(config, accelerators))
    model = [
        DistributedDataParallel(
            mcore_config,
            ddp_config,
            chunk,
            disable_bucketing=number > 0,  # sent while other chunks compute anyway, as in Megatron-LM
            pg_collection=pg_collection,
        )
        for number, chunk in enumerate(chunks)
    ]
    if ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        mcore_config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    return model


def in_precision(chunks: list[GPTModel], mcore_config: TransformerConfig) -> list[torch.nn.Module]:
    """The chunks in the type that they compute in."""
    return [Float16Module(mcore_config, chunk) for chunk in chunks] if mcore_config.bf16 else chunks


def build_chunks(
    config: Config,
    mcore_config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    device: torch.device,
) -> list[GPTModel]:
    """This rank's chunks, uninitialized. On the meta device nothing is allocated."""
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    stages = range(virtual) if virtual > 1 else [None]
    with torch.device(device):
        return [_build_chunk(config, mcore_config, pg_collection, stage) for stage in stages]


def _build_chunk(
    config: Config,
    mcore_config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None,
) -> GPTModel:
    parallel = config.parallel
    pp_rank, pp_size = pg_collection.pp.rank(), pg_collection.pp.size()
    last_virtual = parallel.virtual_pipeline_model_parallel_size - 1
    is_mla = config.model.attention is Attention.mla
    spec = block_spec(
        mcore_config,
        router_builder(config),
        vp_stage=vp_stage,
        pp_rank=pp_rank,
        within_documents=config.data.reset_attention_mask,
    )
    chunk = GPTModel(
        config=mcore_config,
        transformer_layer_spec=spec,
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.data.sequence_length,
        pre_process=pp_rank == 0 and vp_stage in (None, 0),
        post_process=pp_rank == pp_size - 1 and vp_stage in (None, last_virtual),
        share_embeddings_and_output_weights=False,
        position_embedding_type="none" if is_mla else "rope",  # MLA rotates by itself
        rotary_base=config.model.rotary_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    dispatch_locally(chunk)
    if config.data.reset_position_ids:
        chunk.batch_position_ids = PositionIds(chunk)
    if torch.get_default_device().type == "cpu":
        chunk.compute_language_model_loss = partial(_language_model_loss, pg_collection.tp)
    return chunk


def _language_model_loss(group: dist.ProcessGroup, labels: Tensor, logits: Tensor) -> Tensor:
    """[b, s], of labels [b, s] and logits [s, b, vocabulary of this rank]."""
    return vocab_parallel_cross_entropy(logits, labels.T, group).T


@torch.no_grad()
def initialize(chunk: GPTModel, *, seed: int, std: float) -> None:
    """Draw N(0, std) for every matrix and 1 for every norm, the same in every layout.

    A tensor's values depend on the seed, its name and its place in the whole model, never on the ranks: each rank
    draws the whole tensor and keeps its slice.

    Source: arXiv:2401.06066, 4.1.3 (0.006 for all learnable parameters).
    """
    for tensor in sharded_tensors(chunk.sharded_state_dict()):
        if len(tensor.global_shape) - tensor.prepend_axis_num == 1:
            tensor.data.fill_(1.0)
        else:
            _draw(tensor, seed, std)


def _draw(tensor: ShardedTensor, seed: int, std: float) -> None:
    place = tensor.global_offset[: tensor.prepend_axis_num]
    digest = hashlib.sha256(f"{seed}/{tensor.key}/{place}".encode()).digest()
    generator = torch.Generator(tensor.data.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    shape = tensor.global_shape[tensor.prepend_axis_num :]
    offset = tensor.global_offset[tensor.prepend_axis_num :]
    whole = torch.empty(shape, device=tensor.data.device).normal_(0.0, std, generator=generator)
    local = tensor.data.shape[-len(shape) :]
    window = tuple(slice(start, start + size) for start, size in zip(offset, local, strict=True))
    tensor.data.copy_(whole[window].view_as(tensor.data))


def sharded_tensors(state_dict: ShardedStateDict) -> Iterator[ShardedTensor]:
    """All tensors of a sharded state dict; a fused matrix (gate and up) as its parts."""
    for entry in nested_values(state_dict):
        if isinstance(entry, ShardedTensorFactory):
            yield from (part for part in nested_values(entry.build()) if isinstance(part, ShardedTensor))
        elif isinstance(entry, ShardedTensor):
            yield entry


def routers(chunks: Sequence[torch.nn.Module]) -> list[Router]:
    """The routers of this rank, in layer order."""
    found = [m for chunk in chunks for m in chunk.modules() if isinstance(m, DeepSeekMoERouter | HashRouter)]
    return sorted(found, key=lambda router: router.layer_number)
