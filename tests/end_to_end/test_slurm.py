"""Jobs on a Slurm of two nodes: real runs, and runs whose rank does what it is told instead of training."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_moe.config.derived import data_parallel_size
from megatron_moe.config.load import CONF_DIR, compose_config
from megatron_moe.config.validate import validate
from megatron_moe.data.tokenizer import train_tokenizer
from megatron_moe.plan.memory import memory_by_stage
from slurm.sweep import job_arguments
from tests.helpers.cli import ROOT, metrics_of, run_cli
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import UNEQUAL
from tests.helpers.secrets import SECRETS, files_with
from tests.helpers.slurm import Cluster, running_cluster, wait_until
from tests.helpers.training import TINY

LAYOUT = "parallel=pp2_ep2"
STEPS = "train.train_steps=14"
INTERVAL = 5  # of saves
RUN = [
    *(option for option in TINY if not option.startswith("train.train_steps")),
    "evaluation.interval=1000",
    "evaluation.num_samples=8",
    "logger.log_interval=1",
    f"checkpoint.save_interval={INTERVAL}",
]
NOTES = """a "b" $(touch hacked); c | `touch hacked` > hacked
$HOME && \\n * é"""
PATIENCE_S = 300  # the machine may be busy


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What an uninterrupted run logs."""
    return trained_here(tmp_path_factory.mktemp("reference"), STEPS)


def trained_here(run: Path, *overrides: str) -> list[dict[str, Any]]:
    """What a run has logged when it is trained to its end by ranks as pretrain.py starts them."""
    run.mkdir(exist_ok=True)
    run_ranks(train_as_told, 4, [*RUN, *overrides, LAYOUT, f"run.dir={run}"])
    return computed(run)


def train_as_told(overrides: list[str]) -> None:
    import pretrain

    config = compose_config(overrides)
    validate(config, 4)
    pretrain.train_here(config, [])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project, as a folder to submit from."""
    for name in ("pretrain.py", "conf", "tools", "megatron_moe", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def computed(run: Path) -> list[dict[str, Any]]:
    """The logged steps without what the clock and the memory say."""
    return [{name: value for name, value in line.items() if not name.startswith(UNEQUAL)} for line in metrics_of(run)]


def log_of(project: Path, job: int | str) -> str:
    file = project / f"slurm-{job}.out"
    return file.read_text() if file.exists() else ""


def said(project: Path, job: int | str) -> list[str]:
    """The lines of a job's log that the script itself wrote, from the number of the attempt."""
    return re.findall(r"^[\d-]{10} [\d:]{8} job \d+\.(\d+: .*)$", log_of(project, job), flags=re.MULTILINE)


# --- Real runs


@pytest.fixture
def played(tmp_path: Path) -> Path:
    """A folder to submit from, with another pretrain.py (tests/helpers/played_training.py)."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    shutil.copy(ROOT / "tests" / "helpers" / "played_training.py", tmp_path / "pretrain.py")
    return tmp_path


def wait_for(path: Path, log: Callable[[], str]) -> None:
    wait_until(path.exists, PATIENCE_S, log)


def test_a_run_is_killed_and_stopped_and_goes_on_as_one_that_was_not(
    cluster: Cluster, played: Path, reference: list[dict[str, Any]]
) -> None:
    """Its last rank is killed; then it is told to save, and not to come back. Strange notes, and secrets."""
    run = played / "runs" / "cut"
    script = ["slurm/pretrain.sbatch", *RUN, STEPS, LAYOUT, "run.name=cut", f"run.notes='{NOTES}'"]
    options = ["--nodes=2", f"--job-name={NOTES}"]
    job = cluster.submit(*options, *script, cwd=played, HOLD="8 11", **SECRETS)
    wait_for(run / "held_0", lambda: log_of(played, job))
    (victim,) = cluster.processes(SLURMD_NODENAME="n2", LOCAL_RANK="1")
    victim.kill()
    wait_for(run / "held_1", lambda: log_of(played, job))
    cluster.call("scontrol", "update", f"JobId={job}", "Requeue=0")
    cluster.call("scancel", "--signal=USR1", str(job))
    fields = cluster.wait(job, PATIENCE_S)

    assert (fields["ExitCode"], fields["Restarts"]) == ("75:0", "1")
    assert said(played, job) == [
        f"0: 2 nodes of 2 ranks, runs/cut from step 0, logs in runs/cut/logs/{job}.0",
        "0: failed after step 5; requeued",
        f"1: 2 nodes of 2 ranks, runs/cut from step 5, logs in runs/cut/logs/{job}.1",
        "1: saved at step 11; not requeued, the same command goes on",
    ]
    wait_until(lambda: not cluster.processes(SLURM_JOB_ID=str(job)), 5, lambda: str(cluster.processes()))
    assert re.search(r"^srun: error: n[12]: task [01]: ", log_of(played, job), flags=re.MULTILINE)
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["notes"] == NOTES
    assert not list(played.rglob("hacked"))
    for secret in SECRETS.values():
        assert files_with(secret, played) == []

    rank_0 = (run / "logs" / "rank_0.log").read_text()
    assert rank_0.count("layout    4 ranks: tensor 1, pipeline 2 x 1 virtual, context 1, data 2, expert 2") == 2
    assert "Traceback" not in rank_0
    assert sorted(path.name for path in (run / "logs" / f"{job}.1").iterdir()) == [
        "exit_codes",
        "n1.log",
        "n2.log",
        "srun.log",
    ]
    assert trained_here(run, STEPS) == reference


@pytest.mark.soak("time limits on Slurm")
def test_time_limits_change_nothing(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    """Slurm looks every 30 s, so that the signal comes 20 to 50 s after the start."""
    steps = "train.train_steps=600"
    limit = ["--nodes=2", "--time=1", "--signal=USR1@10"]
    job = cluster.submit(*limit, "slurm/pretrain.sbatch", *RUN, steps, LAYOUT, "run.name=cut", cwd=project)
    fields = cluster.wait(job, 6 * PATIENCE_S)
    assert fields["JobState"] == "COMPLETED"
    assert int(fields["Restarts"]) >= 1
    stops = [line for line in said(project, job) if "saved at step" in line]
    assert len(stops) == int(fields["Restarts"])
    assert computed(project / "runs" / "cut") == trained_here(tmp_path / "whole", steps)


def tasks_of(cluster: Cluster, node: str) -> list[psutil.Process]:
    return cluster.processes(SLURMD_NODENAME=node)


def kill_torchrun(cluster: Cluster) -> None:
    (torchrun,) = (process for process in tasks_of(cluster, "n2") if "RANK" not in process.environ())
    torchrun.kill()


def kill_step(cluster: Cluster) -> None:
    """Of the second node: what Slurm started, and what watches over it there."""
    tasks = tasks_of(cluster, "n2")
    for process in {*tasks, *(task.parent() for task in tasks)}:
        process.kill()


def kill_node(cluster: Cluster) -> None:
    cluster.kill_node("n2")
    kill_step(cluster)


@pytest.mark.soak("kills on Slurm")
@pytest.mark.parametrize("kill", [kill_torchrun, kill_step, kill_node])
def test_what_is_killed_on_a_node_comes_back(
    kill: Any, cluster: Cluster, played: Path, reference: list[dict[str, Any]]
) -> None:
    script = ["slurm/pretrain.sbatch", *RUN, STEPS, LAYOUT, "run.name=cut"]
    job = cluster.submit("--nodes=2", *script, cwd=played, HOLD="8")
    run = played / "runs" / "cut"
    wait_for(run / "held_0", lambda: log_of(played, job))
    kill(cluster)
    wait_until(lambda: cluster.fields(job)["Restarts"] == "1", PATIENCE_S, lambda: str(cluster.fields(job)))
    if kill is kill_node:
        cluster.start_node("n2")
    assert cluster.wait(job, PATIENCE_S)["JobState"] == "COMPLETED"
    assert computed(run) == reference


# --- Ranks that do what `run.notes` says


def play(cluster: Cluster, folder: Path, attempts: str, *options: str, **environment: str) -> int:
    script = [f"run.notes='{attempts}'", "run.name=played", "train.train_steps=9"]
    return cluster.submit(*options, "slurm/pretrain.sbatch", *script, cwd=folder, **environment)


def test_attempts_without_a_new_checkpoint_come_to_an_end(cluster: Cluster, played: Path) -> None:
    """The first is stopped before its ranks start. Without the node that the user leaves out, in the second too."""
    (played / "hold").touch()
    job = play(cluster, played, "crash+9", "--nodes=1", "--exclude=n1", MOST_IDLE="2")
    wait_for(played / "held", lambda: log_of(played, job))
    cluster.call("scancel", "--signal=USR1", str(job))
    fields = cluster.wait(job, PATIENCE_S)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "1")
    assert (fields["NodeList"], fields["ExcNodeList"]) == ("n2", "n1")
    assert said(played, job) == [
        "0: asked to stop before the ranks started; requeued",
        f"1: 1 nodes of 1 ranks, runs/played from step 0, logs in runs/played/logs/{job}.1",
        "1: attempts without a new checkpoint: 2, not started again",
    ]
    assert "RuntimeError: a broken cable" in log_of(played, job)


def test_what_would_come_again_is_not_requeued(cluster: Cluster, played: Path) -> None:
    job = play(cluster, played, "hopeless")
    wrong = cluster.submit("slurm/pretrain.sbatch", "model.num_layer=3", cwd=played)
    for number, code in ((job, 3), (wrong, 2)):
        fields = cluster.wait(number, PATIENCE_S)
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", f"{code}:0", "0")
    assert said(played, job)[-1] == "0: ended with exit code 3, not started again"
    assert "error: the loss is not finite" in log_of(played, job)
    assert "error: model.num_layer=3: Key 'num_layer' not in 'ModelConfig'" in log_of(played, wrong)


def test_a_cancelled_job_saves_and_leaves_nothing(cluster: Cluster, played: Path) -> None:
    job = play(cluster, played, "ask_4_preempted")
    wait_for(played / "runs" / "played" / "asks", lambda: log_of(played, job))
    cluster.call("scancel", str(job))
    fields = cluster.wait(job, PATIENCE_S)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    assert said(played, job)[-1] == "0: saved at step 4; ended by scancel or by Slurm"
    wait_until(lambda: not cluster.processes(SLURM_JOB_ID=str(job)), 5, lambda: str(cluster.processes()))


def test_a_chain_goes_on_and_ends_with_the_run(cluster: Cluster, played: Path) -> None:
    assert chain(cluster, played, "7_crash+9", 3) == [
        ("1:0", "0: failed after step 7; the next job of the chain goes on"),
        ("0:0", "0: done"),
        ("0:0", "0: runs/played is done"),
    ]


@pytest.mark.soak("chains on Slurm")
def test_a_chain_ends_with_a_run_that_cannot_go_on(cluster: Cluster, played: Path) -> None:
    assert chain(cluster, played, "4_preempted+hopeless+9", 4) == [
        ("75:0", "0: saved at step 4; the next job of the chain goes on"),
        ("3:0", "0: ended with exit code 3, not started again"),
        ("1:0", "0: the chain has ended, see the job before"),
        ("1:0", "0: the chain has ended, see the job before"),
    ]


def chain(cluster: Cluster, folder: Path, attempts: str, length: int) -> list[tuple[str, str]]:
    """What its jobs end with: exit code and last word."""
    script = ["slurm/pretrain.sbatch", f"run.notes='{attempts}'", "run.name=played", "train.train_steps=9"]
    answer = cluster.call("slurm/chain.sh", str(length), *script, cwd=folder)
    jobs = re.findall(r"Submitted batch job (\d+)", answer)
    assert re.search(r"all of them: scancel --name=chain-\d+-\d+\n$", answer)
    return [(cluster.wait(job, PATIENCE_S)["ExitCode"], said(folder, job)[-1]) for job in jobs]


def test_a_sweep_is_an_array_of_runs(cluster: Cluster, played: Path) -> None:
    """The second one is requeued, whose number is also the whole array's, while the first one runs."""
    sweep = ["run.name=wait_9,4_preempted+9", "run.notes='${run.name}'", "train.train_steps=9"]
    array = cluster.submit("--array=0-1", "slurm/sweep.sbatch", *sweep, cwd=played)
    tasks = [cluster.wait(f"{array}_{task}", PATIENCE_S) for task in range(2)]
    assert [(task["JobState"], task["Restarts"]) for task in tasks] == [("COMPLETED", "0"), ("COMPLETED", "1")]
    assert tasks[1]["JobId"] == str(array)


def test_a_node_has_a_rank_for_each_gpu_in_the_container(cluster: Cluster, played: Path) -> None:
    """Though sbatch was not asked for GPUs: whole nodes have them.

    pyxis adds options to srun; here one that notes them and leaves them out stands in for it.
    """
    (played / "bin").mkdir()
    srun = played / "bin" / "srun"
    srun.write_text(f"""#!{sys.executable}
import os, sys
with open("options", "a") as file:
    file.write(" ".join(a for a in sys.argv if a.startswith("--container")) + "\\n")
os.execv("{shutil.which("srun")}", ["srun", *(a for a in sys.argv[1:] if not a.startswith("--container"))])
""")
    srun.chmod(0o755)
    path = f"{played}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    container = {"CONTAINER_IMAGE": "my image", "CONTAINER_MOUNTS": "/data:/data", "PATH": path}
    job = play(cluster, played, "gpus+gpus", "--partition=gpu", "--nodelist=n3", **container)
    assert cluster.wait(job, PATIENCE_S)["JobState"] == "COMPLETED", log_of(played, job)
    assert said(played, job)[0].startswith("0: 1 nodes of 2 ranks, ")
    ranks = sorted((played / "runs" / "played").glob("gpus_*"))
    assert [(path.name, path.read_text()) for path in ranks] == [("gpus_0", "2"), ("gpus_1", "2")]
    mounts = f"--container-mounts={played}:{played},/data:/data"
    options = f"--container-image=my image {mounts} --container-workdir={played}"
    assert (played / "options").read_text().splitlines() == [options] * 2


# --- Tokenizing

TEXT = [f"The number {i} is followed by {i + 1}, and {i * i} is its square.\n" * 20 for i in range(20_000)]


@pytest.mark.soak("time limits on Slurm")
def test_tokenizing_goes_on_after_its_time_limit(cluster: Cluster, project: Path) -> None:
    (project / "docs.jsonl").write_text("".join(f'{{"text": {line!r}}}\n'.replace("'", '"') for line in TEXT))
    train_tokenizer(TEXT[:100], 300).save(str(project / "tokenizer.json"))
    options = ["--input", "docs.jsonl", "--tokenizer", "tokenizer.json", "--output"]
    job = cluster.submit("slurm/preprocess.sbatch", *options, "docs", cwd=project)
    wait_until(lambda: any(project.glob("docs*.partial*")), PATIENCE_S, lambda: log_of(project, job))
    cluster.call("scancel", "--batch", "--signal=USR1", str(job))
    fields = cluster.wait(job, PATIENCE_S)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    whole = run_cli("tools/preprocess_data.py", *options, "whole", cwd=project)
    assert whole.returncode == 0, whole.stderr
    assert (project / "docs.bin").read_bytes() == (project / "whole.bin").read_bytes()


# --- slurm/README.md

README = (ROOT / "slurm" / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
ROW = r"^\| `(\w+)` \| (\d+) \| `(\w+)` \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"


def some_job(cluster: Cluster, folder: Path, *, waits: bool) -> int:
    job = cluster.submit(*(["--hold"] if waits else []), "--requeue", "--wrap=sleep 1", cwd=folder)
    state = "PENDING" if waits else "RUNNING"
    wait_until(lambda: cluster.fields(job)["JobState"] == state, PATIENCE_S, lambda: str(cluster.fields(job)))
    return job


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_a_command_of_the_readme_is_accepted(command: str, cluster: Cluster, project: Path) -> None:
    """By the controller, for 64 nodes of 8 GPUs; and what it trains is a right configuration of them."""
    tested = re.sub(r"\b(sbatch|chain\.sh \d+) ", r"\1 --test-only --gpus-per-node=8 ", command, count=1)
    if "JOBID" in command:
        tested = tested.replace("JOBID", str(some_job(cluster, project, waits="scontrol" in command)))
        tested = tested.replace("n007", "n2")
    result = cluster.run("bash", "-e", "-o", "pipefail", "-c", tested, cwd=project, SBATCH_PARTITION="gpu")
    assert result.returncode == 0, result.stdout
    assert "error" not in result.stdout
    if "pretrain.sbatch" in command or "sweep.sbatch" in command:
        nodes = int(re.search(r"--nodes=(\d+)", command)[1])
        assert result.stdout.count("to start at") == (8 if "chain" in command else 1)
        overrides = shlex.split(command.split(".sbatch ")[1])
        (project / "data").mkdir()
        for file in ("docs.bin", "docs.idx"):
            (project / "data" / file).touch()
        with contextlib.chdir(project):
            job = job_arguments(overrides, {"SLURM_ARRAY_TASK_ID": "5"} if "sweep" in command else {})
            config = compose_config([o.replace("/data/", "data/") for o in job])
            assert validate(config, 8 * nodes) == 8 * nodes


def test_the_readme_tells_the_memory_that_is_computed() -> None:
    rows = re.findall(ROW, README, flags=re.MULTILINE)
    assert len(rows) == 4
    for name, nodes, layout, replicas, *gib in rows:
        config = compose_config([f"experiment={name}"])
        ranks, parallel = 8 * int(nodes), config.parallel
        fullest = max(memory_by_stage(config, ranks), key=lambda stage: stage.total)
        assert [float(number) for number in gib] == pytest.approx(
            [number / 2**30 for number in (fullest.static, fullest.total - fullest.static, fullest.total)], abs=0.051
        )
        assert data_parallel_size(parallel, ranks) == int(replicas)
        assert f"- override /parallel: {layout}\n" in (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
        assert f"--nodes={nodes} " in next(c for c in COMMANDS if f"={name} " in c)
