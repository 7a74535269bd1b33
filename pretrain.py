"""Pretrain a DeepSeekMoE: `python pretrain.py [GROUP=CHOICE] [OPTION=VALUE] ...`.

Alone, it starts as many workers on this host as the layout needs; under torchrun or srun it joins them.
`--cfg job --resolve` prints the configuration, and `run.dry_run=true` builds what the ranks would hold and ends.
With `--auto-restart N`, workers on this host that fail are started again, at most N times, and fewer if three attempts
in a row end without a new checkpoint.

SIGTERM and SIGUSR1, to this process or to any worker: the step is finished and saved. Exit codes:

    0    done
    1    anything else, such as a worker that was killed
    2    the user's input
    3    the training cannot go on, as the message says
    75   stopped by SIGTERM or SIGUSR1 and saved; the same command goes on
    130  Ctrl-C, which does not save
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from megatron_moe.checkpoint.run_folder import saved_steps, step_of
from megatron_moe.config.errors import ConfigError, Preempted, TrainingError
from megatron_moe.config.load import COMPOSITION_ERRORS, CONF_DIR, check_own_runs, explain, register_schema, to_config
from megatron_moe.config.schema import Config
from megatron_moe.config.validate import validate
from megatron_moe.distributed import launch, signals, watchdog
from megatron_moe.distributed.accelerators import check_apex, quiet
from megatron_moe.distributed.failures import (
    INTERRUPTED,
    PREEMPTED,
    TRAINING_ERROR,
    USER_ERROR,
    record_exit_code,
    record_failure,
)
from megatron_moe.files import may_pass

AUTO_RESTART = "--auto-restart"


def run(composed: DictConfig, restarts: int) -> int:
    """Check the configuration, then train here or in workers; returns the exit code."""
    try:
        config, world_size = load(composed)
    except ConfigError as error:
        return fail(error)
    try:
        if config.run.dry_run:
            build_here(config, world_size)
        elif (world_size > 1 or restarts) and launch.launched_world_size(os.environ) is None:
            return train_in_workers(config, world_size, restarts)
        else:
            train_here(config, list(HydraConfig.get().overrides.task))
    except (Exception, KeyboardInterrupt) as error:
        return exit_code(error, config)
    return 0


def exit_code(error: BaseException, config: Config) -> int:
    """Say what ended the training, and what is left; returns the exit code."""
    if isinstance(error, ConfigError):
        return fail(error, only_here=True)
    if isinstance(error, KeyboardInterrupt):
        return interrupted(config)
    if isinstance(error, Preempted):
        return preempted(error)
    is_explained = isinstance(error, TrainingError)
    text = f"error: {error}" if is_explained else "".join(traceback.format_exception(error))
    if not record_failure(repr(error), text, os.environ):
        print(text, file=sys.stderr)
    return TRAINING_ERROR if is_explained else 1


def typed(composed: DictConfig) -> Config:
    """The configuration, its rules not yet checked.

    Raises:
        ConfigError: with everything that is wrong with the command line.
    """
    try:
        return to_config(composed)
    except ConfigError as error:
        raise explain(job_arguments(), error) from None


def load(composed: DictConfig) -> tuple[Config, int]:
    """The checked configuration and the number of ranks that run it."""
    config = typed(composed)
    world_size = validate(config, launch.launched_world_size(os.environ))
    if is_sweep():
        check_own_runs(sys.argv[1:])
    if not config.run.dry_run:
        make_run_folder(config)
    return config, world_size


def is_sweep() -> bool:
    """Whether Hydra runs several jobs (`--multirun`)."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def interrupted(config: Config) -> int:
    """Say what is left after Ctrl-C."""
    every = config.checkpoint.save_interval
    print(f"interrupted; the same command goes on from the last checkpoint (every {every} steps)", file=sys.stderr)
    return INTERRUPTED


def preempted(stop: Preempted) -> int:
    """Say, once, what is left after SIGTERM."""
    if os.environ.get("RANK", "0") == "0":
        name = signals.received_name()
        print(f"stopped by {name} at step {stop.step:,}, saved; the same command goes on", file=sys.stderr)
    return PREEMPTED


def job_arguments() -> list[str]:
    """The command line that makes this job: the one given, or in a sweep the job's share of it."""
    return list(HydraConfig.get().overrides.task) if is_sweep() else sys.argv[1:]


def make_run_folder(config: Config) -> None:
    """Find out now, and not at the first save, whether the run has a place to write."""
    try:
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if may_pass(error):
            raise
        raise ConfigError(f"run.dir={config.run.dir}: cannot be made: {error.strerror}") from None


def train_in_workers(config: Config, world_size: int, restarts: int) -> int:
    """Start the ranks here, again after a failure if asked for; returns the exit code."""
    command = [sys.executable, __file__, *job_arguments()]
    newest = 0

    def newest_step() -> int:
        nonlocal newest
        with contextlib.suppress(OSError):  # a file system that does not answer for a moment
            saved = saved_steps(Path(config.run.dir) / "checkpoints")
            newest = step_of(saved[-1]) if saved else 0
        return newest

    if restarts:
        code = launch.run_workers_again(command, world_size, restarts=restarts, newest_step=newest_step)
    else:
        code = launch.run_workers(command, world_size)
    return interrupted(config) if code == INTERRUPTED else code


def build_here(config: Config, world_size: int) -> None:
    """Build all ranks that differ in this process; others that a launcher may have started have nothing to do."""
    if os.environ.get("RANK", "0") != "0":
        return
    quiet()
    check_apex()
    from megatron_moe.train.dry_run import dry_run

    dry_run(config, world_size)


def train_here(config: Config, overrides: list[str]) -> None:
    """Train in this process, one of the ranks. Imports torch, which takes seconds."""
    signals.install()
    watchdog.start(60 * config.parallel.timeout_minutes)
    quiet()
    check_apex()
    from megatron_moe.checkpoint.run_lock import locked
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train.loop import train

    group = distributed(
        config.parallel,
        init_method=os.environ.get(launch.INIT_METHOD, "env://"),
        deterministic_only=config.train.deterministic,
    )
    with group as context, locked(Path(config.run.dir), 30 * config.parallel.timeout_minutes):
        train(config, context, overrides)
        signals.ignore()
    watchdog.stop()  # not after an error: the end of this process may hang


def take_auto_restart(arguments: list[str]) -> tuple[list[str], int]:
    """The arguments for Hydra, and how often workers are to be started again.

    Raises:
        ConfigError: `--auto-restart` is not followed by a number, or a launcher has started this process.
    """
    remaining, given = [], iter(arguments)
    restarts = 0
    for argument in given:
        name, equals, value = argument.partition("=")
        if name != AUTO_RESTART:
            remaining.append(argument)
            continue
        value = value if equals else next(given, "")
        if not value.isdecimal():
            raise ConfigError(f"{AUTO_RESTART} {value}: must be a number of restarts, such as {AUTO_RESTART} 10")
        if launch.launched_world_size(os.environ) is not None:
            raise ConfigError(f"{AUTO_RESTART}: this rank was started by a launcher; torchrun has --max-restarts")
        restarts = int(value)
    return remaining, restarts


def refuse_rerun(arguments: list[str]) -> None:
    """Refuse the flag of Hydra's that reads a pickle, which may run anything.

    Raises:
        ConfigError: it is there, shortened too.
    """
    given, _ = get_args_parser().parse_known_args(arguments)
    if given.experimental_rerun:
        raise ConfigError(f"--experimental-rerun={given.experimental_rerun}: is refused, as it would run what it reads")


def main(job: Callable[[DictConfig, int], int] = run) -> None:
    """Join the launcher, if there is one, and let Hydra compose for a job, which gets the restarts too."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print and exit by itself
    register_schema()
    launch.adopt_slurm_step(os.environ)
    launch.end_with_parent(os.environ)
    try:
        sys.argv[1:], restarts = take_auto_restart(sys.argv[1:])
        refuse_rerun(sys.argv[1:])
    except ConfigError as error:
        sys.exit(fail(error))

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="pretrain")
    def pretrain(composed: DictConfig) -> None:
        """One job of Hydra's: exits only if it fails, so that a sweep goes on."""
        if code := job(composed, restarts):
            record_exit_code(code, os.environ)
            sys.exit(code)

    try:
        pretrain()
    except (ValueError, *COMPOSITION_ERRORS) as error:  # ValueError: flags of Hydra that do not go together
        sys.exit(fail(explain(sys.argv[1:], error)))


def fail(error: ConfigError, *, only_here: bool = False) -> int:
    """Tell the user what to change. Every rank finds the same, so rank 0 says it, unless it was found `only_here`."""
    shown_by_launcher = record_failure("configuration", error.report(), os.environ)
    if not shown_by_launcher and (only_here or os.environ.get("RANK", "0") == "0"):
        print(error.report(), file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    main()
