"""Core attention against explicitly materialised scores."""

import pytest
import torch

from tests.helpers.ranks import run_ranks


def explicit(query, key, value, scale):
    scores = torch.einsum("sbad,tbad->bast", query, key) * scale
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bast,tbad->sbad", scores.softmax(-1), value).flatten(2)


def attend(k_channels: int, v_channels: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients of this rank's chunks, ours and explicit."""
    import os

    import torch.distributed as dist
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.attention import ScaledDotProductAttention
    from megatron_moe.model.transformer_config import transformer_config
    from tests.helpers.training import tiny_config

    size = int(os.environ["WORLD_SIZE"])
    config = tiny_config(f"parallel.context_parallel_size={size}", world_size=size)
    with distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context:
        attention = ScaledDotProductAttention(
            transformer_config(config),
            1,
            AttnMaskType.causal,
            "self",
            softmax_scale=0.3,
            pg_collection=context.pg_collection,
        )
        torch.manual_seed(0)  # the same whole tensors on every rank
        whole = [torch.randn(16, 2, 4, width, requires_grad=True) for width in (k_channels, k_channels, v_channels)]
        cotangent = torch.randn(16, 2, 4 * v_channels)
        expected = explicit(*whole, 0.3)
        expected_gradients = torch.autograd.grad((expected * cotangent).sum(), whole)
        rows = torch.arange(16).chunk(2 * size)
        rows = torch.cat((rows[context.rank], rows[2 * size - 1 - context.rank])) if size > 1 else torch.arange(16)
        mine = [x.detach()[rows].requires_grad_() for x in whole]
        output = attention(*mine, None)
        gradients = torch.autograd.grad((output * cotangent[rows]).sum(), mine)
        dist.barrier()
    return [output.detach(), *gradients], [x[rows].detach() for x in (expected, *expected_gradients)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("k_channels", "v_channels"), [(16, 16), (24, 16), (16, 24)])
def test_equals_explicit_scores(ranks: int, k_channels: int, v_channels: int) -> None:
    for ours, theirs in run_ranks(attend, ranks, k_channels, v_channels):
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
