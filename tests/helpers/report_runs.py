"""Folders as runs leave them, for reports, without the training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.config.load import compose_config


def write_run(folder: Path, *overrides: str, lines: list[dict[str, Any]], world_size: int = 1) -> Path:
    """Configuration, environment and metrics."""
    folder.mkdir(parents=True)
    config = plain(compose_config([*overrides, f"run.dir={folder}"]))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"overrides": list(overrides), "world_size": world_size}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def logged_steps(
    steps: int, layers: int, experts: int, *, loads_every: int = 1, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Metrics of made-up steps, with everything that a run can log."""
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        loss = 4 + 5 * math.exp(-step / 300) + draw.gauss(0, 0.05)
        line = {
            "step": step,
            "consumed_tokens": 4096 * step,
            "train/lm_loss": loss,
            "train/lr": 4e-4 * min(1.0, step / 100),
            "train/grad_norm": draw.lognormvariate(0, 0.3),
            "train/expert_balance_loss": draw.uniform(0.01, 0.02),
            "train/device_balance_loss": draw.uniform(0.05, 0.06),
            "train/skipped_steps": 0,
            "speed/tokens_per_second": draw.gauss(1e5, 1e3),
            "speed/tokens_per_second_per_gpu": draw.gauss(1e4, 1e2),
            "speed/tflops_per_gpu": draw.gauss(150, 3),
            "speed/mfu": draw.gauss(0.4, 0.01),
            "speed/step_time_s": draw.gauss(4, 0.1),
            "time/forward_backward_s": draw.gauss(3.4, 0.1),
            "time/all_to_all_s": draw.gauss(0.6, 0.05),
            "time/optimizer_s": draw.gauss(0.3, 0.01),
            "time/data_wait_s": draw.gauss(0.01, 0.001),
            "memory/peak_gib": draw.gauss(60, 0.5),
            "moe/all_to_all_gib": draw.gauss(2, 0.01),
            "moe/max_violation": draw.uniform(1, 3),
            "moe/max_device_violation": draw.uniform(0.1, 0.3),
            **{f"moe/layer_{1 + layer}/max_violation": draw.uniform(0.5, 3) for layer in range(layers)},
        }
        if step % loads_every == 0:
            line["moe/expert_load"] = [
                [round(draw.gammavariate(4, 0.25), 4) for _ in range(experts)] for _ in range(layers)
            ]
            line["moe/device_load"] = [[round(draw.gauss(1, 0.1), 4) for _ in range(4)] for _ in range(layers)]
        if step % 500 == 0 or step == steps:
            line |= {"valid/lm_loss": loss, "valid/web/lm_loss": loss - 0.1, "valid/code/lm_loss": loss + 0.1}
            line |= {"checkpoint/save_s": draw.uniform(10, 12), "checkpoint/blocked_s": draw.uniform(0.5, 1)}
        yield line
