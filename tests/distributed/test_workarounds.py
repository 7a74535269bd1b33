"""Each work-around is needed: without it, a run that exercises it fails or is wrong. Red: delete the work-around."""

import numpy as np
import pytest

from megatron_moe.distributed import cpu, without_te
from tests.helpers import training as helpers
from tests.helpers.ranks import run_ranks
from tests.helpers.training import MLA, assemble, train_tiny

ALL = {**cpu.WORKAROUNDS, **without_te.WORKAROUNDS}
EXERCISE = {  # what needs it, where one rank of the plain model does not
    "split_sizes": ["parallel=ep2"],
    "pinned_positions": ["parallel=cp2"],
    "synchronize": ["parallel=pp2"],
    "uneven_parts": ["parallel=tp2_ep2", "parallel.expert_tensor_parallel_size=2"],
    "latent_projections": MLA,
    "generator_state": ["recompute=full"],
    "recomputed_norms": ["recompute=selective", "recompute.modules=[layernorm]"],
}
RANKS = {"split_sizes": 2, "pinned_positions": 2, "synchronize": 2, "uneven_parts": 4}


def train_without(name: str, overrides: list[str]) -> None:
    for table in (cpu.WORKAROUNDS, without_te.WORKAROUNDS):
        table.pop(name, None)
    train_tiny(overrides, steps=2)


@pytest.mark.parametrize("name", ALL)
def test_is_needed(name: str) -> None:
    with pytest.raises(AssertionError, match="Traceback"):
        run_ranks(train_without, RANKS.get(name, 1), name, EXERCISE.get(name, []))


@pytest.mark.parametrize(
    ("function", "constant"),
    [(f, "cuda") for f in cpu.DEVICE_LITERALS] + [(f, "torch.cuda.BFloat16Tensor") for f in cpu.TYPE_NAMES[1:]],
    ids=lambda value: getattr(value, "__qualname__", value),
)
def test_each_function_still_holds_its_constant(function, constant: str) -> None:
    code = getattr(function, "__func__", function).__code__
    assert constant in flatten(code.co_consts)


def flatten(constants: tuple) -> set:
    return {x for c in constants for x in (flatten(c) if isinstance(c, tuple) else [c]) if isinstance(x, str)}


def test_all_together_are_enough() -> None:
    result = run_ranks(train_tiny, 1, [*MLA, "model.q_lora_rank=24"], 2)[0]
    assert assemble([result["gradients"]])


def train_with_whole_experts() -> dict:
    helpers.validate = lambda config, world_size: None
    return train_tiny(["parallel=tp2", "parallel.expert_tensor_parallel_size=1"], steps=1)


def test_whole_experts_on_tensor_parallel_ranks_are_not_reduced() -> None:
    """Why config/validate.py refuses it. Red: megatron-core reduces them now, and the rule can go."""
    gradients = assemble([rank["gradients"] for rank in run_ranks(train_with_whole_experts, 2)])
    expected = assemble([run_ranks(train_tiny, 1, [], 1)[0]["gradients"]])
    name = "decoder.layers.3.mlp.experts.experts.linear_fc1.weight"
    assert not np.allclose(gradients[name], expected[name], rtol=0.1)
