"""Pretrain a DeepSeekMoE: `python pretrain.py [GROUP=CHOICE] [OPTION=VALUE] ...`.

Alone, it starts as many workers on this host as the layout needs; under torchrun or srun it joins them.
`--cfg job --resolve` prints the configuration. Exit codes: 0 done, 2 the user's input,
128 plus its number after a signal (130 for Ctrl-C), 1 anything else.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import COMPOSITION_ERRORS, explain, register_schema, to_config
from megatron_moe.config.schema import Config
from megatron_moe.config.validate import validate
from megatron_moe.distributed import launch
from megatron_moe.distributed.accelerators import check_apex, quiet

INTERRUPTED = 130  # exit code: 128 plus SIGINT


@hydra.main(version_base="1.3", config_path="conf", config_name="pretrain")
def pretrain(composed: DictConfig) -> None:
    """One job of Hydra's: exits only if it fails, so that a sweep goes on."""
    if code := run(composed):
        sys.exit(code)


def run(composed: DictConfig) -> int:
    """Check the configuration, then train here or in workers; returns the exit code."""
    try:
        config, world_size = load(composed)
    except ConfigError as error:
        return fail(error)
    overrides = list(HydraConfig.get().overrides.task)
    try:
        if world_size > 1 and launch.launched_world_size(os.environ) is None:
            code = launch.run_workers([sys.executable, __file__, *job_arguments()], world_size)
            return interrupted(config) if code == INTERRUPTED else code
        train_here(config, overrides)
    except ConfigError as error:
        return fail(error, only_here=True)
    except KeyboardInterrupt:
        return interrupted(config)
    except Exception as error:
        text = traceback.format_exc()
        if not launch.record_failure(repr(error), text, os.environ):
            print(text, file=sys.stderr)
        return 1
    return 0


def load(composed: DictConfig) -> tuple[Config, int]:
    """The checked configuration and the number of ranks that run it."""
    try:
        config = to_config(composed)
    except ConfigError as error:
        raise explain(job_arguments(), error) from None
    world_size = validate(config, launch.launched_world_size(os.environ))
    if is_sweep() and not any(o.startswith(("run.name=", "run.dir=")) for o in HydraConfig.get().overrides.task):
        raise ConfigError("run.name: each job of a sweep needs its own, such as run.name='lr-${optimizer.lr}'")
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


def job_arguments() -> list[str]:
    """The command line that makes this job: the one given, or in a sweep the job's share of it."""
    return list(HydraConfig.get().overrides.task) if is_sweep() else sys.argv[1:]


def make_run_folder(config: Config) -> None:
    """Find out now, and not at the first save, whether the run has a place to write."""
    try:
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir}: cannot be made: {error.strerror}") from None


def train_here(config: Config, overrides: list[str]) -> None:
    """Train in this process, one of the ranks. Imports torch, which takes seconds."""
    quiet()
    check_apex()
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train.loop import train

    init_method = os.environ.get(launch.INIT_METHOD, "env://")
    only = config.train.deterministic
    with distributed(config.parallel, init_method=init_method, deterministic_only=only) as context:
        train(config, context, overrides)


def main() -> None:
    """Join the launcher, if there is one, and let Hydra compose."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print and exit by itself
    register_schema()
    launch.adopt_slurm_step(os.environ)
    launch.end_with_parent(os.environ)
    try:
        pretrain()
    except (ValueError, *COMPOSITION_ERRORS) as error:  # ValueError: flags of Hydra that do not go together
        sys.exit(fail(explain(sys.argv[1:], error)))


def fail(error: ConfigError, *, only_here: bool = False) -> int:
    """Tell the user what to change. Every rank finds the same, so rank 0 says it, unless it was found `only_here`."""
    shown_by_launcher = launch.record_failure("configuration", error.report(), os.environ)
    if not shown_by_launcher and (only_here or os.environ.get("RANK", "0") == "0"):
        print(error.report(), file=sys.stderr)
    return launch.USER_ERROR


if __name__ == "__main__":
    main()
