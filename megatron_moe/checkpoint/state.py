"""What must survive a restart, besides parameters and optimizer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: finished steps.
        consumed_samples: sequences trained on; the position in the data.
    """

    step: int = 0
    consumed_samples: int = 0

    def advance(self, samples: int) -> None:
        """Count one finished step."""
        self.step += 1
        self.consumed_samples += samples
