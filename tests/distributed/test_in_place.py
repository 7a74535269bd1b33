"""Gradients sent, reset and clipped in place are what they are with copies."""

import os
import platform
import resource
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_run


def both_ways() -> tuple[torch.Tensor, ...]:
    """This rank's part of the sum, and the gathered parts: theirs, then ours."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    from megatron_moe.distributed import in_place

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["MEGATRON_MOE_INIT_METHOD"], rank=rank, world_size=size)
    theirs = buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func
    in_place.install()
    in_place.SCATTER = in_place.GATHER = None  # which would copy
    ours = buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func
    found = []
    for scatter, gather in (theirs, ours):
        whole = torch.randn(size * 1000, generator=torch.Generator().manual_seed(rank))
        part = whole.view(size, -1)[rank]
        scatter(part, whole, op=dist.ReduceOp.SUM, group=dist.group.WORLD, async_op=False)
        found.append(part.clone())
        gather(whole, part, group=dist.group.WORLD, async_op=False)
        found.append(whole)
    return tuple(found)


def sent_in_training() -> bool:
    from megatron.core.distributed import param_and_grad_buffer as buffers

    from megatron_moe.distributed import in_place

    with tiny_run([]):
        return buffers.dist_reduce_scatter_func is in_place._reduce


def test_training_sends_in_place() -> None:
    assert run_ranks(sent_in_training, 1) == [True]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_same_bits(ranks: int) -> None:
    results = run_ranks(both_ways, ranks)
    for part, whole, our_part, our_whole in results:
        assert torch.equal(part, our_part)
        assert torch.equal(whole, our_whole)
        assert torch.equal(whole, results[0][1])


def of_a_second_step(theirs: bool) -> dict[str, Any]:
    """The gradients of a step after one whose gradients are not numbers, clipped."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    from megatron_moe.train.step import train_step

    reset, stale = _ParamAndGradBuffer.reset, []
    with tiny_run(["run.dir=without_checkpoints", "optimizer.clip_grad=0.01"]) as (run, batches, num_micro_batches):
        if theirs:
            _ParamAndGradBuffer.reset = reset
            clip_grads.multi_tensor_scale_impl = local_multi_tensor_scale
            clip_grads.l2_norm_impl = local_multi_tensor_l2_norm
        named = list(run.pipeline.model[0].named_parameters())
        for _, parameter in named:
            parameter.main_grad.fill_(torch.nan)
            stale += [parameter] if hasattr(parameter, "main_grad_is_stale") else []
        result = train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
        assert len(stale) == 6  # two for each layer with experts
        return {name: parameter.main_grad.clone() for name, parameter in named} | {"norm": result.grad_norm}


def test_reset_and_clipped_in_place() -> None:
    (ours,), (theirs,) = (run_ranks(of_a_second_step, 1, theirs) for theirs in (False, True))
    norm = theirs.pop("norm")
    assert norm > 0.01
    assert ours.pop("norm") == pytest.approx(norm, rel=1e-6)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-6, atol=1e-9, msg=name)


def norm_of_many() -> list[float]:
    """Of 10 M gradients, ours and in float64."""
    from megatron_moe.distributed import in_place

    gradients = [torch.randn(10**7, generator=torch.Generator().manual_seed(0)), torch.ones(3, 2)]
    norm, _ = in_place._norm(0, torch.zeros(1), [gradients], False)
    return [*norm.tolist(), torch.cat([gradient.flatten().double() for gradient in gradients]).norm().item()]


def test_norm_of_many() -> None:
    ((ours, expected),) = run_ranks(norm_of_many, 1)
    assert ours == pytest.approx(expected, rel=3e-5)  # `torch.norm` is 5e-4 off


def pages_for_many_tensors() -> int:
    """That the system gave for 20 of 64 MiB, one after the other."""
    from megatron_moe.distributed import in_place

    in_place.install()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt's thresholds are those of glibc, which CI has")
def test_freed_memory_is_used_again() -> None:
    assert run_ranks(pages_for_many_tensors, 1)[0] < 5 * 2**14


def gradients_nobody_wrote() -> list[bool]:
    from megatron.core.utils import get_model_config

    from megatron_moe.train.step import train_step

    with tiny_run(["run.dir=without_checkpoints"]) as (run, batches, num_micro_batches):
        train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
        (chunk,) = run.pipeline.model
        chunk.zero_grad_buffer()
        get_model_config(chunk).finalize_model_grads_func([chunk])
        return [bool(parameter.main_grad.any()) for parameter in chunk.parameters()]


def test_what_nobody_wrote_is_zero() -> None:
    (found,) = run_ranks(gradients_nobody_wrote, 1)
    assert len(found) > 10
    assert not any(found)
