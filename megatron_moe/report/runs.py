"""What a run's folder tells of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_moe.checkpoint.run_folder import read_json, run_config, saved_steps, step_of
from megatron_moe.config.derived import required_world_size
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Config
from megatron_moe.report.metrics_file import Metrics, read_metrics
from megatron_moe.report.trace import StepCost, read_cost

T = TypeVar("T")
BROKEN = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Bar:
    """What a rank does for a while: its kind, its label, begin and end in seconds."""

    kind: str
    label: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StepTimeline:
    """What ranks do in one step, by rank."""

    step: int
    ranks: dict[int, list[Bar]]


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: on the page.
        config: that it was last started with.
        environment: that it was last started in; empty where nothing is known.
        world_size: ranks; of a run that has not recorded it, as many as its layout needs at least.
        metrics: that it has logged.
        checkpoints: steps of those that are there.
        timeline: of one step, where there is one.
        costs: where the time of profiled steps went.
        notes: what is wrong with the folder.
    """

    name: str
    config: Config
    environment: dict[str, Any]
    world_size: int
    metrics: Metrics
    checkpoints: list[int]
    timeline: StepTimeline | None
    costs: list[StepCost]
    notes: list[str]


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """Runs, called by the name of their folder or, where two have the same, by their path.

    Raises:
        ConfigError: a folder is no run; every such one is named.
    """
    problems: list[str] = []
    configs = []
    for folder in folders:
        try:
            configs.append(run_config(folder))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_read_run(*each) for each in zip(folders, names, configs, strict=True)]


def _read_run(folder: Path, name: str, config: Config) -> RunRecord:
    metrics = read_metrics(folder / "metrics.jsonl")
    notes = _notes_on(metrics)
    if config.model.forced_routing is not None:
        notes.append(f"routing was FORCED ({config.model.forced_routing.value}): its losses mean nothing")
    environment = _readable(folder / "environment.json", read_json, notes) or {}
    world_size = environment.get("world_size") or required_world_size(config.parallel)
    if "world_size" not in environment:
        notes.append(f"the number of ranks is not recorded; the placement is that on {world_size}, the fewest")
    costs = [_readable(path, read_cost, notes) for path in sorted(folder.glob("profile/step_*.json.gz"))]
    return RunRecord(
        name=name,
        config=config,
        environment=environment,
        world_size=world_size,
        metrics=metrics,
        checkpoints=[step_of(path) for path in saved_steps(folder / "checkpoints")],
        timeline=_readable(folder / "timeline.json", _read_timeline, notes),
        costs=[cost for cost in costs if cost is not None],
        notes=notes,
    )


def _notes_on(metrics: Metrics) -> list[str]:
    unreadable = some(metrics.unreadable, "line")
    return [
        *([f"metrics.jsonl: no logged step, and left out: {unreadable}"] if unreadable else []),
        *([] if metrics.last_step else ["metrics.jsonl: nothing has been logged yet"]),
    ]


def some(numbers: list[int], what: str) -> str:
    """'12 steps: 3, 7, 9, 11, 12, ...'; nothing of none."""
    if not numbers:
        return ""
    count = f"{len(numbers)} {what}s: " if len(numbers) > 1 else f"{what} "
    return count + ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def _readable(path: Path, read: Callable[[Path], T], notes: list[str]) -> T | None:
    """What a file holds; None, with a note, if that cannot be read."""
    if not path.exists():
        return None
    try:
        return read(path)
    except BROKEN as error:  # what a crash, a full disk or an editor leaves
        notes.append(f"{path.name} was left out: {error}")
        return None


def _read_timeline(path: Path) -> StepTimeline:
    found = read_json(path)
    ranks = {
        int(rank["rank"]): [_bar(each["name"], float(each["start_s"]), float(each["end_s"])) for each in rank["ranges"]]
        for rank in found["ranks"]
    }
    return StepTimeline(int(found["step"]), ranks)


def _bar(name: str, start_s: float, end_s: float) -> Bar:
    kind, _, label = name.partition(" ")
    return Bar(kind, label, start_s, end_s)
