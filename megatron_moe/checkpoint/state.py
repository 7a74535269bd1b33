"""What must survive a restart, besides parameters and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import ConfigError


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: finished steps.
        consumed_samples: sequences trained on; the position in the data.
        skipped_steps: those of `step` that updated nothing.
        skipped_in_a_row: up to now.
        recent_losses: of the last steps that updated something, oldest first; what a spike is measured by.
    """

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, saved: dict[str, Any], file: Path) -> TrainState:
        """The progress that a checkpoint's description holds.

        Args:
            saved: what `state.json` holds.
            file: its path, for the error.

        Raises:
            ConfigError: with a line for each entry that is missing or not of its kind.
        """
        names = [each.name for each in fields(cls)]
        problems = [f"{file}: lacks {name!r}, it was saved by another version" for name in names if name not in saved]
        problems += [
            f"{file}: {name}={saved[name]!r}: must be {_kind(name)}"
            for name in names
            if name in saved and not _is_valid(name, saved[name])
        ]
        if problems:
            raise ConfigError(*problems)
        return cls(**{name: saved[name] for name in names})

    def advance(self, samples: int) -> None:
        """Count one finished step."""
        self.step += 1
        self.consumed_samples += samples


def _is_valid(name: str, value: Any) -> bool:
    if name == "recent_losses":
        return isinstance(value, list) and all(type(loss) is float for loss in value)
    return type(value) is int and value >= 0


def _kind(name: str) -> str:
    return "a list of numbers" if name == "recent_losses" else "a whole number from 0"
