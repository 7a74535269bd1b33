"""What one layout saves every other loads: the same bytes once put together, and nothing missing."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.test_checkpoint import LAYOUTS, STATES, load, save
from tests.helpers.ranks import run_ranks
from tests.helpers.training import assemble, tiny_run

Wholes = dict[str, dict[str, np.ndarray]]  # by state and name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Runs saved in each layout when first asked for: the folder, and what was saved."""
    found: dict[str, tuple[Path, Wholes]] = {}

    def get(layout: str) -> tuple[Path, Wholes]:
        if layout not in found:
            folder = tmp_path_factory.mktemp("saved")
            found[layout] = folder, wholes(run_ranks(save, LAYOUTS[layout], layout, str(folder)))
        return found[layout]

    return get


def wholes(by_rank: list[list]) -> Wholes:
    return {state: assemble([rank[i] for rank in by_rank]) for i, state in enumerate(STATES)}


@pytest.mark.soak("resharding, each pair of layouts")
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(LAYOUTS, 2)))
def test_every_pair_of_layouts(source: str, target: str, saved, record_property) -> None:
    folder, expected = saved(source)
    by_rank = run_ranks(load, LAYOUTS[target], target, str(folder))
    assert all(rank[1:] == (3, 24, {3.0}) for rank in by_rank)
    found = wholes([rank[0] for rank in by_rank])
    for state in STATES:
        assert found[state].keys() == expected[state].keys()
        for name, tensor in expected[state].items():
            assert found[state][name].tobytes() == tensor.tobytes(), f"{state} of {name}"
            assert not np.isnan(tensor).any()
    record_property("tensors", sum(len(tensors) for tensors in found.values()))
    record_property("lost tensors", 0)


def save_without(folder: str, kind: str, name: str) -> None:
    """On each rank: a checkpoint in which a tensor of the model or of the optimizer has another name."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    from megatron_moe.checkpoint import checkpointer
    from megatron_moe.checkpoint.checkpointer import Checkpointer

    whole = Checkpointer.sharded_state_dict

    def renamed(self: Checkpointer, **options: Any) -> dict[str, Any]:
        state = whole(self, **options)
        changed = [t for t in nested_values(state[kind]) if isinstance(t, ShardedBase) and name in t.key]
        assert changed, name
        for tensor in changed:
            tensor.key = f"{tensor.key}.renamed"
        return state

    with tiny_run([f"run.dir={folder}"]) as (run, _, _):
        Checkpointer.sharded_state_dict = renamed
        checkpointer.problems_of_coverage = lambda *_: []  # which would refuse to save it
        run.state.advance(8)
        run.checkpointer.save(run.state)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("model", "decoder.layers.3.mlp.experts.experts.linear_fc2.weight"),
        ("optimizer", "exp_avg_sq.decoder.final_layernorm.weight"),
    ],
)
def test_a_missing_tensor_is_an_error_that_names_it(kind: str, name: str, tmp_path: Path) -> None:
    run_ranks(save_without, 1, str(tmp_path), kind, name)
    with pytest.raises(AssertionError, match=name.replace(".", r"\.")):
        run_ranks(load, 1, "single", str(tmp_path))
