"""Saving and loading beside `torch.distributed.checkpoint` with the same tensors, on one rank."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Seconds = dict[str, list[float]]


def save_and_load(hidden_size: int, repeat: int) -> list[dict[str, Any]]:
    """Medians over `repeat` rounds after one to warm up; each round on an idle disk.

    The nano model at a width of `hidden_size`; its weights, main parameters and moments in fp32.
    """
    from megatron_moe.config.load import compose_config
    from megatron_moe.config.validate import validate
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train.loop import next_batches, set_up

    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=Path.cwd()))
    sizes = [f"model.hidden_size={hidden_size}", f"model.ffn_hidden_size={4 * hidden_size}"]
    config = compose_config(["data=mock", *sizes, f"run.dir={folder}/run", "checkpoint.keep_last=1"])
    validate(config, 1)
    try:
        with distributed(config.parallel) as context:
            run = set_up(config, context)
            batches = next_batches(run)
            seconds: Seconds = {}
            for _ in range(repeat + 1):
                nbytes = measure(run, batches, folder / "bare", seconds)
        return report({name: statistics.median(values[1:]) for name, values in seconds.items()}, nbytes)
    finally:
        shutil.rmtree(folder)


def measure(run: Any, batches: list[Any], bare: Path, seconds: Seconds) -> int:
    """One round; returns the bytes of the state."""
    import torch
    import torch.distributed.checkpoint as dcp

    from megatron_moe.checkpoint.manifest import check_whole
    from megatron_moe.model.build import sharded_tensors
    from megatron_moe.train.step import train_step

    shards = sharded_tensors(run.checkpointer.sharded_state_dict())
    tensors = {f"{shard.key}{shard.global_offset}": shard.data.detach() for shard in shards}
    timed(seconds, "torch save", lambda: dcp.save(tensors, checkpoint_id=str(bare)))
    run.state.advance(1)
    timed(seconds, "save", lambda: run.checkpointer.save(run.state))
    run.state.advance(1)
    with added(seconds, "blocked") as waited:
        waited(lambda: run.checkpointer.begin(run.state))
        copied = run.checkpointer.wait_until_copied
        train_step(run.pipeline, run.optimizer, batches, 1, before_update=lambda: waited(copied))
        folder = None
        while folder is None:
            wait_for(lambda: run.checkpointer.is_ready)
            folder = waited(run.checkpointer.go_on)
    empty = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    timed(seconds, "torch load", lambda: dcp.load(empty, checkpoint_id=str(bare)))
    timed(seconds, "verify", lambda: check_whole(folder))
    timed(seconds, "load", lambda: run.checkpointer._load(folder, run.state, with_rng=True))
    shutil.rmtree(bare)
    return sum(tensor.nbytes for tensor in tensors.values())


def wait_for(condition: Callable[[], bool]) -> None:
    """Look until it holds, without taking a core."""
    while not condition():
        time.sleep(0.01)


def timed(seconds: Seconds, name: str, action: Callable[[], Any]) -> None:
    """Call, once everything written before is on disk."""
    with added(seconds, name) as waited:
        waited(action)


@contextmanager
def added(seconds: Seconds, name: str):
    """The seconds of several calls as one."""
    os.sync()
    total = [0.0]

    def waited(action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = action()
        total[0] += time.perf_counter() - start
        return result

    yield waited
    seconds.setdefault(name, []).append(total[0])


def report(median: dict[str, float], nbytes: int) -> list[dict[str, Any]]:
    """As rows of the table."""
    loads = median["verify"] + median["load"]
    size = f"{nbytes / 1e6:,.0f} MB"
    pairs = [
        (f"save of {size}, digests included", median["save"], "torch.distributed.checkpoint", median["torch save"]),
        (f"load of {size}, digests included", loads, "torch.distributed.checkpoint", median["torch load"]),
        ("training waits for a save in the background", median["blocked"], "in the foreground", median["save"]),
    ]
    return [
        {"what": what, "figure": ours, "unit": "s", "beside": f"{other}: {theirs:.3g}", "ratio": ours / theirs}
        for what, ours, other, theirs in pairs
    ] + [{"what": "of the load, digests", "figure": median["verify"], "unit": "s"}]
