"""A run reads the same samples in the same order however many ranks share them, also from one resume to the next."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import compose_config
from megatron_moe.data.indexed import IndexedWriter
from megatron_moe.data.sources import build_datasets
from megatron_moe.distributed.context import from_main
from tests.helpers.cli import metrics_of, run_cli
from tests.helpers.ranks import run_ranks
from tests.helpers.training import TINY

RAMP = ["train.batch_ramp.start=4", "train.batch_ramp.increment=4", "train.batch_ramp.tokens=500"]


def write_source(prefix: Path, num_tokens: int) -> None:
    random = np.random.default_rng(num_tokens)
    lengths = np.full(num_tokens // 20, 20)
    writer = IndexedWriter(prefix, np.uint16)
    writer.append(random.integers(0, 256, lengths.sum()), lengths)
    writer.finish()


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """A blend of a long source and one of 12 sequences, which it begins anew within 56 samples."""
    write_source(tmp_path / "long", 3000)
    write_source(tmp_path / "short", 400)
    sources = f"[{{path: {tmp_path}/long, weight: 0.7}}, {{path: {tmp_path}/short, weight: 0.3}}]"
    return [*TINY, *RAMP, "data=blend", f"data.train={sources}", "data.sequence_length=32", "train.train_steps=9"]


def records(run: Path) -> list[list[tuple[int, str]]]:
    """By rank."""
    files = sorted((run / "samples").glob("rank_*.jsonl"))
    return [[tuple(json.loads(line).values()) for line in file.read_text().splitlines()] for file in files]


def test_the_samples_of_a_run_that_changes_ranks_are_those_of_the_data(options: list[str], tmp_path: Path) -> None:
    """From 1 rank to 2, 4 and 1 again, with other micro batches and readers, on the ramp and past the first epoch."""
    stages = [
        ("1", "2", "train.micro_batch_size=2", "data.num_workers=0"),
        ("2", "4", "train.micro_batch_size=1", "data.num_workers=2"),
        ("4", "6", "train.micro_batch_size=1", "data.num_workers=0"),
        ("1", "9", "train.micro_batch_size=4", "data.num_workers=2"),
    ]
    seen: list[tuple[int, str]] = []
    consumed = 0
    run = tmp_path / "runs" / "a"
    for ranks, last, *others in stages:
        arguments = [f"parallel.data_parallel_size={ranks}", f"train.exit_step={last}", *others, "run.name=a"]
        result = run_cli(
            "pretrain.py", *options, *arguments, "data.record_samples=true", "logger.log_interval=1", cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        until = int(metrics_of(run)[-1]["consumed_tokens"]) // 32
        by_rank = records(run)
        assert len(by_rank) == int(ranks)
        new = sorted(sample for rank in by_rank for sample in rank)
        assert [i for i, _ in new] == list(range(consumed, until))
        seen += new
        consumed = until
        for file in (run / "samples").iterdir():
            file.unlink()
    assert [line["train/batch_size"] for line in metrics_of(run)] == [4, 4, 4, 4, 8, 8, 8, 8, 8]
    data = build_datasets(compose_config([option for option in options if option not in RAMP])).train
    assert data.place(consumed)[1] > len(data.datasets[1])
    digests = [hashlib.sha256(data[i][:-1].astype("<i8").tobytes()).hexdigest() for i in range(consumed)]
    assert seen == list(enumerate(digests))
    assert len(set(digests)) == len(digests)


def error_of_main() -> tuple[str, ...]:
    """On each rank: the problems that rank 0 found."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=os.environ["MEGATRON_MOE_INIT_METHOD"], rank=rank, world_size=2)
    calls = []

    def look() -> str:
        calls.append(rank)
        return f"found by {rank}"

    def fail() -> str:
        raise ConfigError(f"first of {rank}", "second")

    assert from_main(look) == "found by 0"
    assert len(calls) == (rank == 0)
    with pytest.raises(ConfigError) as error:
        from_main(fail)
    dist.destroy_process_group()
    return error.value.problems


def test_what_is_wrong_on_the_main_rank_is_raised_on_every_rank() -> None:
    assert run_ranks(error_of_main, 2) == [("first of 0", "second")] * 2
