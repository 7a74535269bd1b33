"""Run a function on several gloo ranks and show what each of them raised."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.multiprocessing

TIMEOUT_S = 180.0


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(*args)` on each rank, in fresh processes; returns the results by rank.

    Raises:
        AssertionError: with the traceback of every rank that raised, earliest first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preload"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = {}, []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            pipes[receiver] = rank
            process = context.Process(
                target=_rank_main, args=(sender, f"file://{folder}/rendezvous", rank, world_size, function, args)
            )
            process.start()
            sender.close()
            processes.append(process)
        try:
            results = _collect(pipes, world_size)
            for process in processes:
                process.join(timeout=10)
            return results
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()


def _collect(pipes: dict[Connection, int], world_size: int) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    deadline = time.monotonic() + TIMEOUT_S
    while len(results) + len(failures) < world_size:
        ready = wait(list(pipes), timeout=deadline - time.monotonic())
        if not ready:
            missing = set(range(world_size)) - set(results)
            failures.append((time.time(), -1, f"ranks {missing} did not end within {TIMEOUT_S:.0f} s"))
            break
        for pipe in ready:
            rank = pipes.pop(pipe)
            try:
                moment, error, result = pipe.recv()
            except EOFError:
                moment, error, result = time.time(), "ended without a word", None
            if error:
                failures.append((moment, rank, error))
                deadline = min(deadline, time.monotonic() + 5)
            else:
                results[rank] = result
    assert not failures, "\n".join(f"--- rank {rank}\n{error}" for _, rank, error in sorted(failures))
    return [results[rank] for rank in range(world_size)]


def _rank_main(
    sender: Connection, init_method: str, rank: int, world_size: int, function: Callable[..., Any], args: tuple
) -> None:
    os.setsid()  # so that what a rank starts ends with it
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MEGATRON_MOE_INIT_METHOD": init_method,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.multiprocessing.set_sharing_strategy("file_system")  # a result outlives the rank that made it
    try:
        sender.send((time.time(), None, function(*args)))
    except BaseException:
        sender.send((time.time(), traceback.format_exc(), None))
