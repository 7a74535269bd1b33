"""What one rank knows, all know; what is not finite hides nothing."""

import math
import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Dtype
from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_run

CLEAN = {"loss": (6.0, 3.0), "finite_gradient": True, "stop": False, "saved": True}
# what another rank says: loss, finite, stop and saved of all
CASES = [
    ({}, (4.0, True, False, True)),
    ({"finite_gradient": False}, (4.0, False, False, True)),
    ({"stop": True}, (4.0, True, True, True)),
    ({"saved": False}, (4.0, True, False, False)),
    ({"loss": (math.inf, 3.0), "stop": True}, (math.inf, False, True, True)),
    ({"loss": (math.nan, 3.0), "stop": True, "saved": False}, (math.nan, False, True, False)),
]


def agreed(cases: list[list[dict[str, Any]]]) -> list[Any]:
    """On each rank: what comes of each case, which says what each rank knows."""
    from megatron_moe.train.agreement import agree

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rendezvous = os.environ["MEGATRON_MOE_INIT_METHOD"]
    dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=rendezvous)
    agreements = []
    for case in cases:
        mine = dict(case[rank])
        agreements.append(agree(torch.tensor(mine.pop("loss")), **mine))
    dist.destroy_process_group()
    return agreements


def test_any_rank_tells_all() -> None:
    others = [{**CLEAN, "loss": (18.0, 3.0), **changes} for changes, _ in CASES]
    expected = [str(values) for _, values in CASES]  # as text: nan is not equal to nan
    ranks = run_ranks(agreed, 2, [[other, CLEAN] for other in others] + [[CLEAN, other] for other in others])
    for agreements in ranks:
        assert [str((a.loss, a.finite, a.stop, a.saved)) for a in agreements] == expected * 2


def test_the_loss_is_the_mean_over_targets() -> None:
    """And not over ranks, which hold different numbers of them."""
    by_rank = [{**CLEAN, "loss": loss} for loss in ((30.0, 3.0), (0.0, 0.0), (7.0, 7.0))]
    for (agreement,) in run_ranks(agreed, 3, [by_rank]):
        assert agreement.loss == torch.tensor(3.7).item()


def test_without_a_target_there_is_no_loss() -> None:
    ((agreement,),) = run_ranks(agreed, 1, [[{**CLEAN, "loss": (0.0, 0.0)}]])
    assert math.isnan(agreement.loss)
    assert not agreement.finite


def asked() -> tuple[bool, bool, str | None]:
    """On each rank, after a step in which only the second was asked to stop, and only the first had not saved."""
    from megatron_moe.train.step import train_step

    with tiny_run(["run.dir=without_checkpoints", "parallel=pp2"]) as (run, batches, num_micro_batches):
        is_second = run.context.rank == 1
        result = train_step(
            run.pipeline,
            run.optimizer,
            batches,
            num_micro_batches,
            run.guard,
            stop_requested=lambda: is_second,
            save_ready=lambda: is_second,
        )
        return result.agreement.stop, result.agreement.saved, result.skipped


def test_a_step_carries_what_ranks_ask() -> None:
    assert run_ranks(asked, 2) == [(True, False, None)] * 2


def told_of_types(dtypes: list[Dtype]) -> str | None:
    from megatron_moe.train.agreement import check_same_dtype

    rank, rendezvous = int(os.environ["RANK"]), os.environ["MEGATRON_MOE_INIT_METHOD"]
    dist.init_process_group("gloo", rank=rank, world_size=len(dtypes), init_method=rendezvous)
    try:
        check_same_dtype(dtypes[rank])
    except ConfigError as error:
        return str(error)
    return None


def test_all_ranks_compute_in_one_type() -> None:
    assert run_ranks(told_of_types, 2, [Dtype.bf16, Dtype.bf16]) == [None, None]
    for text in run_ranks(told_of_types, 2, [Dtype.bf16, Dtype.fp32]):
        assert "precision=auto: rank 0 chose bf16 and rank 1 fp32" in text
