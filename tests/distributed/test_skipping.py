"""A number that is not finite, anywhere: all ranks skip that very step, and nothing of it stays."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_moe.config.errors import TrainingError
from tests.helpers.ranks import run_ranks
from tests.helpers.training import MLA, tiny_config, tiny_run
from tests.helpers.wandb import of_type, records, segments

LAYOUTS = {"single": 1, "ep2": 2, "pp2_ep2": 4, "tp2": 2}
MORE_LAYOUTS = {"dp2": 2, "pp2_vpp2": 2, "tp2_ep2": 2, "cp2": 2}
VALUES = ("nan", "inf")
SHORT = ["run.dir=without_checkpoints", "train.global_batch_size=4"]


def fingerprint(run: Any) -> dict[str, str]:
    """SHA-256 of this rank's parameters, main parameters, moments and counts of updates."""
    kinds: dict[str, list[torch.Tensor]] = {"model": [p for chunk in run.pipeline.model for p in chunk.parameters()]}
    for part in run.optimizer.chained_optimizers:
        for param, state in part.optimizer.state.items():
            for kind, tensor in {"main": param, **state}.items():
                kinds.setdefault(kind, []).append(tensor)
    assert {"model", "main", "exp_avg", "exp_avg_sq", "step"} <= kinds.keys()
    return {
        kind: hashlib.sha256(
            b"".join(t.detach().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
        ).hexdigest()
        for kind, tensors in kinds.items()
    }


@contextmanager
def bad_loss(run: Any, value: float) -> Iterator[None]:
    """Only as it is reported: the gradient is clean."""
    from megatron_moe.train import step

    def broken(mask: torch.Tensor, losses: torch.Tensor, whole: Callable = step._sum_loss) -> tuple:
        total, size, reported = whole(mask, losses)
        return total, size, reported + torch.tensor([value, 0.0])

    with mock.patch.object(step, "_sum_loss", broken):
        yield


@contextmanager
def bad_gradient(run: Any, value: float, *, reduced: bool = False) -> Iterator[None]:
    """Of one weight, before or after it is summed over the ranks."""
    from megatron_moe.train import step

    def broken(model: list, *args: Any, whole: Callable = step.finalize_model_grads, **kwargs: Any) -> None:
        gradient = next(p for name, p in model[-1].named_parameters() if "layernorm" in name).main_grad
        if not reduced:
            gradient[0] = value
        whole(model, *args, **kwargs)
        if reduced:
            gradient[0] = value

    with mock.patch.object(step, "finalize_model_grads", broken):
        yield


@contextmanager
def bad_expert(run: Any, value: float) -> Iterator[None]:
    """One weight of whichever expert of this rank's last layer most tokens reach, so that some do."""
    from megatron_moe.model.experts import GroupedExperts

    *_, experts = (module for module in run.pipeline.model[-1].modules() if isinstance(module, GroupedExperts))
    broken: dict[int, torch.Tensor] = {}

    def break_one(_: Any, arguments: tuple) -> None:
        routing = arguments[1]
        counts = routing if routing.dim() == 1 else routing.sum(0)
        index = int(counts.argmax())
        weight = experts.weight1.data[index, 0, :1]
        if counts[index] > 0 and index not in broken:
            broken[index] = weight.clone()
            weight.fill_(value)

    hook = experts.register_forward_pre_hook(break_one)
    yield
    hook.remove()
    assert broken
    for index, before in broken.items():
        experts.weight1.data[index, 0, :1] = before


@contextmanager
def bad_logits(run: Any, value: float) -> Iterator[None]:
    """Of one token in the last router."""
    router = run.pipeline.routers[-1]

    def broken(x: torch.Tensor, whole: Callable = router.gating) -> torch.Tensor:
        logits = whole(x).clone()
        logits.view(-1, logits.shape[-1])[0, 0] = value
        return logits

    with mock.patch.object(router, "gating", broken):
        yield


FAULTS = {"loss": bad_loss, "gradient": bad_gradient, "expert": bad_expert, "logits": bad_logits}
OF_A_COPY = {"copy": functools.partial(bad_gradient, reduced=True)}


def go_through(overrides: list[str], names: list[str], victim: int | None) -> list[dict[str, Any]]:
    """On each rank, a clean step, then for each fault in turn a step with it and a clean one.

    Args:
        overrides: of the tiny model.
        names: of faults; in order.
        victim: the rank that is hit; that of a loss is always the last. None: faulty steps are left out.

    Returns:
        For each step what it came to and the state before and after it.
    """
    from megatron_moe.train.step import train_step

    with tiny_run([*SHORT, *overrides]) as (run, batches, num_micro_batches):
        last = run.context.world_size - 1

        def one_step(fault: AbstractContextManager) -> dict[str, Any]:
            before = fingerprint(run)
            with fault:
                result = train_step(run.pipeline, run.optimizer, batches, num_micro_batches, run.guard)
            run.state.advance(1)
            counts = (run.state.skipped_steps, run.state.skipped_in_a_row, len(run.state.recent_losses))
            return {"skipped": result.skipped, "counts": counts, "before": before, "after": fingerprint(run)}

        steps = [one_step(nullcontext())]
        for name in names:
            for value in VALUES:
                if victim is None:
                    for iterator in batches:
                        for _ in range(num_micro_batches):
                            next(iterator)
                else:
                    hit = run.context.rank == (last if name == "loss" else victim)
                    steps.append(one_step((FAULTS | OF_A_COPY)[name](run, float(value)) if hit else nullcontext()))
                steps.append(one_step(nullcontext()))
        return steps


def check(overrides: list[str], world_size: int, names: list[str], victims: list[int]) -> None:
    clean = run_ranks(go_through, world_size, overrides, names, None)
    assert clean[0][0]["before"]["model"] != clean[0][0]["after"]["model"]  # an update shows
    for victim in victims:
        ranks = run_ranks(go_through, world_size, overrides, names, victim)
        for rank, steps in enumerate(ranks):
            faulty, applied = steps[1::2], steps[::2]
            for i, step in enumerate(faulty):
                name, value = names[i // len(VALUES)], VALUES[i % len(VALUES)]
                where = f"{name} {value} on rank {victim}, seen on rank {rank}"
                assert step["skipped"] is not None, where
                assert step["skipped"] == ranks[0][1 + 2 * i]["skipped"], where
                assert step["skipped"] in reasons(name, value), where
                assert step["counts"] == (i + 1, 1, i + 1), where
                assert step["before"] == step["after"], where
            for step, expected in zip(applied, clean[rank], strict=True):
                assert step["skipped"] is None
                assert step["counts"][1:] == expected["counts"][1:]
                assert step["after"] == expected["after"], f"rank {rank}: something of a skipped step stayed"


def reasons(name: str, value: str) -> set[str]:
    if name == "loss":
        return {f"loss is {value}"}
    if name == "gradient":
        return {f"gradient norm is {value}"}
    if name == "copy":
        return {"gradient is not finite on some rank"}
    return {"loss is nan", "loss is inf"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_is_found_by_all_and_leaves_nothing(layout: str, dtype: str) -> None:
    world_size = LAYOUTS[layout]
    check([f"parallel={layout}", f"precision={dtype}"], world_size, list(FAULTS), [world_size - 1])


@pytest.mark.soak("steps that are not finite, and spikes")
@pytest.mark.parametrize("attention", ["mha", "mla"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE_LAYOUTS])
def test_whichever_rank_it_hits(layout: str, dtype: str, attention: str) -> None:
    world_size = {**LAYOUTS, **MORE_LAYOUTS}[layout]
    overrides = [f"parallel={layout}", f"precision={dtype}", *(MLA if attention == "mla" else [])]
    check(overrides, world_size, list(FAULTS), list(range(world_size)))


def test_a_gradient_that_the_norm_leaves_out_is_looked_at() -> None:
    """Of a copy on the second tensor-parallel rank, which megatron-core's norm does not count twice."""
    check(["parallel=tp2"], 2, list(OF_A_COPY), [1])


def until_the_end(overrides: list[str]) -> tuple[str, int, bool]:
    """On each rank: what ended a training with a broken expert on the last one, after how many steps, and unchanged."""
    from megatron_moe.train.step import train_step

    with tiny_run([*SHORT, "train.max_skipped_steps=3", *overrides]) as (run, batches, count):

        def train(steps: int) -> None:
            for _ in range(steps):
                train_step(run.pipeline, run.optimizer, batches, count, run.guard)
                run.state.advance(4)

        train(1)
        before = fingerprint(run)
        is_last = run.context.rank == run.context.world_size - 1
        with bad_expert(run, float("nan")) if is_last else nullcontext(), pytest.raises(TrainingError) as error:
            train(10)
        return str(error.value), run.state.step, before == fingerprint(run)


@pytest.mark.parametrize("layout", ["single", "pp2_ep2"])
def test_too_many_in_a_row_end_it_on_every_rank(layout: str) -> None:
    texts, steps, unchanged = zip(*run_ranks(until_the_end, LAYOUTS[layout], [f"parallel={layout}"]), strict=True)
    assert set(steps) == {3}
    assert all(unchanged)
    assert len(set(texts)) == 1
    assert "3 in a row, since step 2 (train.max_skipped_steps=3); in step 4 the loss is nan" in texts[0]


def whole_run(folder: str, broken_steps: list[int]) -> str:
    """What a training says that meets broken losses."""
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train import loop

    def fail(run: Any, batches: list, lr: float, whole: Callable = loop._step) -> Any:
        with bad_loss(run, float("nan")) if run.state.step + 1 in broken_steps else nullcontext():
            return whole(run, batches, lr)

    logger = ["logger=wandb", "logger.log_interval=1"]
    config = tiny_config(*SHORT, *logger, f"run.dir={folder}", "train.train_steps=4")
    said = io.StringIO()
    with distributed(config.parallel) as context, mock.patch.object(loop, "_step", fail), redirect_stdout(said):
        loop.train(config, context, [])
    return said.getvalue()


def test_the_loop_says_and_logs_what_it_skips(tmp_path: Path) -> None:
    (said,) = run_ranks(whole_run, 1, str(tmp_path), [2, 3])
    assert [line for line in said.splitlines() if "skipped" in line] == [
        "step 2 | skipped: loss is nan (1 in a row)",
        "step 3 | skipped: loss is nan (2 in a row)",
    ]
    assert "step 2/4 | lm_loss nan" in said
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["train/lm_loss"] is None for line in lines] == [False, True, True, False]
    assert [line["train/skipped_steps"] for line in lines] == [0, 1, 2, 2]
    alerts = of_type(records(*segments(tmp_path)), "alert")
    assert [(alert["title"], alert["text"]) for alert in alerts] == [
        ("step skipped", "step 2 updated nothing: loss is nan"),
        ("step skipped", "step 3 updated nothing: loss is nan"),
    ]


def clean_run(steps: int) -> tuple[int, int]:
    """On each rank: steps skipped in a clean training with spikes looked for, and the losses in the window."""
    from megatron_moe.optim.optimizer import set_learning_rate
    from megatron_moe.optim.scheduler import learning_rate
    from megatron_moe.train.step import train_step

    small = ["run.dir=without_checkpoints", "model.num_layers=2", "data.sequence_length=16"]
    guarded = ["train.spike_sigma=6", f"train.train_steps={steps}", "train.micro_batch_size=8"]
    with tiny_run([*small, *guarded]) as (run, batches, num_micro_batches):
        for step in range(steps):
            set_learning_rate(run.optimizer, learning_rate(run.config, step))
            train_step(run.pipeline, run.optimizer, batches, num_micro_batches, run.guard)
            run.state.advance(8)
        return run.state.skipped_steps, len(run.state.recent_losses)


@pytest.mark.soak("steps that are not finite, and spikes")
def test_a_thousand_clean_steps_skip_nothing() -> None:
    assert run_ranks(clean_run, 1, 1000) == [(0, 128)]
