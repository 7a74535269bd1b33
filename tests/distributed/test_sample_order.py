"""A run reads the same samples in the same order however many ranks share them, also from one resume to the next."""

import hashlib
import json
import os
import subprocess
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


def data_options(folder: Path) -> list[str]:
    sources = f"[{{path: {folder}/long, weight: 0.7}}, {{path: {folder}/short, weight: 0.3}}]"
    held_out = ["data.valid_fraction=0.1", "data.test_fraction=0.2"]
    return ["data=blend", f"data.train={sources}", "data.sequence_length=32", *held_out]


def pretrain(cwd: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    steps = ["train.train_steps=9", "evaluation.interval=4", "logger.log_interval=1"]
    options = [*TINY, *RAMP, *data_options(folder), *steps, "data.record_samples=true", "run.name=a"]
    return run_cli("pretrain.py", *options, *arguments, cwd=cwd)


def take_records(run: Path) -> list[list[tuple[int, int, str]]]:
    """By rank; they are gone after that."""
    by_rank = []
    for file in sorted((run / "samples").glob("rank_*.jsonl")):
        by_rank.append([tuple(json.loads(line).values()) for line in file.read_text().splitlines()])
        file.unlink()
    return by_rank


def test_the_samples_of_a_run_that_changes_ranks_are_those_of_the_data(tmp_path: Path) -> None:
    """From 1 rank to 2, 4 and 1 again, with other micro batches and readers, on the ramp and past the first epoch."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    write_source(here / "long", 3000)
    write_source(here / "short", 400)
    stages = [
        ("1", "2", "train.micro_batch_size=2", "data.num_workers=0"),
        ("2", "4", "train.micro_batch_size=1", "data.num_workers=2"),
        ("4", "6", "train.micro_batch_size=1", "data.num_workers=0"),
        ("1", "9", "train.micro_batch_size=4", "data.num_workers=2"),
    ]
    seen: list[tuple[int, int, str]] = []
    run = tmp_path / "runs" / "a"
    for ranks, last, *others in stages:
        if last == "9":
            here.rename(elsewhere)
        folder = here if here.exists() else elsewhere
        arguments = [f"parallel.data_parallel_size={ranks}", f"train.exit_step={last}", *others]
        result = pretrain(tmp_path, folder, *arguments)
        assert result.returncode == 0, result.stderr
        by_rank = take_records(run)
        assert len(by_rank) == int(ranks)
        new = sorted(sample for rank in by_rank for sample in rank)
        until = metrics_of(run)[-1]["consumed_tokens"] // 32
        assert [i for i, *_ in new] == list(range(len(seen), until))
        seen += new
    logged = metrics_of(run)
    assert [line["train/batch_size"] for line in logged] == [4, 4, 4, 4, 8, 8, 8, 8, 8]
    assert [line["step"] for line in logged if "valid/long/lm_loss" in line] == [2, 4, 6, 8, 9]
    assert [line["step"] for line in logged if "test/short/lm_loss" in line] == [9]
    assert "test/lm_loss" in result.stdout

    data = build_datasets(compose_config([*data_options(elsewhere), f"data.cache_dir={tmp_path}/other"])).train
    digests = [hashlib.sha256(data[i][:-1].astype("<i8").tobytes()).hexdigest() for i in range(len(seen))]
    places = [data.place(i) for i in range(len(seen))]
    assert seen == [(i, source, digests[i]) for i, (source, _) in enumerate(places)]
    last_of_short = max(number for source, number in places if source == 1)
    assert last_of_short > len(data.datasets[1])

    path = elsewhere / "short.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\7\0")
    result = pretrain(tmp_path, elsewhere)
    assert result.returncode == 2
    assert "error: data short: holds other documents than when" in result.stderr
    assert "data long" not in result.stderr
    assert "Traceback" not in result.stderr


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
