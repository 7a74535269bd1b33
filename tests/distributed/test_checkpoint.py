"""Parameters, moments and position survive in any layout."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_moe.checkpoint.manifest import write_manifest
from tests.helpers.ranks import run_ranks
from tests.helpers.training import assemble, optimizer_shards, tiny_config, tiny_run

DENSE_STAGE = "pp2_ep2 parallel.pipeline_layout=[1,3]"
LAYOUTS = {"single": 1, "dp2": 2, "pp2_ep2": 4, "tp2_ep2": 2, "pp2_vpp2": 2, DENSE_STAGE: 4}
STATES = ("param", "exp_avg", "exp_avg_sq")


def save(layout: str, folder: str) -> list:
    from megatron_moe.train.step import train_step

    with tiny_run([*f"parallel={layout}".split(), f"run.dir={folder}"]) as (run, batches, num_micro_batches):
        for _ in range(3):
            train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
            run.state.advance(run.config.train.global_batch_size)
        run.checkpointer.save(run.state)
        return [optimizer_shards(run.checkpointer, state) for state in STATES]


def load(layout: str, folder: str) -> tuple[list, int, int, set[float]]:
    with tiny_run([*f"parallel={layout}".split(), f"run.dir={folder}"]) as (run, _, _):
        steps = [s["step"] for part in run.optimizer.chained_optimizers for s in part.optimizer.state.values()]
        assert len({id(step) for step in steps}) == len(steps)  # one tensor each: torch increments in place
        shards = [optimizer_shards(run.checkpointer, state) for state in STATES]
        return shards, run.state.step, run.state.consumed_samples, {step.item() for step in steps}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("single", "pp2_ep2"),
        ("pp2_ep2", "tp2_ep2"),
        ("tp2_ep2", "single"),
        ("pp2_vpp2", "dp2"),
        ("dp2", "pp2_vpp2"),
        (DENSE_STAGE, "dp2"),
        ("single", DENSE_STAGE),
    ],
)
def test_resharding_is_bitwise(saved: str, loaded: str, tmp_path: Path) -> None:
    before = run_ranks(save, LAYOUTS[saved], saved, str(tmp_path))
    after = run_ranks(load, LAYOUTS[loaded], loaded, str(tmp_path))
    assert all(result[1:] == (3, 24, {3.0}) for result in after)
    for i, state in enumerate(STATES):
        expected = assemble([rank[i] for rank in before])
        found = assemble([rank[0][i] for rank in after])
        assert expected.keys() == found.keys()
        assert expected, state
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{state} of {name}")


def test_only_the_last_are_kept_and_partial_ones_are_ignored(tmp_path: Path) -> None:
    run_ranks(save_often, 1, str(tmp_path))
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000004", "step_00000005"]
    (folder / "step_00000009.partial").mkdir()
    assert run_ranks(load, 1, "single", str(tmp_path))[0][1] == 5


def save_often(folder: str) -> None:
    with tiny_run([f"run.dir={folder}"]) as (run, _, _):
        for _ in range(5):
            run.state.advance(8)
            run.checkpointer.save(run.state)


def test_configurations_compare_by_option() -> None:
    from megatron_moe.checkpoint.compatibility import check_same_run
    from megatron_moe.checkpoint.run_folder import plain
    from megatron_moe.config.errors import ConfigError

    saved = plain(tiny_config())
    check_same_run(saved, tiny_config("optimizer.lr=1", "train.train_steps=99", "parallel=ep2", world_size=2))
    with pytest.raises(ConfigError) as caught:
        check_same_run(saved, tiny_config("model.router_topk=3", "train.seed=7"))
    assert [problem.split("=")[0] for problem in caught.value.problems] == ["model.router_topk", "train.seed"]


def weights(overrides: list[str]) -> tuple[list, int]:
    """Main parameters and the step of a run that has just been set up."""
    with tiny_run(overrides) as (run, _, _):
        return optimizer_shards(run.checkpointer, "param"), run.state.step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_new_run_takes_the_weights_of_another(precision: str, tmp_path: Path) -> None:
    run_ranks(save, 4, f"pp2_ep2 precision={precision}", str(tmp_path))
    init = ["model.device_balance_factor=0.5", f"checkpoint.init_from={tmp_path}", f"run.dir={tmp_path}/new"]
    before = run_ranks(weights, 1, [f"run.dir={tmp_path}", f"precision={precision}"])
    after = run_ranks(weights, 2, [*init, "parallel=tp2_ep2", f"precision={precision}"])
    expected, found = assemble([before[0][0]]), assemble([rank[0] for rank in after])
    assert before[0][1] == 3
    assert after[0][1] == 0
    assert expected.keys() == found.keys()
    for name in expected:
        if precision == "bf16":  # main parameters start from the weights, which are theirs in bf16
            expected[name] = torch.tensor(expected[name]).bfloat16().float().numpy()
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    run_ranks(save, 1, "single", str(tmp_path))
    options = [f"checkpoint.init_from={tmp_path}", f"run.dir={tmp_path}/new"]
    with pytest.raises(AssertionError, match=r"model.router_topk=3: .*step_00000003 has 2"):
        run_ranks(weights, 1, [*options, "model.router_topk=3"])
    assert run_ranks(weights, 1, [*options, "model.num_device_groups=2", "model.undropped_fraction=0.3"])
    limited = ["model.num_device_groups=2", "model.device_limit=1"]
    with pytest.raises(AssertionError, match=r"(?s)model.num_device_groups=2: .*model.device_limit=1: "):
        run_ranks(weights, 1, [*options, *limited])


def test_an_imported_model_is_no_run_to_go_on_with(tmp_path: Path) -> None:
    run_ranks(save, 1, "single", str(tmp_path))
    file = tmp_path / "checkpoints" / "step_00000003" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "weights_only": True}))
    write_manifest(file.parent)
    with pytest.raises(
        AssertionError, match="holds an imported model, weights only; start another run with checkpoint"
    ):
        run_ranks(weights, 1, [f"run.dir={tmp_path}"])


def save_what_changes_beside_tensors(layout: str, folder: str) -> tuple[list[int], bool]:
    """Three saves with an object that counts them, which rank 0 writes: what they hold of it, and whether the last has
    the random state of its time."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_moe.checkpoint.dcp import read_index

    with tiny_run([f"parallel={layout}", f"run.dir={folder}"]) as (run, _, _):
        plain, saves, found = run.checkpointer.sharded_state_dict, [], []

        def with_object(**options: bool) -> dict:
            saves.append(len(saves))
            return {**plain(**options), "extra": ShardedObject("extra", saves[-1], (1,), (0,), dist.get_rank())}

        run.checkpointer.sharded_state_dict = with_object
        for _ in range(3):
            torch.rand(3)
            run.state.advance(1)
            checkpoint = run.checkpointer.save(run.state)
            places = {index.fqn: place for index, place in read_index(checkpoint).storage_data.items()}
            place = places["extra/shard_0_1"]
            content = (checkpoint / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
            found += torch.load(io.BytesIO(content), weights_only=True)
        random = torch.get_rng_state()
        torch.rand(3)
        run.checkpointer.load_latest()
        return found, torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("layout", ["single", "dp2"])
def test_a_later_save_has_what_changed_beside_tensors(layout: str, tmp_path: Path) -> None:
    for found, is_random_state in run_ranks(save_what_changes_beside_tensors, LAYOUTS[layout], layout, str(tmp_path)):
        assert found == [0, 1, 2]
        assert is_random_state
