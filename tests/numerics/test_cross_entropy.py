"""Our cross-entropy against PyTorch's in fp64."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.helpers.ranks import run_ranks

SHAPE = (6, 5, 24)  # s, b, vocabulary


def of_part(dtype: torch.dtype, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [s, b], and the gradient of this rank's part of the logits."""
    from megatron_moe.model import cross_entropy

    cross_entropy.BLOCK = block
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rendezvous = os.environ["MEGATRON_MOE_INIT_METHOD"]
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=rendezvous)
    logits, labels, of_loss = inputs(dtype)
    part = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
    losses = cross_entropy.vocab_parallel_cross_entropy(part * 1, labels, dist.group.WORLD)
    losses.backward(of_loss)
    return losses.detach(), part.grad


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Logits, of which some are large, labels, and the gradient of the losses."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(SHAPE, generator=generator) * 30).to(dtype)
    labels = torch.randint(SHAPE[-1], SHAPE[:2], generator=generator)
    return logits, labels, torch.rand(SHAPE[:2], generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("ranks", "block"), [(1, 2**19), (1, 50), (1, 1), (2, 50)])
def test_equals_pytorchs(ranks: int, block: int, dtype: torch.dtype, tolerance: float) -> None:
    logits, labels, of_loss = inputs(dtype)
    logits = logits.double().requires_grad_()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    expected.backward(of_loss.double())
    found = run_ranks(of_part, ranks, dtype, block)
    for losses, _ in found:
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    gradient = torch.cat([part for _, part in found], dim=-1)
    assert gradient.dtype is dtype
    torch.testing.assert_close(gradient.double(), logits.grad, rtol=tolerance, atol=1e-7)


def test_no_second_copy_of_logits() -> None:
    (is_same,) = run_ranks(gradient_is_in_place, 1)
    assert is_same


def gradient_is_in_place() -> bool:
    from megatron_moe.model.cross_entropy import vocab_parallel_cross_entropy

    dist.init_process_group("gloo", rank=0, world_size=1, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"])
    values, labels, of_loss = inputs(torch.float32)
    logits = values.requires_grad_() * 1
    places = []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    vocab_parallel_cross_entropy(logits, labels, dist.group.WORLD).backward(of_loss)
    return places == [logits.data_ptr()]
