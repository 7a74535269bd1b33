"""The time line of a step is what the ranks did, and looking at a step changes nothing."""

import contextlib
import io
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.report.trace import KINDS, read_cost
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import assert_same_digests, train_run
from tests.helpers.training import tiny_run


def recorded_and_observed(overrides: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Ranges of a time line; and the passes in the order in which the model's own hooks saw them begin."""
    from megatron.core.utils import get_model_config

    from megatron_moe.train.step import train_step
    from megatron_moe.train.timeline import Timeline, recorded

    with tiny_run(["run.dir=without_checkpoints", *overrides]) as (run, batches, num_micro_batches):
        chunks, passes = run.pipeline.model, []
        counts = [0] * len(chunks)

        def observe(chunk: int, _module: Any, _args: Any, output: Any) -> None:
            label = f"{counts[chunk]}.{chunk}" if len(chunks) > 1 else str(counts[chunk])
            counts[chunk] += 1
            passes.append(f"forward {label}")
            output.register_hook(lambda _gradient: passes.append(f"backward {label}"))

        for number, chunk in enumerate(chunks):
            chunk.register_forward_hook(partial(observe, number))
        timeline = Timeline(run.pipeline, num_micro_batches, run.context.device)
        with recorded(timeline, run.pipeline, run.optimizer):
            train_step(run.pipeline, run.optimizer, [timeline.reading(part) for part in batches], num_micro_batches)
        assert get_model_config(chunks[0]).timers is None
        return timeline.ranges(), passes


@pytest.mark.parametrize(
    ("override", "world_size"), [("parallel=single", 1), ("parallel=pp2", 2), ("parallel=pp2_vpp2", 2)]
)
def test_passes_are_those_of_the_model_in_their_order(override: str, world_size: int) -> None:
    for ranges, passes in run_ranks(recorded_and_observed, world_size, [override]):
        names = [found["name"] for found in ranges]
        assert [name for name in names if name.split()[0] in ("forward", "backward")] == passes
        assert len(passes) == 2 * 4 * (2 if "vpp" in override else 1)
        assert names.count("data next") == len(passes) / 2
        kinds = {name.split()[0] for name in names}
        assert kinds == {"data", "forward", "backward", "gradients", "optimizer"} | (
            {"pipeline"} if world_size > 1 else set()
        )
        outer = [(found["start_s"], found["end_s"]) for found in ranges if found["name"] != "data next"]
        assert all(0 <= start <= end for start, end in outer)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(outer))


def test_a_profiled_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    options = ["train.train_steps=6", "evaluation.num_samples=4"]
    plain = train_run(tmp_path / "plain", "pp2", *options)
    profiled = train_run(tmp_path / "profiled", "pp2", *options, "profile.steps=[2,3,4]", "profile.ranks=[1]")
    assert profiled.metrics == plain.metrics
    assert_same_digests(profiled.digests, plain.digests)
    assert not (tmp_path / "plain/profile").exists()
    traces = sorted((tmp_path / "profiled/profile").iterdir())
    assert [path.name for path in traces] == [f"step_0000000{step}_rank_00001.json.gz" for step in (2, 3, 4)]
    costs = [read_cost(path) for path in traces]
    kinds = set(KINDS) - {"all-to-all"}  # there is one expert-parallel rank only
    assert all(cost.seconds[kind] > 0 for cost in costs for kind in kinds)
    for name, step in (("plain", 3), ("profiled", 5)):  # not while a profiler slows it down
        timeline = json.loads((tmp_path / name / "timeline.json").read_text())
        assert timeline["step"] == step
        assert [rank["rank"] for rank in timeline["ranks"]] == [0, 1]
        assert all(rank["ranges"] for rank in timeline["ranks"])


def steps_in_a_folder_that_is_gone() -> tuple[list[bool], str]:
    """Whether each of five steps was left alone, and what was said."""
    from megatron_moe.train.step import train_step

    overrides = ["run.dir=never_made", "train.train_steps=5", "profile.steps=[2]"]
    said, alone = io.StringIO(), []
    with tiny_run(overrides) as (run, batches, count), contextlib.redirect_stderr(said):
        for number in range(1, 6):
            with run.recorder.step(number, batches, count) as taken:
                train_step(run.pipeline, run.optimizer, taken, count)
            alone.append(taken is batches)
    return alone, said.getvalue()


def test_other_steps_are_left_alone_and_what_cannot_be_written_stops_nothing() -> None:
    ((alone, said),) = run_ranks(steps_in_a_folder_that_is_gone, 1)
    assert alone == [True, False, False, True, True]
    assert [line.split(":")[:2] for line in said.splitlines()] == [["warning", " not written"]] * 2


def record_few_ranks(overrides: list[str], folder: str) -> None:
    from megatron_moe.train import recording
    from megatron_moe.train.step import train_step

    recording.MAX_RANKS = 2
    with (
        tiny_run([f"run.dir={folder}", "train.train_steps=1", *overrides]) as (run, batches, count),
        run.recorder.step(1, batches, count) as taken,
    ):
        train_step(run.pipeline, run.optimizer, taken, count)


def test_of_many_ranks_some_of_each_stage_are_recorded(tmp_path: Path) -> None:
    run_ranks(record_few_ranks, 4, ["parallel=pp2", "parallel.data_parallel_size=2"], str(tmp_path))
    assert [rank["rank"] for rank in json.loads((tmp_path / "timeline.json").read_text())["ranks"]] == [0, 2]
