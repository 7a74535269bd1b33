"""When a run saves, and what becomes of a save that fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from megatron_moe.checkpoint.checkpointer import Checkpointer, SaveError
from megatron_moe.checkpoint.run_folder import step_of
from megatron_moe.checkpoint.state import TrainState
from megatron_moe.config.errors import TrainingError
from megatron_moe.distributed import watchdog


class Saving:
    """The saves of one run. Every method is for all ranks.

    A save that fails is told, and the run goes on: the next one comes as usual. Only the last one must succeed.

    Args:
        checkpointer: that writes them.
        in_background: `checkpoint.async_save`.
        say: prints on the main rank.
        saved_step: of the checkpoint that the run goes on from.
    """

    def __init__(
        self, checkpointer: Checkpointer, *, in_background: bool, say: Callable[[str], None], saved_step: int
    ) -> None:
        self._checkpointer = checkpointer
        self._in_background = in_background
        self._say = say
        self._saved_step = saved_step
        self._begun_at = 0.0
        self._waited_s = 0.0
        self._times: dict[str, float] = {}

    def save(self, state: TrainState) -> None:
        """Save, or begin to in the background; the one before is finished first."""
        self.finish()
        self._tolerant(lambda: self._begin(state, background=self._in_background))
        if not self._in_background:
            self.finish()

    def finish(self) -> None:
        """Finish the save under way, if there is one."""
        self._tolerant(self._finish)

    def go_on(self) -> None:
        """Do what comes next of the save under way, for which all ranks are ready."""
        self._tolerant(lambda: self._wait(self._checkpointer.go_on))

    def save_last(self, state: TrainState) -> None:
        """Save before the run ends, unless this step is saved already.

        Raises:
            TrainingError: it cannot be saved.
        """
        self.finish()
        try:
            if self._saved_step != state.step:
                self._begin(state, background=False)
                self._finish()
        except SaveError as error:
            raise TrainingError(
                f"step {state.step:,} could not be saved: {error}; the checkpoints before are as they were, and the "
                "same command goes on from the last of them"
            ) from error

    def wait_until_copied(self) -> None:
        """Before an update: return once the save under way reads no weights any more."""
        start = time.perf_counter()
        self._checkpointer.wait_until_copied()
        self._waited_s += time.perf_counter() - start

    def take_times(self) -> dict[str, float]:
        """Of the last save that was committed since the last call: its seconds, and those that training waited."""
        times, self._times = self._times, {}
        return times

    def _begin(self, state: TrainState, *, background: bool) -> None:
        self._begun_at = time.perf_counter()
        watchdog.alive()
        self._checkpointer.begin(state, background=background)
        self._waited_s = time.perf_counter() - self._begun_at

    def _finish(self) -> None:
        if self._checkpointer.is_saving:
            self._wait(self._checkpointer.finish)

    def _wait(self, action: Callable[[], Path | None]) -> None:
        start = time.perf_counter()
        watchdog.alive()
        folder = action()
        end = time.perf_counter()
        self._waited_s += end - start
        if folder is not None:
            self._saved_step = step_of(folder)
            self._times = {"checkpoint/save_s": end - self._begun_at, "checkpoint/blocked_s": self._waited_s}
            self._say(f"step {self._saved_step} | saved {folder}, training waited {self._waited_s:.1f} s")

    def _tolerant(self, action: Callable[[], None]) -> None:
        try:
            action()
        except SaveError as error:
            self._say(f"not saved: {error}; the training goes on, and the checkpoints before are as they were")
