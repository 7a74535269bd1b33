"""Asked to stop at any moment, on any rank: the step is saved, and the rest of the run is as if it had gone on."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moe.checkpoint.manifest import check_whole
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import LAYOUTS, Outcome, assert_same_digests, runs_of_the_loop, train_run
from tests.helpers.training import tiny_config

RUN = ["train.train_steps=8", "evaluation.interval=3", "evaluation.num_samples=8", "checkpoint.save_interval=3"]
# Where the signal comes while step 3 or what follows it is under way, and the step that is then saved.
MOMENTS = {"step": 3, "evaluation": 4, "save": 4, "save, twice": 4}
EVERY_RUN = [("save, twice", signal.SIGTERM, "ep2", True, 1)]
ALL = [
    (moment, number, layout, in_background, victim)
    for moment in MOMENTS
    for number in (signal.SIGTERM, signal.SIGUSR1)
    for layout, victims in (("single", 1), ("ep2", 2))
    for in_background in (False, True)
    for victim in range(victims)
]


def train_until_stopped(overrides: list[str], moment: str, number: int, victim: int) -> int:
    """On each rank: train, with a signal to one of them; the step after which it stopped."""
    from megatron_moe.checkpoint import checkpointer
    from megatron_moe.config.errors import Preempted
    from megatron_moe.distributed import signals
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train import loop

    def interrupted(function: Callable, call: int) -> Callable:
        """The function, with the signal in its middle at one of its calls."""
        calls = []

        def replacement(*args, **options):
            calls.append(1)
            if len(calls) == call and int(os.environ["RANK"]) == victim:
                for _ in range(2 if "twice" in moment else 1):
                    os.kill(os.getpid(), number)
            return function(*args, **options)

        return replacement

    signals.install()
    if moment == "step":
        loop.train_step = interrupted(loop.train_step, 3)
    elif moment == "evaluation":
        loop.held_out_loss = interrupted(loop.held_out_loss, 1)
    else:
        checkpointer.write = interrupted(checkpointer.write, 1)
    config = tiny_config(*overrides, world_size=int(os.environ["WORLD_SIZE"]))
    rendezvous = os.environ["MEGATRON_MOE_INIT_METHOD"]
    with runs_of_the_loop(), distributed(config.parallel, init_method=rendezvous) as context:
        with contextlib.redirect_stdout(None), pytest.raises(Preempted) as stop:
            loop.train(config, context, overrides)
        return stop.value.step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    found: dict[str, Outcome] = {}

    def get(layout: str) -> Outcome:
        if layout not in found:
            found[layout] = train_run(tmp_path_factory.mktemp("whole"), layout, *RUN)
        return found[layout]

    return get


def check(moment: str, number: int, layout: str, in_background: bool, victim: int, whole: Callable, run: Path) -> None:
    options, world_size = LAYOUTS[layout]
    ours = [f"run.dir={run}", "logger.log_interval=1", f"checkpoint.async_save={in_background}".lower()]
    run.mkdir(exist_ok=True)
    steps = run_ranks(train_until_stopped, world_size, [*options, *RUN, *ours], moment, number, victim)
    assert steps == [MOMENTS[moment]] * world_size
    check_whole(run / "checkpoints" / f"step_{steps[0]:08}")
    rest = train_run(run, layout, *RUN)
    assert rest.metrics == whole(layout).metrics
    assert_same_digests(rest.digests, whole(layout).digests)


@pytest.mark.parametrize(("moment", "number", "layout", "in_background", "victim"), EVERY_RUN)
def test_stopped(moment, number, layout, in_background, victim, whole, tmp_path) -> None:
    check(moment, number, layout, in_background, victim, whole, tmp_path)


@pytest.mark.soak("asked to stop")
@pytest.mark.parametrize(
    ("moment", "number", "layout", "in_background", "victim"), [case for case in ALL if case not in EVERY_RUN]
)
def test_stopped_at_any_moment(moment, number, layout, in_background, victim, whole, tmp_path, record_property) -> None:
    check(moment, number, layout, in_background, victim, whole, tmp_path)
    record_property("lost steps", 0)
