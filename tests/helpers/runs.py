"""Whole runs of the tiny model as pretrain.py trains it, compared by what they log, read and end with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe.config.schema import Config
from tests.helpers.cli import metrics_of
from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_config

# name: overrides, ranks
LAYOUTS = {
    "single": (["parallel=single"], 1),
    "ep2": (["parallel=ep2"], 2),
    "pp2": (["parallel=pp2"], 2),
    "pp2_ep2": (["parallel=pp2_ep2"], 4),
    "pp2_vpp2": (["parallel=pp2_vpp2"], 2),
    "tp2": (["parallel=tp2"], 2),
    "tp2_ep2": (["parallel=tp2_ep2"], 2),
}
UNEQUAL = ("speed/", "time/", "memory/", "checkpoint/")  # metrics that no two runs share
Sample = tuple[int, int, str]  # its number, its source, digest of its tokens


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        metrics: all that it logged, by step.
        samples: that each of its records lists, by the record's name, in the order they were read.
        digests: of each tensor of the state that its last process ended with, by rank.
    """

    metrics: dict[int, dict[str, Any]]
    samples: dict[str, list[Sample]]
    digests: list[dict[str, str]]


def train_run(folder: Path, layout: str, *overrides: str) -> Outcome:
    """Train in new processes, from where the folder's latest checkpoint is, to the end or `train.exit_step`."""
    options, world_size = LAYOUTS[layout]
    ours = [f"run.dir={folder}", "logger.log_interval=1", "data.record_samples=true"]
    digests = run_ranks(train_and_digest, world_size, [*options, *ours, *overrides])
    metrics = {line.pop("step"): _comparable(line) for line in metrics_of(folder)}
    return Outcome(metrics, _samples(folder), digests)


def train_and_digest(overrides: list[str]) -> dict[str, str]:
    """On each rank: train, then the digests of the state."""
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train.loop import train

    config = tiny_config(*overrides, world_size=int(os.environ["WORLD_SIZE"]))
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    with (
        runs_of_the_loop() as runs,
        distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        train(config, context, overrides)
        return state_digests(runs[-1])


@contextlib.contextmanager
def runs_of_the_loop() -> Iterator[list[Any]]:
    """What the loop sets up from here on, in this process; its model draws random numbers, as one with dropout does."""
    from megatron_moe.train import loop

    set_up, found = loop.set_up, []

    def catching(config: Config, context: Any) -> Any:
        found.append(set_up(config, context))
        for chunk in found[-1].pipeline.model:
            chunk.register_forward_pre_hook(_draw)
        return found[-1]

    loop.set_up = catching
    yield found
    loop.set_up = set_up


def _draw(chunk: torch.nn.Module, _: Any) -> None:
    if chunk.training:
        torch.rand(1)


def state_digests(run: Any) -> dict[str, str]:
    """SHA-256 of each parameter, of each tensor of the optimizer's state and of the random numbers' on this rank."""
    found = {"random numbers": _digest(torch.get_rng_state())}
    for i, chunk in enumerate(run.pipeline.model):
        for name, parameter in chunk.named_parameters():
            found[f"chunk {i}: {name}"] = _digest(parameter)
    for i, part in enumerate(run.optimizer.chained_optimizers):
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        for j, parameter in enumerate(parameters):
            found[f"optimizer {i}: main parameter {j}"] = _digest(parameter)
            for name, value in part.optimizer.state[parameter].items():
                found[f"optimizer {i}: {name} {j}"] = _digest(torch.as_tensor(value))
    return found


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def _comparable(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(UNEQUAL)}


def _samples(folder: Path) -> dict[str, list[Sample]]:
    """By rank that recorded; the records go, so that the next process's are its own."""
    found = {}
    for file in sorted((folder / "samples").glob("*.jsonl")):
        found[file.stem] = [tuple(json.loads(line).values()) for line in file.read_text().splitlines()]
        file.unlink()
    return found


def assert_same_digests(found: list[dict[str, str]], expected: list[dict[str, str]]) -> None:
    """All ranks end with the same bytes; names the tensors that differ."""
    assert len(found) == len(expected)
    for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if ours[name] != theirs[name]]
        assert not different, f"rank {rank}: {len(different)} of {len(ours)} tensors differ: {different[:5]}"


def write_blend(folder: Path) -> list[str]:
    """Two indexed datasets of several epochs in a short run; the options that train on them."""
    from megatron_moe.data.indexed import IndexedWriter

    for name, tokens in (("long", 3000), ("short", 400)):
        random = np.random.default_rng(tokens)
        lengths = np.full(tokens // 20, 20)
        writer = IndexedWriter(folder / name, np.uint16)
        writer.append(random.integers(0, 256, lengths.sum()), lengths)
        writer.finish()
    sources = f"[{{path: {folder}/long, weight: 0.7}}, {{path: {folder}/short, weight: 0.3}}]"
    held_out = ["data.valid_fraction=0.1", "data.test_fraction=0.2"]
    return [
        "data=blend",
        "data.sequence_length=32",
        f"data.train={sources}",
        f"data.cache_dir={folder}/cache",
        *held_out,
    ]
