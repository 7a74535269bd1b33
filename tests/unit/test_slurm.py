"""What slurm/ computes in Python, without a Slurm."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import ParallelConfig
from megatron_moe.distributed.failures import EXIT_CODES, record_exit_code
from slurm.prepare import ranks_per_node, refuse_options_of_sbatch
from slurm.sweep import job_arguments
from tests.helpers.cli import ROOT, run_cli
from tests.helpers.training import TINY

PRETRAIN = (ROOT / "slurm" / "pretrain.sbatch").read_text()
LAYOUT = ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)  # 4 ranks


@pytest.mark.parametrize(
    ("nodes", "environment", "ranks"),
    [
        (2, {}, 2),
        (3, {}, 2),  # two more than the layout needs; whether they fit is checked with all other rules
        (8, {}, 1),
        (2, {"RANKS_PER_NODE": "8"}, 8),
    ],
)
def test_ranks_of_a_node(nodes: int, environment: dict[str, str], ranks: int) -> None:
    assert ranks_per_node(LAYOUT, {"SLURM_JOB_NUM_NODES": str(nodes), **environment}) == ranks


@pytest.mark.parametrize("given", ["", "0", "four", "-1"])
def test_a_number_of_ranks_that_is_none(given: str) -> None:
    with pytest.raises(ConfigError, match=f"RANKS_PER_NODE={given}: must be a number of ranks"):
        ranks_per_node(LAYOUT, {"SLURM_JOB_NUM_NODES": "2", "RANKS_PER_NODE": given})


def test_a_sweep_s_jobs_are_those_of_multirun() -> None:
    given = ["--config-dir", "mine", "model=a,b", "train.seed=1,2,3", "run.notes='a, \"b\" $(c); d'", "run.name=${x}"]
    jobs = [job_arguments(given, {"SLURM_ARRAY_TASK_ID": str(task)}) for task in range(6)]
    assert jobs[4] == [
        "--config-dir",
        "mine",
        "model=b",
        "train.seed=2",
        "run.notes='a, \"b\" $(c); d'",
        "run.name=$\\{x\\}",  # as Hydra writes it
    ]
    assert len({tuple(job) for job in jobs}) == 6
    assert job_arguments(given, {}) == given


@pytest.mark.parametrize(
    ("overrides", "task", "message"),
    [
        (["model=a,b", "run.name=x-${model}"], 2, "--array: has 2, the sweep's 2 jobs are --array=0-1"),
        (["model=a,b"], 0, "run.name: each job of a sweep needs its own"),
        (["model=a,b", "run.name=fixed"], 0, "run.name: each job of a sweep needs its own"),
    ],
)
def test_a_sweep_that_cannot_be(overrides: list[str], task: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job_arguments(overrides, {"SLURM_ARRAY_TASK_ID": str(task)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--auto-restart", "3"], "--auto-restart: leave it out, Slurm starts the job again"),
        (["--multirun", "train.seed=1,2", "run.name=a-${train.seed}"], "slurm/sweep.sbatch takes the same overrides"),
        (["parallel=pp4"], "9 ranks: must be a multiple of 4"),
    ],
)
def test_a_command_line_is_refused_before_the_ranks_start(arguments: list[str], message: str, tmp_path: Path) -> None:
    job = {"SLURM_JOB_NUM_NODES": "3", "RANKS_PER_NODE": "3"}
    result = run_cli("slurm/prepare.py", *arguments, *TINY, cwd=tmp_path, **job)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "runs").exists()


def test_what_the_batch_script_is_told(tmp_path: Path) -> None:
    folder = "runs/a  $(b)\n'c'"
    run_dir = "run.dir='" + folder.replace("'", "\\'") + "'"
    job = {"SLURM_JOB_NUM_NODES": "2"}
    result = run_cli("slurm/prepare.py", *TINY, "parallel=pp2_ep2", "train.exit_step=7", run_dir, cwd=tmp_path, **job)
    assert result.stdout == f"2 7\n{folder}\n"
    assert (tmp_path / folder).is_dir()


TORCHRUN = """
import os, signal, sys
blocked = sorted(each.name for each in signal.pthread_sigmask(signal.SIG_BLOCK, []))
print(blocked, os.environ["OMP_NUM_THREADS"], sys.argv[1:], flush=True)
print("a warning", file=sys.stderr)
"""


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_becomes_torchrun_which_hears_no_signals(node: int, tmp_path: Path) -> None:
    (tmp_path / "torch" / "distributed").mkdir(parents=True)
    for package in ("torch", "torch/distributed"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "torch" / "distributed" / "run.py").write_text(TORCHRUN)
    nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": str(node), "SLURMD_NODENAME": f"n{node}"}
    threads = {"MASTER_ADDR": "n0", "MASTER_PORT": "20007", "OMP_NUM_THREADS": "3"}
    result = run_cli("slurm/node.py", "4", str(tmp_path), "run.notes=a  b", cwd=tmp_path, **nodes, **threads)
    options = [
        "--nnodes=2",
        f"--node-rank={node}",
        "--nproc-per-node=4",
        "--master-addr=n0",
        "--master-port=20007",
        str(ROOT / "pretrain.py"),
        "run.notes=a  b",
    ]
    seen = f"['SIGTERM', 'SIGUSR1'] 3 {options}\n"
    log = (tmp_path / f"n{node}.log").read_text()
    assert (result.stdout, log) == ((seen, "a warning\n") if node == 0 else ("", f"{seen}a warning\n"))


def test_a_rank_leaves_its_exit_code(tmp_path: Path) -> None:
    record_exit_code(3, {})
    record_exit_code(75, {EXIT_CODES: str(tmp_path)})
    record_exit_code(75, {EXIT_CODES: str(tmp_path)})
    assert [path.name for path in tmp_path.iterdir()] == ["75"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (["n2: task 1: Killed", "n1: task 0: Exited with exit code 1"], "of n2"),
        (["Node failure on n2", "n1: task 0: Killed"], "of n2"),
        (["n[1-2]: tasks 0-1: Exited with exit code 1"], "of n1"),
        (["exit_codes: timed out", "srun: timed out", "slurm_receive_msg: n1", "n2: task 1: Killed"], "of n2"),
        (["Unable to confirm allocation"], ""),
    ],
)
def test_the_log_of_the_node_that_failed_is_shown(said: list[str], shown: str, tmp_path: Path) -> None:
    """What srun says begins with other words too, which may be names of files."""
    (tmp_path / "exit_codes").mkdir()
    for node in ("n1", "n2"):
        (tmp_path / f"{node}.log").write_text(f"of {node}\n")
    errors = "".join(f"srun: error: {line}\n" for line in said)
    (tmp_path / "srun.log").write_text(errors)
    function = re.search(r"^show_failure\(\) \{.*?^\}", PRETRAIN, flags=re.DOTALL | re.MULTILINE)[0]
    slurm = "scontrol() { if [[ $3 == 'n[1-2]' ]]; then echo n1 n2; else echo $3; fi; }"
    script = f"set -euo pipefail; {slurm}; {function}; logs={tmp_path}; show_failure"
    output = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert output == errors + (f"{shown}\n" if shown else "")


@pytest.mark.parametrize("word", ["-p", "--export=ALL", "--partition=gpu", "-N2"])
def test_options_of_sbatch_behind_the_script_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=f"^{word}: options of sbatch go before the script's name"):
        refuse_options_of_sbatch(["debug=smoke", word])


def test_flags_and_values_that_are_ours_stay() -> None:
    refuse_options_of_sbatch(["--config-dir", "layouts", "--config-dir=layouts", "run.notes='-p gpu'", "~logger"])


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ("CHAIN=c CHAIN_LEFT=1", "saved; the next job of the chain goes on"),
        (
            "CHAIN=c CHAIN_LEFT=0",
            "saved; this was the chain's last job: slurm/chain.sh with the same arguments goes on",
        ),
        ("", "saved; requeued"),
    ],
)
def test_a_job_says_who_goes_on(environment: str, said: str) -> None:
    function = re.search(r"^start_again\(\) \{.*?^\}", PRETRAIN, flags=re.DOTALL | re.MULTILINE)[0]
    script = (
        f'set -u; {environment or ":"}; is_ending=; job=1; say() {{ echo "$1"; }}; scontrol() {{ :; }}; {function}; '
    )
    output = subprocess.run(
        ["bash", "-c", f"{script} start_again 7 saved"], capture_output=True, text=True, check=False
    )
    assert (output.returncode, output.stdout) == (7, f"{said}\n")


def test_a_chain_without_its_length_says_how_it_is_started() -> None:
    result = subprocess.run(["bash", str(ROOT / "slurm/chain.sh")], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "slurm/chain.sh 8 --nodes=16 slurm/pretrain.sbatch" in result.stderr
