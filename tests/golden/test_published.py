"""Every published figure that we know of, within its tolerance; `python tools/plan.py --published` prints them."""

import dataclasses

import pytest

from megatron_moe.plan import published
from megatron_moe.plan.published import Figure, moonlight_run, published_figures
from megatron_moe.plan.step_time import StepModel

FIGURES = published_figures()


@pytest.mark.parametrize("figure", [figure for figure in FIGURES if figure.tested], ids=lambda figure: figure.what)
def test_figure(figure: Figure) -> None:
    assert figure.holds, f"{figure.published} published, {figure.predicted} predicted"


def test_none_is_missing() -> None:
    assert len(FIGURES) == 36
    assert {figure.what.split()[0] for figure in FIGURES if figure.fitted} == {"all-to-all", "tokens/s/GPU"}
    assert sum(not figure.tested for figure in FIGURES) == 2


@pytest.mark.parametrize(("predicted", "holds"), [(74.44, True), (74.46, False), (74.36, True)])
def test_rounding_is_that_of_the_printed_digits(predicted: float, holds: bool) -> None:
    assert Figure("", "74.4", predicted).holds is holds


@pytest.mark.parametrize(("predicted", "holds"), [(1000, True), (890, False), (1001, False)])
def test_tolerance_is_one_sided_where_it_is_said_so(predicted: float, holds: bool) -> None:
    assert Figure("", "1,000", predicted, error=(-0.1, 0.0)).holds is holds


def test_efficiency_of_an_h100_is_the_one_that_was_fitted() -> None:
    """Seconds of a step of Moonlight at 22,528 tokens/s/GPU, less all that is not computing."""
    run = moonlight_run()
    measured_s = 1024 * 4096 / 16 / 22528
    step = StepModel(run, 16)
    total = step.step(step.pipeline_s())
    (layers,) = step.chunks[0]
    compute_s = step.micro_batches * sum(step.pass_time(layers, backward=kind).compute for kind in (False, True))
    fitted = run.cluster.compute_efficiency * compute_s / (measured_s - (total.total - compute_s))
    assert round(fitted, 3) == run.cluster.compute_efficiency


def test_models_of_others_are_those_of_their_sizes() -> None:
    """Grouped queries make key and value projections smaller, as many times as queries share them."""
    from megatron_moe.plan.params import params_by_part

    mixtral = published.MIXTRAL_8X7B
    whole = dataclasses.replace(mixtral, num_query_groups=32)
    assert params_by_part(mixtral)["attention"][0] / params_by_part(whole)["attention"][0] == (2 + 2 / 4) / 4
