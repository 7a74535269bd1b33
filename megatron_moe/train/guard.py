"""Which steps update nothing, and when there are too many of them. Pure."""

from __future__ import annotations

import math

from megatron_moe.checkpoint.state import TrainState
from megatron_moe.config.errors import TrainingError
from megatron_moe.config.schema import TrainConfig

RESOLUTION = 1e-6  # nats: what fp32 sums in another order differ by is no spike


class Guard:
    """Decides before each update whether it may be done; the same on all ranks, as its input is.

    A loss or gradient that is not finite may update nothing, nor, with `spike_sigma`, a loss that many standard
    deviations above the mean of the last `spike_window` that did. While these are fewer, no loss is a spike. They are
    kept without `spike_sigma` too, so that it can be set when a run goes on.

    The gradient norm tells no spike, its tail is heavy: in 1,000 clean steps of a tiny model 9 norms lie beyond 6 sigma
    (one beyond 200) and of the nano model 1, but no loss lies beyond 3.1.

    Args:
        options: the rules.
        state: of the run; counts skipped steps and holds the losses.
    """

    def __init__(self, options: TrainConfig, state: TrainState) -> None:
        self.options = options
        self.state = state

    def judge(self, loss: float, grad_norm: float, *, finite: bool) -> str | None:
        """Why the step that follows `state.step` finished ones must be skipped; None: its update may be done.

        Args:
            loss: mean over all targets.
            grad_norm: before clipping.
            finite: whether loss and gradient are, on all ranks.

        Raises:
            TrainingError: `max_skipped_steps` in a row, this one included.
        """
        reason = self._spike(loss) if finite else _not_finite(loss, grad_norm)
        if reason is None:
            self.state.skipped_in_a_row = 0
            self.state.recent_losses.append(loss)
            del self.state.recent_losses[: -self.options.spike_window]
            return None
        self.state.skipped_steps += 1
        self.state.skipped_in_a_row += 1
        if self.state.skipped_in_a_row >= self.options.max_skipped_steps:
            raise TrainingError(self._too_many(reason))
        return reason

    def _spike(self, loss: float) -> str | None:
        losses = self.state.recent_losses[-self.options.spike_window :]
        if self.options.spike_sigma is None or len(losses) < self.options.spike_window:
            return None
        mean = math.fsum(losses) / len(losses)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / len(losses))
        above = (loss - mean) / max(deviation, RESOLUTION)
        if above <= self.options.spike_sigma:
            return None
        return (
            f"loss {loss:.4f} lies {above:.1f} standard deviations of {deviation:.4f} above {mean:.4f}, the mean of "
            f"the last {len(losses)} steps (train.spike_sigma={self.options.spike_sigma:g})"
        )

    def _too_many(self, reason: str) -> str:
        last, count = self.state.step + 1, self.state.skipped_in_a_row
        return (
            f"too many steps were skipped: {count} in a row, since step {last - count + 1:,} "
            f"(train.max_skipped_steps={self.options.max_skipped_steps}); in step {last:,} the {reason}. The last "
            "checkpoint stands, and the same command goes on from it: that is enough after a fault of the hardware. If "
            "it ends at the same step, lower optimizer.lr or optimizer.clip_grad, or look at the data of these steps"
        )


def _not_finite(loss: float, grad_norm: float) -> str:
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"gradient norm is {grad_norm}"
    return "gradient is not finite on some rank"
