"""What a run's folder holds besides tensors, and folders that appear whole; needs neither torch nor megatron-core."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from megatron_moe.config.cluster import ClusterConfig
from megatron_moe.config.errors import ConfigError, unreadable
from megatron_moe.config.load import from_plain
from megatron_moe.config.schema import Config, ModelConfig, RecomputeConfig

PARTIAL = ".partial"  # being written
REMOVED = ".removed"  # being removed
DAMAGED = ".damaged"  # passed over


def saved_steps(folder: Path) -> list[Path]:
    """Whole checkpoints in the folder `checkpoints` of a run, oldest first.

    Raises:
        ConfigError: it may not be read.
        OSError: it cannot be read for now.
    """
    try:
        return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8}", path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from None


def retire(checkpoint: Path) -> Path:
    """Make a checkpoint none, at once; returns what is left to be removed."""
    removed = checkpoint.with_suffix(REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    return checkpoint.rename(removed)


def remove_partial(folder: Path) -> None:
    """Clean up after saves and removals that were interrupted."""
    for unfinished in (*folder.glob(f"step_*{PARTIAL}"), *folder.glob(f"step_*{REMOVED}")):
        shutil.rmtree(unfinished, ignore_errors=True)


def superfluous(folder: Path, keep_last: int, keep_every: int | None) -> list[Path]:
    """All checkpoints but the `keep_last` newest and those of every `keep_every` steps."""
    older = saved_steps(folder)[:-keep_last]
    return [checkpoint for checkpoint in older if keep_every is None or step_of(checkpoint) % keep_every]


def step_of(checkpoint: Path) -> int:
    """The number in its name."""
    return int(checkpoint.name.removeprefix("step_"))


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """The newest checkpoint of a run or of an imported model, or that of a step.

    Raises:
        ConfigError: there is none.
    """
    saved = saved_steps(run / "checkpoints")
    if not saved:
        raise ConfigError(f"{run}: no checkpoints/step_NNNNNNNN in it; give the folder of a run")
    if step is None:
        return saved[-1]
    found = [path for path in saved if step_of(path) == step]
    if not found:
        steps = ", ".join(str(step_of(path)) for path in saved)
        raise ConfigError(f"--step {step}: {run} has no checkpoint of it; there are: {steps}")
    return found[0]


def run_config(run: Path) -> Config:
    """The configuration that a run left.

    Raises:
        ConfigError: there is none, or it is of another version.
    """
    file = run / "config.yaml"
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(file, error, f"; is {run} the folder of a run?") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no YAML: {error}") from None
    if not isinstance(saved, dict):
        raise ConfigError(f"{file}: holds no options")
    try:
        return from_plain(saved)
    except ConfigError as error:
        raise ConfigError(*(f"{file}: {problem}" for problem in error.problems)) from None


def saved_config(checkpoint: Path) -> Config:
    """The configuration that a checkpoint was saved with; options added since have their defaults.

    Raises:
        ConfigError: there is none, or it is of another version.
    """
    file = checkpoint / "state.json"
    saved = read_json(file).get("config", {})
    try:
        return from_plain(saved)
    except ConfigError as error:
        raise ConfigError(*(f"{file}: {problem}" for problem in error.problems)) from None


def plain(config: Config | ModelConfig | ClusterConfig | RecomputeConfig) -> dict[str, Any]:
    """A configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=_enum_value))


def _enum_value(value: Enum) -> Any:
    return value.value


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object.

    Raises:
        ConfigError: there is none.
        OSError: it cannot be read for now.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error, f"; is {path.parent} the right folder on this machine?") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds no JSON object")
    return found


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` that gets its name when everything is written, and goes when something fails.

    Raises:
        ConfigError: `final` holds something.
    """
    final = final.resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError(f"{final}: exists and is not empty; give another --output, or remove it")
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if final.exists():
            final.rmdir()
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
