"""A Slurm of its own on this machine: a controller, two nodes, one that claims GPUs, and 64 that are never started."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.cli import ROOT, user_environment

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = "/usr/sbin:/sbin"  # not on every user's path
NODES = ("n1", "n2", "n3")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
KILL_WAIT_S = 60  # from SIGTERM to SIGKILL
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
# So that two clusters choose other ports for their jobs.
FirstJobId={ports[0]}
# A requeued job waits until a credential is no longer valid: five seconds are the least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
# By parent, as a test machine's cgroups may not be ours; torchrun's ranks are in process groups of their own.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait={kill_wait}
MailProg=/bin/true
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2 RealMemory=1000 Gres=gpu:2
NodeName=g[001-064] NodeAddr=127.0.0.1 CPUs=128 RealMemory=1000000 Gres=gpu:8 State=CLOUD
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE
PartitionName=gpu Nodes=n3,g[001-064] MaxTime=INFINITE
"""


class Cluster:
    """A Slurm that runs, and what its users call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.environment = {
            **{name: value for name, value in user_environment().items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": f"{os.environ['PATH']}:{SBIN}",
            "SLURM_CONF": str(self.config),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "VENV": sys.prefix,
        }
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start it and wait until both nodes are there."""
        host = socket.gethostname().split(".")[0]
        config = CONFIG.format(
            folder=self.folder, host=host, user=getpass.getuser(), ports=free_ports(4), kill_wait=KILL_WAIT_S
        )
        self.config.write_text(config)
        for gpu in range(2):
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"NodeName=n3 Name=gpu File={self.folder}/gpu[0-1]\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._start("munged", "munged", "--foreground", f"--key-file={key}", *files)
        wait_until((self.folder / "munge.socket").exists, 10, self.logs)
        self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.call("sinfo", "-hN", "-nn[1-3]", "-o%T").split() == ["idle"] * 3, 30, self.logs)

    def start_node(self, node: str) -> None:
        """The daemon of a node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """The daemon of a node."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def processes(self, **variables: str) -> list[psutil.Process]:
        """Those of this cluster that have these variables, daemons included."""
        return processes_with(SLURM_CONF=str(self.config), **variables)

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's, or one that calls them; errors are in its output."""
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """As `run`; returns the output."""
        return self.run(*command, cwd=cwd, **environment).stdout

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> int:
        """With sbatch; returns the job's number."""
        answer = self.call("sbatch", "--parsable", *arguments, cwd=cwd, **environment)
        assert answer.strip().isdecimal(), answer
        return int(answer)

    def fields(self, job: int | str) -> dict[str, str]:
        """What `scontrol show job` tells of a job."""
        return dict(re.findall(r"(\w+)=(\S+)", self.call("scontrol", "show", "job", str(job))))

    def wait(self, job: int | str, timeout: float = 120) -> dict[str, str]:
        """Until a job is over and will not come back; returns its fields."""
        wait_until(lambda: self.fields(job)["JobState"] in OVER, timeout, lambda: f"{self.fields(job)}\n{self.logs()}")
        return self.fields(job)

    def logs(self) -> str:
        """Of the daemons, for a failure's report."""
        paths = [*self.folder.glob("*.log"), self.folder / "munge.log-file"]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in paths if path.exists())


def processes_with(**variables: str) -> list[psutil.Process]:
    """Living processes that have these variables."""
    return [process for process in psutil.process_iter() if _has(process, variables)]


def _has(process: psutil.Process, variables: dict[str, str]) -> bool:
    try:
        environment = process.environ()
        is_alive = process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
    return is_alive and all(environment.get(name) == value for name, value in variables.items())


def wait_until(condition: Callable[[], bool], timeout: float, explain: Callable[[], str]) -> None:
    """Look ten times a second."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Of this machine, not in use now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def skip_without_slurm() -> None:
    """Where it is not installed; in CI it must be."""
    missing = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]
    if missing:
        message = f"no {', '.join(missing)}; on Debian: apt-get install slurm-wlm munge"
        assert "CI" not in os.environ, message
        pytest.skip(message)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster, and none of its processes afterwards, whatever ends this one."""
    skip_without_slurm()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path, for sockets
    folder.chmod(0o755)  # for munge's clients
    (folder / "state").mkdir()
    cluster = Cluster(folder)
    guard = subprocess.Popen(
        [sys.executable, "-m", __name__, folder],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        start_new_session=True,  # what ends a test runner may end its process group
    )
    try:
        cluster.start()
        yield cluster
    finally:
        guard.stdin.close()
        guard.wait()
        for daemon in cluster.daemons.values():
            daemon.wait()


def end_with_parent(folder: Path) -> None:
    """When the process that started this one has ended, or says so, end those of the cluster in this folder."""
    sys.stdin.read()
    while left := [*processes_with(SLURM_CONF=str(folder / "slurm.conf")), *_step_daemons(folder)]:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.1)
    shutil.rmtree(folder)


def _step_daemons(folder: Path) -> Iterator[psutil.Process]:
    """They write their titles over their variables, and their logs into the folder."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "slurmstepd" and any(
                file.path.startswith(f"{folder}/") for file in process.open_files()
            ):
                yield process


if __name__ == "__main__":
    end_with_parent(Path(sys.argv[1]))
