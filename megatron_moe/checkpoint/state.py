"""What must survive a restart, besides parameters and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field


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

    def advance(self, samples: int) -> None:
        """Count one finished step."""
        self.step += 1
        self.consumed_samples += samples
