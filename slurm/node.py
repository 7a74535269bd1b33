"""One node's share of a job: torchrun, with the output where slurm/pretrain.sbatch wants it.

python slurm/node.py RANKS LOGS [OVERRIDE] ...

Standard output of the first node, which is rank 0's, stays; all else goes to LOGS/NODE.log.

torchrun must not act on the signals that mean "save": SIGUSR1 would end it, and after SIGTERM it kills ranks 30 s
later, in the middle of a save. Slurm sends them to every process of a step, so they are held back in torchrun, and
wait in each rank until it can note them (megatron_moe/distributed/signals.py).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_moe.distributed.failures import EXIT_CODES
from megatron_moe.distributed.launch import available_cores
from megatron_moe.distributed.signals import STOP_SIGNALS
from slurm.sweep import job_arguments


def torchrun_options(ranks: int, environment: Mapping[str, str]) -> list[str]:
    """Where this node stands among the others.

    The rendezvous is static: node i of the job holds ranks i * RANKS and up, so that neighbours in the network are
    neighbours among the ranks. torchrun's c10d would sort the nodes by name.
    """
    return [
        f"--nnodes={environment['SLURM_JOB_NUM_NODES']}",
        f"--node-rank={environment['SLURM_NODEID']}",
        f"--nproc-per-node={ranks}",
        f"--master-addr={environment['MASTER_ADDR']}",
        f"--master-port={environment['MASTER_PORT']}",
    ]


def redirect(log: Path, *, is_first: bool) -> None:
    """Send standard error to a file and, but for the first node's, standard output too."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 2)
        if not is_first:
            os.dup2(file.fileno(), 1)


def main(ranks: int, logs: Path, arguments: list[str]) -> None:
    """Become torchrun."""
    node = os.environ["SLURMD_NODENAME"]
    redirect(logs / f"{node}.log", is_first=os.environ["SLURM_NODEID"] == "0")
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // ranks)))
    os.environ[EXIT_CODES] = str(logs / "exit_codes")
    torchrun = [sys.executable, "-m", "torch.distributed.run", *torchrun_options(ranks, os.environ)]
    os.execv(sys.executable, [*torchrun, str(ROOT / "pretrain.py"), *job_arguments(arguments, os.environ)])


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
