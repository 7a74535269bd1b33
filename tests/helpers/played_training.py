"""A copy of this stands in for pretrain.py in the folder that a test submits jobs from; two ways to train.

With HOLD, really; the last of four ranks waits in attempt i before the i-th step in it for what the test then does.
Else a rank does what `run.notes` says: attempts are joined by +, what is done in one by _; a number is a saved step.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import Preempted, TrainingError
from megatron_moe.config.schema import Config
from megatron_moe.distributed import signals
from tests.helpers.cli import ROOT

spec = importlib.util.spec_from_file_location("real", ROOT / "pretrain.py")
real = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real)
really_train_here = real.train_here
globals().update({name: value for name, value in vars(real).items() if not name.startswith("__")})


def make_run_folder(config: Config) -> None:
    """What slurm/prepare.py calls; waits for a signal where there is a file "hold"."""
    real.make_run_folder(config)
    if Path("hold").exists():
        Path("hold").rename("held")
        signal.pause()


def train_and_hold(config: Config, overrides: list[str]) -> None:
    from megatron_moe.train import loop

    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    steps = [int(step) for step in os.environ["HOLD"].split()]
    really_step = loop._step

    def step(run: Any, *arguments: Any) -> Any:
        if run.context.rank == 3 and run.state.step + 1 in steps[attempt : attempt + 1]:
            Path(config.run.dir, f"held_{attempt}").touch()
            wait_for_a_signal()
        return really_step(run, *arguments)

    loop._step = step
    really_train_here(config, overrides)


def play(config: Config, overrides: list[str]) -> None:
    run = Path(config.run.dir)
    attempt = len(list(run.glob("tried_*")))
    (run / f"tried_{attempt}").touch()
    for word in config.run.notes.split("+")[attempt].split("_"):
        if word == "gpus":
            (run / f"gpus_{os.environ['RANK']}").write_text(os.environ["SLURM_GPUS_ON_NODE"])
        elif word == "ask":
            signals.install()
            (run / "asks").touch()
            wait_for_a_signal()
        elif word == "wait":
            while not list(run.parent.glob("*/tried_1")):
                time.sleep(0.1)
        elif word.isdecimal():
            (run / "checkpoints" / f"step_{int(word):08}").mkdir(parents=True)
        elif word == "preempted":
            raise Preempted(0)
        elif word == "hopeless":
            raise TrainingError("the loss is not finite")
        elif word == "crash":
            raise RuntimeError("a broken cable")


def wait_for_a_signal() -> None:
    """Or for the end of torchrun, after which Slurm may not know of this rank any more."""
    parent = os.getppid()
    while not signals.stop_requested() and os.getppid() == parent:
        time.sleep(0.01)


real.train_here = train_and_hold if "HOLD" in os.environ else play
if __name__ == "__main__":
    real.main()
