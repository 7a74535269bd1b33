"""`run.dry_run=true` as a user runs it."""

from pathlib import Path

from tests.helpers.cli import run_cli
from tests.helpers.training import TINY

COMMAND = ["pretrain.py", *TINY, "data=blend", "train.global_batch_size=16", "parallel=ep2", "run.dry_run=true"]


def test_of_launched_ranks_one_builds_all_and_writes_nothing(tmp_path: Path) -> None:
    """As torchrun and srun start them; the others have nothing to wait for."""
    first, other = (run_cli(*COMMAND, cwd=tmp_path, RANK=rank, WORLD_SIZE="8") for rank in ("0", "7"))
    assert (first.returncode, other.returncode, other.stdout) == (0, 0, ""), first.stderr + other.stderr
    assert "0-7    dense 0, MoE 1-3" in first.stdout
    assert "data.train=[]: the run itself needs" in first.stdout
    assert first.stdout.endswith("dry run: 8 ranks, 3 distinct, all as planned\n")
    assert not list(tmp_path.iterdir())


def test_missing_files_and_wrong_options_are_errors(tmp_path: Path) -> None:
    options = ["data=blend", "data.train=[{path: nowhere}]", "parallel.expert_model_parallel_size=7"]
    result = run_cli("pretrain.py", *options, "run.dry_run=true", cwd=tmp_path)
    assert result.returncode == 2
    assert "no such file: nowhere.bin" in result.stderr
    assert "parallel.expert_model_parallel_size=7" in result.stderr
