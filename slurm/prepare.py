"""On the first node of a job, before the ranks start: what slurm/pretrain.sbatch must know of the run.

python slurm/prepare.py [OVERRIDE] ...

Checks the command line for the nodes of this job. Prints how many ranks a node has and which step is the last; then,
to the end, the run's folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import DictConfig

import pretrain
from megatron_moe.config.derived import last_step, required_world_size
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import ParallelConfig
from megatron_moe.config.validate import validate
from slurm.sweep import job_arguments


def ranks_per_node(parallel: ParallelConfig, environment: Mapping[str, str]) -> int:
    """`RANKS_PER_NODE`, which is the number of GPUs unless the user says otherwise; else the layout's over the nodes.

    Raises:
        ConfigError: it is no number of ranks.
    """
    given = environment.get("RANKS_PER_NODE")
    if given is None:
        return -(-required_world_size(parallel) // int(environment["SLURM_JOB_NUM_NODES"]))
    if not given.isdecimal() or int(given) == 0:
        raise ConfigError(f"RANKS_PER_NODE={given}: must be a number of ranks, such as that of a node's GPUs")
    return int(given)


def refuse_options_of_sbatch(arguments: Sequence[str]) -> None:
    """What pretrain.py would take for a flag of its own (`-p`), or not understand.

    Raises:
        ConfigError: there is one.
    """
    known = ("--config-dir", "--cfg", "--resolve", "--help", "--multirun", pretrain.AUTO_RESTART)
    wrong = [word for word in arguments if word.startswith("-") and not word.startswith(known)]
    if wrong:
        raise ConfigError(f"{wrong[0]}: options of sbatch go before the script's name; after it, overrides")


def prepare(composed: DictConfig, restarts: int) -> int:
    """Check and print; returns the exit code."""
    try:
        if restarts:
            raise ConfigError(f"{pretrain.AUTO_RESTART}: leave it out, Slurm starts the job again")
        if pretrain.is_sweep():
            raise ConfigError("--multirun: sbatch --array=0-N slurm/sweep.sbatch takes the same overrides")
        config = pretrain.typed(composed)
        ranks = ranks_per_node(config.parallel, os.environ)
        validate(config, ranks * int(os.environ["SLURM_JOB_NUM_NODES"]))
        pretrain.make_run_folder(config)
    except ConfigError as error:
        return pretrain.fail(error)
    print(ranks, last_step(config))
    print(config.run.dir)
    return 0


if __name__ == "__main__":
    try:
        refuse_options_of_sbatch(sys.argv[1:])
        sys.argv[1:] = job_arguments(sys.argv[1:], os.environ)
    except ConfigError as error:
        sys.exit(pretrain.fail(error))
    pretrain.main(prepare)
