"""Pipeline schedules against closed forms, and their rules under any durations."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.plan.schedule import (
    Kind,
    Orders,
    Pass,
    bubble,
    micro_batches_in_flight,
    most_in_flight,
    one_forward_one_backward,
    simulate,
    zero_bubble,
)

SIZES = [(p, groups * p) for p in (1, 2, 3, 4, 8, 16) for groups in (1, 2, 5)]


def seconds(stage: int, task: Pass) -> float:
    """Twice as long backward as forward, half of it for the weights where these are apart."""
    return {Kind.forward: 1.0, Kind.backward: 2.0, Kind.weight: 1.0}[task.kind]


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_1f1b_idles_as_in_the_closed_form(stages: int, micro_batches: int) -> None:
    timeline = simulate(one_forward_one_backward(stages, 1, micro_batches), seconds)
    assert bubble(timeline) == pytest.approx([(stages - 1) / (micro_batches)] * stages)


@pytest.mark.parametrize("virtual", [2, 3, 4])
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_interleaving_divides_the_bubble(stages: int, micro_batches: int, virtual: int) -> None:
    timeline = simulate(one_forward_one_backward(stages, virtual, micro_batches), seconds)
    assert bubble(timeline) == pytest.approx([(stages - 1) / (virtual * micro_batches)] * stages)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_zero_bubble_is_a_third(stages: int, micro_batches: int) -> None:
    timeline = simulate(zero_bubble(stages, micro_batches), lambda stage, task: 1.0)
    assert bubble(timeline) == pytest.approx([(stages - 1) / (3 * micro_batches)] * stages)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_micro_batches_in_flight(stages: int, micro_batches: int) -> None:
    """1F1B: as many as stages are left (arXiv:2104.04473, 2.2); zero bubble: on every stage what the first has."""
    plain, apart = one_forward_one_backward(stages, 1, micro_batches), zero_bubble(stages, micro_batches)
    assert [most_in_flight(order) for order in plain] == [[stages - stage] for stage in range(stages)]
    assert [most_in_flight(order) for order in apart] == [[stages]] * stages
    interleaved = one_forward_one_backward(stages, 2, micro_batches)
    assert sum(most_in_flight(interleaved[0])) == min(2 * micro_batches, 2 * stages + stages - 1)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 5))
def test_micro_batches_in_flight_in_closed_form(stages: int, virtual: int, groups: int) -> None:
    micro_batches = groups * stages
    for stage, order in enumerate(one_forward_one_backward(stages, virtual, micro_batches)):
        passes = sum(most_in_flight(order))
        assert micro_batches_in_flight(stages, stage, virtual, micro_batches) * virtual == pytest.approx(passes)


def schedules(stages: int, virtual: int, micro_batches: int) -> Orders:
    return one_forward_one_backward(stages, virtual, micro_batches) if virtual else zero_bubble(stages, micro_batches)


@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 9), st.floats(0, 3), st.randoms(use_true_random=False))
def test_no_pass_begins_before_what_it_needs(stages, virtual, micro_batches, transfer_s, random) -> None:
    """Whatever each takes: on its rank after the one before, and after the pass whose result it gets has arrived."""
    micro_batches *= stages if virtual > 1 else 1  # as the interleaved schedule wants it
    orders = schedules(stages, virtual, micro_batches)
    took: dict[tuple[int, Pass], float] = {}
    timeline = simulate(
        orders, lambda stage, task: took.setdefault((stage, task), random.uniform(0.1, 4)), transfer_s=transfer_s
    )
    kinds, chunks = (2 if virtual else 3), max(virtual, 1)
    at = {(stage, slot.task): slot for stage, slots in enumerate(timeline) for slot in slots}
    assert len(at) == sum(map(len, orders)) == stages * kinds * chunks * micro_batches
    for (stage, task), slot in at.items():
        assert slot.stop - slot.start == pytest.approx(took[stage, task])
        place = task.chunk * stages + stage
        before = place - 1 if task.kind is Kind.forward else place + 1
        if task.kind is not Kind.weight and 0 <= before < stages * chunks:
            needed = at[before % stages, Pass(task.kind, before // stages, task.micro_batch)]
            assert slot.start >= needed.stop + (transfer_s if before % stages != stage else 0) - 1e-9
        elif task.kind is not Kind.forward:
            kind = Kind.forward if task.kind is Kind.backward else Kind.backward
            assert slot.start >= at[stage, Pass(kind, task.chunk, task.micro_batch)].stop - 1e-9
    for slots in timeline:
        assert all(a.stop <= b.start + 1e-9 for a, b in itertools.pairwise(slots))


def test_orders_that_wait_for_each_other_are_refused() -> None:
    forward, backward = Pass(Kind.forward, 0, 0), Pass(Kind.backward, 0, 0)
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([[backward, forward], [forward, backward]], seconds)
