"""The learning rate as a pure function of the step: nothing to save, nothing to step twice."""

from __future__ import annotations

import math

from megatron_moe.config.derived import samples_before
from megatron_moe.config.schema import Config, DecayUnit


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of the update that follows `step` finished steps.

    Linear from 0 over the warm-up, then `optimizer.lr` times `decay_factor` for each milestone reached.

    Source: DeepSeekMoE, arXiv:2401.06066, 4.1.3; constant after the warm-up: 7.1.
    """
    schedule, peak = config.scheduler, config.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    done, total = _progress(config, step)
    reached = sum(done >= math.floor(milestone * total + 1e-6) for milestone in schedule.milestones)
    return peak * schedule.decay_factor**reached


def _progress(config: Config, step: int) -> tuple[int, int]:
    """Done and all, in steps, or in sequences where the unit is tokens: they differ while the batch grows."""
    steps = config.train.train_steps
    if config.scheduler.unit is DecayUnit.steps:
        return step, steps
    return samples_before(config, step), samples_before(config, steps)
