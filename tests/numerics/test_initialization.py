"""N(0, 0.006) for every matrix (arXiv:2401.06066, 4.1.3), the output layer included; ones for norms."""

import numpy as np
import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_run


def moments(overrides: list[str]) -> dict[str, tuple[int, float, float, int]]:
    with tiny_run([*overrides, "model.init_method_std=0.006"]) as (run, _, _):
        parameters = dict(run.pipeline.model[0].module.named_parameters())
        return {n: (p.ndim, p.mean().item(), p.std().item(), p.numel()) for n, p in parameters.items()}


@pytest.mark.parametrize("overrides", [[], ["model.attention=mla", "model.q_lora_rank=24"]])
def test_every_parameter(overrides: list[str]) -> None:
    (found,) = run_ranks(moments, 1, overrides)
    assert {"output_layer.weight", "decoder.layers.1.mlp.router.weight"} < found.keys()
    for name, (ndim, mean, std, size) in found.items():
        if ndim == 1:
            assert (mean, std) == (1.0, 0.0), name
        else:
            assert abs(mean) < 5 * 0.006 / np.sqrt(size), name
            assert std == pytest.approx(0.006, rel=5 / np.sqrt(size)), name


def draws(seed: int) -> list[float]:
    with tiny_run([f"train.seed={seed}"]) as (run, _, _):
        return [p.flatten()[0].item() for p in run.pipeline.model[0].parameters() if p.ndim > 1]


def test_every_tensor_is_drawn_apart_and_follows_the_seed() -> None:
    one, same, other = (run_ranks(draws, 1, seed)[0] for seed in (1, 1, 2))
    assert one == same
    assert not set(one) & set(other)
    assert len(set(one)) == len(one)
