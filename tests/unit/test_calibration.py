"""Inputs fitted to runs that the plan itself made up are those that it made them with."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_moe.config.cluster import ClusterConfig, PlanConfig
from megatron_moe.config.derived import required_world_size
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import compose_config, compose_plan
from megatron_moe.plan.calibration import Measurement, calibrated, predicted
from megatron_moe.plan.hardware import of_a_rank
from megatron_moe.plan.step_time import StepModel
from megatron_moe.report.measurement import measurements
from tests.helpers.cli import run_cli
from tests.helpers.report_runs import write_run
from tools import plan

RATES = ["peak_flops=2e11", "memory_bytes=2e10", "memory_bandwidth=1.5e10", "intra_node_bandwidth=6e9"]
SET = {"compute_efficiency": 0.3, "layer_overhead_s": 0.005, "memory_efficiency": 0.4, "intra_node_efficiency": 0.2}


def cluster(**inputs: float) -> ClusterConfig:
    """A CPU with known rates."""
    found = compose_plan(["cluster=cpu", *(f"cluster.{rate}" for rate in RATES)]).cluster
    return dataclasses.replace(found, **inputs)


def made_up(of: ClusterConfig, *overrides: str) -> Measurement:
    """What the plan expects of a run."""
    config = compose_config(overrides)
    ranks = required_world_size(config.parallel)
    model = StepModel(PlanConfig(**vars(config), cluster=of_a_rank(of, ranks)), ranks)
    step = model.step(model.pipeline_s())
    sent = model.micro_batches * max(
        sum(model.pass_time(layers, backward=backward).all_to_all for layers in chunks for backward in (False, True))
        for chunks in model.chunks
    )
    return Measurement(config, ranks, step.total, step.pipeline + step.gradients, sent, step.weights + step.optimizer)


@pytest.mark.parametrize("layout", ["single", "ep2", "dp2", "pp2_ep2", "pp2_vpp2"])
def test_two_sizes_of_micro_batches_give_all_inputs(layout: str) -> None:
    known = {name: value for name, value in SET.items() if "ep2" in layout or name != "intra_node_efficiency"}
    real = cluster(**known)
    runs = [made_up(real, f"parallel={layout}", f"train.micro_batch_size={size}") for size in (1, 4)]
    fitted = calibrated(cluster(), runs)
    assert {name: getattr(fitted, name) for name in known} == pytest.approx(known, rel=0.01)  # stages wait in turn
    assert fitted.calibrated == sorted(known)
    other = made_up(real, "parallel=pp4", "data.sequence_length=512")
    assert predicted(other, fitted) == pytest.approx(other.step, rel=0.01)


def test_each_link_is_fitted_to_its_own_runs() -> None:
    real = cluster(**SET, gpus_per_node=2, inter_node_efficiency=0.5)
    runs = [made_up(real, f"parallel={layout}") for layout in ("ep2", "ep4")]
    fitted = calibrated(cluster(gpus_per_node=2), runs)
    assert fitted.intra_node_efficiency == pytest.approx(0.2)
    assert fitted.inter_node_efficiency == pytest.approx(0.5, rel=0.01)


def test_an_update_that_is_not_seen_beside_the_passes_is_the_optimizer_s(tmp_path: Path) -> None:
    """Parts are of the slowest rank in each, so they may be longer than the step together."""
    lines = [{**line, "time/forward_backward_s": 1.0, "time/data_wait_s": 0.01} for line in logged(1.0)]
    (run,) = measurements([write_run(tmp_path / "run", lines=lines)], cluster())
    assert run.update == 0.05


def test_one_run_keeps_the_proportion() -> None:
    before = cluster()
    twice_as_slow = {
        "compute_efficiency": before.compute_efficiency / 2,
        "layer_overhead_s": 2 * before.layer_overhead_s,
    }
    fitted = calibrated(before, [made_up(cluster(**twice_as_slow), "parallel=ep2")])
    assert {name: getattr(fitted, name) for name in twice_as_slow} == pytest.approx(twice_as_slow, rel=1e-3)


def test_shares_stay_at_most_one() -> None:
    run = made_up(cluster(), "parallel=ep2")
    quick = dataclasses.replace(run, passes=run.passes / 100, all_to_all=run.all_to_all / 100, update=run.update / 100)
    fitted = calibrated(cluster(), [quick])
    assert fitted.compute_efficiency == fitted.memory_efficiency == fitted.intra_node_efficiency == 1.0


def logged(step_s: float) -> list[dict[str, float]]:
    """Of a run whose first steps were slower."""
    return [
        {
            "step": step,
            "speed/step_time_s": seconds,
            "time/forward_backward_s": seconds - 0.1,
            "time/all_to_all_s": 0.0,
            "time/data_wait_s": 0.0,
            "time/optimizer_s": 0.05,
        }
        for step, seconds in ((10, 5 * step_s), (20, step_s), (30, step_s), (40, step_s))
    ]


def test_what_is_fitted_is_written_and_taken(tmp_path: Path) -> None:
    for size, step_s in ((1, 1.0), (8, 0.6)):
        write_run(tmp_path / "runs" / f"mb{size}", f"train.micro_batch_size={size}", lines=logged(step_s))
    asked = [f"--calibrate=runs/mb{size}" for size in (1, 8)]
    rates = [f"cluster.{rate}" for rate in RATES]
    result = run_cli(
        "tools/plan.py", "cluster=cpu", *rates, *asked, "--emit", "here", "--config-dir", "mine", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "cluster.layer_overhead_s" in result.stdout
    script, *options = result.stdout.splitlines()[-1].split("; python ")[1].split()
    for size, step_s in ((1, 1.0), (8, 0.6)):
        planned = run_cli(script, *options, f"train.micro_batch_size={size}", "--json", cwd=tmp_path)
        step = json.loads(planned.stdout)["step"]
        assert sum(step.values()) == pytest.approx(step_s, rel=0.01), planned.stderr


@pytest.mark.parametrize(
    ("options", "lines", "text"),
    [
        (["cluster=cpu"], logged(1.0)[:1], "has logged its speed 1 times; 2 are needed"),
        ([], logged(1.0), "ran in fp32, and the rates of cluster=h100_80gb are of bf16"),
        (
            ["cluster=cpu", "--emit", "mine"],
            logged(1.0),
            "--emit mine: needs --search or --calibrate, and",
        ),
        (["cluster=cpu", "--emit", "cpu", "--config-dir", "."], logged(1.0), "conf/cluster has a cpu.yaml"),
        (["cluster=cpu", "--calibrate", "nowhere"], logged(1.0), "nowhere"),
    ],
)
def test_what_cannot_be(
    tmp_path: Path,
    options: list[str],
    lines: list,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", lines=lines)
    assert plan.main(["--calibrate", "run", *options, *(f"cluster.{rate}" for rate in RATES)]) == 2
    assert text in capsys.readouterr().err


def test_forced_routing_is_no_measure(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "model.forced_routing=balanced", lines=logged(1.0))
    with pytest.raises(ConfigError, match="its routing was forced"):
        measurements([folder], cluster())
