"""Our RMSNorm against PyTorch's in fp64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(7, 3, 24), (5, 16)])
def test_equals_pytorchs(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    from megatron_moe.model.norm import RMSNorm

    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x[0] *= 1e-3  # where eps counts
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), shape[-1], eps=1e-5)
    norm.weight.data.uniform_(0.5, 2, generator=generator)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    found, expected = norm(ours), F.rms_norm(theirs, shape[-1:], weight, 1e-5)
    found.backward(gradient)
    expected.backward(gradient.double())
    assert found.dtype == dtype
    for mine, other in ((found, expected), (ours.grad, theirs.grad), (norm.weight.grad, weight.grad)):
        assert (mine.double() - other).norm() <= tolerance * other.norm()


def test_keeps_no_second_copy() -> None:
    from megatron_moe.model.norm import RMSNorm

    x = torch.randn(100, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 64)(x)
    assert [tuple(t.shape) for t in kept if t is not x] == [(64,), (100, 1)]
