"""One run at Weights & Biases for all ranks and restarts. The only user of wandb; on rank 0 only."""

from __future__ import annotations

import contextlib
import json
import logging
import netrc
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from omegaconf import OmegaConf

from megatron_moe.config.errors import Preempted
from megatron_moe.config.schema import Config
from megatron_moe.distributed import watchdog
from megatron_moe.files import write_json
from megatron_moe.metrics.load_colors import HIGH, LOW, NEUTRAL, end_of_range

INIT_TIMEOUT_S = 20.0  # for the server to answer; after that the run is offline
FINISH_TIMEOUT_S = 30.0  # for what is left to be sent
KILL_S = 10.0  # after that, for wandb to end by itself
MOST_WAITING = 10_000  # calls
LOOK_S = 5.0  # between two looks for a stall
STALLED = 0.5  # of the watchdog's timeout
LONGEST_REASON = 300  # characters of an error
BY_TOKENS = ("train/*", "valid/*", "test/*")  # shown over tokens, all else over steps
HEAT_MAPS = {"moe/expert_load": "expert", "moe/device_load": "device"}

Call = Callable[[Any], None]  # with the run that `wandb.init` gives


class WandbRun:
    """A run at Weights & Biases: online where there is a key, else in files that `wandb sync` sends.

    All calls of wandb are made in a thread, so that training waits for no server and no disk; what goes wrong there is
    told once. The run's id is in `wandb.json` in the run's folder, and a run that goes on continues it. wandb can only
    append, so steps that are done again after a crash are not sent again.

    Args:
        config: of the run.
        logged_step: the last step that this run has logged so far.
    """

    def __init__(self, config: Config, *, logged_step: int) -> None:
        self._config = config
        self._sent_step = logged_step
        self._is_stalled = False
        self._has_warned = False
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Send a step's numbers, and at intervals heat maps of its loads."""
        self._call(partial(self._send, step, metrics))

    def alert(self, title: str, text: str) -> None:
        """Have the server tell the user, as by mail."""
        self._call(lambda run: run.alert(title, text, level="WARN"))

    def finish(self, error: BaseException | None) -> None:
        """Send what is left, for a limited time.

        Args:
            error: that ends the run, if any.
        """
        if isinstance(error, Preempted):
            self.alert("preempted", f"{self._config.run.name} is saved at step {error.step:,}")
            self._call(lambda run: run.mark_preempting())
        self._calls.put(lambda run: run.finish(exit_code=0 if error is None else 1))
        self._calls.put(None)
        self._thread.join(FINISH_TIMEOUT_S + KILL_S)
        if self._thread.is_alive():
            self._warn("does not answer")
            _kill_service()
            self._thread.join(KILL_S)

    def _call(self, call: Call) -> None:
        if self._thread.is_alive() and self._calls.qsize() < MOST_WAITING:
            self._calls.put(call)

    def _work(self) -> None:
        with self._tolerant():
            quiet()
            run_id, self._sent_step = identity(Path(self._config.run.dir), self._sent_step)
            run = self._start(run_id)
            print(f"wandb: {run.settings.sync_dir if run.offline else run.url}", flush=True)  # noqa: T201
            while (call := self._next_call()) is not None:
                with self._tolerant():
                    call(run)
        with contextlib.suppress(Exception):
            import wandb

            wandb.teardown()  # so that nothing is left for the end of the process to wait for

    def _start(self, run_id: str) -> Any:
        import wandb

        mode = os.environ.get("WANDB_MODE", "online" if has_wandb_key() else "offline")
        with self._tolerant():
            return init(self._config, run_id, mode)
        wandb.teardown()
        return init(self._config, run_id, "offline")

    def _next_call(self) -> Call | None:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._calls.get(timeout=LOOK_S)
            was_stalled, self._is_stalled = self._is_stalled, watchdog.share_of_timeout() > STALLED
            if self._is_stalled and not was_stalled:
                return lambda run: run.alert("stalled", f"{self._config.run.name} gets no further", level="WARN")

    def _send(self, step: int, metrics: dict[str, Any], run: Any) -> None:
        if step <= self._sent_step:
            return
        interval = self._config.logger.heat_map_interval
        is_due = step // interval > self._sent_step // interval
        self._sent_step = step
        run.log({name: value for name, value in metrics.items() if isinstance(value, int | float)}, step=step)
        if is_due:
            run.log(self._heat_maps(metrics), step=step)

    def _heat_maps(self, metrics: dict[str, Any]) -> dict[str, Any]:
        import wandb

        first_layer = self._config.model.num_dense_layers
        return {
            name: wandb.Plotly(heat_map(metrics[name], first_layer, unit))
            for name, unit in HEAT_MAPS.items()
            if name in metrics
        }

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn(" ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON])

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            folder = Path(self._config.run.dir) / "wandb"
            sys.stderr.write(
                f"warning: wandb: {what}; training and metrics.jsonl go on. What is in {folder} can be sent later with "
                "`wandb sync`\n"
            )
        self._has_warned = True


def quiet() -> None:
    """Have wandb write nothing to the terminal, before it is imported."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # tried again and again where there is no network
    logging.raiseExceptions = False  # of wandb's own log file, on a full disk


def identity(folder: Path, logged_step: int) -> tuple[str, int]:
    """The run's id, made on the first start, and the last step that was ever sent, both kept in the run's folder.

    Args:
        folder: of the run.
        logged_step: the last step that is logged there.
    """
    path = folder / "wandb.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"id": secrets.token_hex(4)}
    known["sent_step"] = max(known.get("sent_step", 0), logged_step)
    write_json(path, known)
    return known["id"], known["sent_step"]


def init(config: Config, run_id: str, mode: str) -> Any:
    """`wandb.init` for one run in all its restarts, with limits to what it waits for."""
    import wandb

    options = config.logger
    run = wandb.init(
        id=run_id,
        resume="allow",
        mode=mode,
        entity=options.wandb_entity,
        project=options.wandb_project,
        group=options.wandb_group,
        tags=[*options.wandb_tags, *_mark(config)],
        name=config.run.name,
        notes=config.run.notes,
        dir=config.run.dir,
        config=OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True),
        settings=wandb.Settings(
            console="off",  # its copy of what is printed fails, and prints, on a full disk
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
        ),
    )
    run.define_metric("consumed_tokens", hidden=True)
    for names in BY_TOKENS:
        run.define_metric(names, step_metric="consumed_tokens")
    return run


def _mark(config: Config) -> list[str]:
    """A tag that tells a measurement from a training."""
    forced = config.model.forced_routing
    return [] if forced is None else [f"forced-routing-{forced.value}"]


def has_wandb_key() -> bool:
    """Whether a key for wandb's server is in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    server = urlsplit(wandb.setup().settings.base_url).netloc
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host == server or "wandb" in host for host in hosts)


def heat_map(load: list[list[float]], first_layer: int, unit: str) -> Any:
    """A plotly figure of load over the mean: experts or devices from left to right, layers from top to bottom.

    Args:
        load: by layer.
        first_layer: number of the first of them.
        unit: "expert" or "device".
    """
    import plotly.graph_objects as go

    layers = list(range(first_layer, first_layer + len(load)))
    end = end_of_range(load)
    colors = [(0, LOW), (1 / end, NEUTRAL), (1, HIGH)]
    cells = go.Heatmap(z=load, y=layers, zmin=0, zmax=end, colorscale=colors, colorbar_title="load / mean")
    axes = {"xaxis_title": unit, "yaxis": {"title": "layer", "autorange": "reversed"}}
    return go.Figure(cells, {**axes, "template": "none"})


def _kill_service() -> None:
    """End wandb's own process, which nothing else makes give up."""
    for child in psutil.Process().children():
        if child.name() == "wandb-core":
            child.kill()
