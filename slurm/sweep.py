"""One job of a sweep over Hydra overrides: the one whose number is that of a job array's task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import check_own_runs


def job_arguments(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The arguments of this job: those given or, in an array, its share of what `--multirun` would make of them.

    Raises:
        ConfigError: the array has a number that the sweep does not have, or the jobs share a run.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return list(arguments)
    overrides = get_args_parser().parse_args(list(arguments)).overrides
    flags = [argument for argument in arguments if argument not in overrides]
    parsed = OverridesParser.create().parse_overrides(overrides)
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    number = int(environment["SLURM_ARRAY_TASK_ID"])
    if number >= len(jobs):
        raise ConfigError(f"--array: has {number}, the sweep's {len(jobs)} jobs are --array=0-{len(jobs) - 1}")
    check_own_runs(overrides)
    return [*flags, *jobs[number]]
