"""Sums and parts sent in place are those that gloo sends with copies."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_ranks


def both_ways() -> tuple[torch.Tensor, ...]:
    """This rank's part of the sum, and the gathered parts: theirs, then ours."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    from megatron_moe.distributed import in_place

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["MEGATRON_MOE_INIT_METHOD"], rank=rank, world_size=size)
    in_place.install()
    found = []
    for scatter, gather in (
        (in_place.SCATTER, in_place.GATHER),
        (buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func),
    ):
        whole = torch.randn(size * 1000, generator=torch.Generator().manual_seed(rank))
        part = whole.view(size, -1)[rank]
        scatter(part, whole, op=dist.ReduceOp.SUM, group=dist.group.WORLD, async_op=False)
        found.append(part.clone())
        gather(whole, part, group=dist.group.WORLD, async_op=False)
        found.append(whole)
    return tuple(found)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_same_bits(ranks: int) -> None:
    results = run_ranks(both_ways, ranks)
    for part, whole, our_part, our_whole in results:
        assert torch.equal(part, our_part)
        assert torch.equal(whole, our_whole)
        assert torch.equal(whole, results[0][1])
