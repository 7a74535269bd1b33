"""Where a run's numbers go: the terminal, metrics.jsonl and, if asked for, Weights & Biases. Rank 0 only."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_moe.config.schema import Config
from megatron_moe.metrics.json_lines import JsonLines, drop_after
from megatron_moe.metrics.terminal import TerminalBar, is_terminal
from megatron_moe.metrics.throughput import format_duration
from megatron_moe.metrics.wandb_run import WandbRun

Metrics = dict[str, Any]
FORCED_ROUTING = "moe/forced_routing"  # a metric of measurements only


class MetricLogger:
    """Writes one JSON object per logged step; a resumed run continues the file without repeating a step."""

    def __init__(self, config: Config, *, first_step: int) -> None:
        path = Path(config.run.dir) / "metrics.jsonl"
        logged_step = drop_after(path, first_step)
        self._lines = JsonLines(path)
        self._wandb = WandbRun(config, logged_step=logged_step) if config.logger.wandb else None
        self._bar = TerminalBar(config.train.train_steps) if is_terminal() else None

    def __enter__(self) -> MetricLogger:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._lines.close()
        if self._wandb is not None:
            self._wandb.finish(error)

    def count_step(self, step: int, loss: float, skipped: str | None) -> None:
        """Show that a step is done, and have the user told if it was `skipped`, for what reason."""
        if self._bar is not None:
            self._bar.show(step, loss)
        if skipped is not None and self._wandb is not None:
            self._wandb.alert("step skipped", f"step {step:,} updated nothing: {skipped}")

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one step's metrics, null for what is not finite."""
        metrics = _finite(metrics)
        self._lines.write({"step": step, **metrics})
        if self._wandb is not None:
            self._wandb.log(step, metrics)
        if self._bar is not None:
            self._bar.take(metrics)


def progress_line(step: int, total_steps: int, metrics: Metrics) -> str:
    """The line a person watches."""
    left = (total_steps - step) * metrics["speed/step_time_s"]
    return (
        f"step {step:>{len(str(total_steps))}}/{total_steps}"
        f"{_mark(metrics)}"
        f" | lm_loss {metrics['train/lm_loss']:.4f}"
        f"{_routing_text(metrics)}"
        f" | lr {metrics['train/lr']:.2e}"
        f" | grad norm {metrics['train/grad_norm']:.3f}"
        f" | {metrics['speed/tokens_per_second']:,.0f} tokens/s"
        f" | {format_duration(left)} left"
    )


def evaluation_line(step: int, metrics: Metrics) -> str:
    """The mean and, of several sources or where the bytes of the text are known, each source's losses."""
    means = [name for name in metrics if name.count("/") == 1]
    by_source = [name for name in metrics if name.count("/") == 2]
    if len([name for name in by_source if name.endswith("lm_loss")]) == 1:
        by_source = [name for name in by_source if not name.endswith("lm_loss")]  # it is the mean
    losses = (f" | {name} {metrics[name]:.4f}" for name in means + by_source if name != FORCED_ROUTING)
    return "".join([f"step {step}", _mark(metrics), *losses])


def _mark(metrics: Metrics) -> str:
    """Of a measurement."""
    return f" | FORCED ROUTING, {metrics[FORCED_ROUTING]}" if FORCED_ROUTING in metrics else ""


def _routing_text(metrics: Metrics) -> str:
    """Of a model with experts."""
    if "moe/max_violation" not in metrics:
        return ""
    text = (
        f" | balance expert {metrics['train/expert_balance_loss']:.4f}"
        f" device {metrics['train/device_balance_loss']:.4f}"
        f" | max violation {metrics['moe/max_violation']:.2f}"
    )
    dropped = metrics["moe/dropped_fraction"]
    return f"{text} | dropped {dropped:.1%}" if dropped else text


def _finite(value: Any) -> Any:
    """Metrics with None in place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
