"""What the page of a run shows, before a browser draws it."""

import base64
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.report import charts, tables
from megatron_moe.report.metrics_file import read_metrics
from megatron_moe.report.page import page
from megatron_moe.report.runs import read_runs, some
from megatron_moe.report.thinning import Frames, Series, spread_out, thin_out
from megatron_moe.report.trace import read_cost, seconds_by_kind
from tests.helpers.cli import ROOT, run_cli
from tests.helpers.report_runs import logged_steps, write_run

NANO = {"layers": 3, "experts": 64}


def series(values: list[float]) -> Series:
    steps = np.arange(1, len(values) + 1)
    return Series(steps, steps * 100.0, np.array(values, dtype=float))


# ---- thinning


def test_a_short_curve_keeps_every_point() -> None:
    band = thin_out(series([3.0, 1.0, math.nan, 2.0]), max_points=4)
    assert band.steps.tolist() == [1, 2, 3, 4]
    for values in (band.mean, band.low, band.high):
        np.testing.assert_array_equal(values, [3, 1, math.nan, 2])


def test_a_spike_of_one_step_stays_as_high_as_it_was() -> None:
    values = [1.0] * 100_000
    values[77_777] = 50.0
    band = thin_out(series(values), max_points=800)
    assert len(band.steps) == 800
    assert band.high.max() == 50
    assert abs(band.steps[band.high.argmax()] - 77_778) <= 125
    assert band.low.min() == band.low.max() == 1


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300), st.integers(1, 50))
def test_every_value_lies_in_its_point(values: list[float], max_points: int) -> None:
    band = thin_out(series(values), max_points)
    assert len(band.steps) == min(len(values), max_points)
    parts = [np.array(part) for part in np.array_split(values, len(band.steps))]
    assert sorted(len(part) for part in parts)[-1] - min(len(part) for part in parts) <= 1
    finite = np.array(values)[~np.isnan(values)]
    if finite.size:
        assert np.nanmin(band.low) == finite.min()
        assert np.nanmax(band.high) == finite.max()
    assert (np.diff(band.steps) > 0).all()
    inside = ~np.isnan(band.mean)
    assert (band.low[inside] <= band.mean[inside] + 1e-6).all()
    assert (band.mean[inside] <= band.high[inside] + 1e-6).all()


def test_frames_are_few_and_even_and_the_first_and_last_are_among_them() -> None:
    frames = Frames(10)
    for step in range(1, 1001):
        frames.add(step, f"matrix {step}")
    steps = [step for step, _ in frames.chosen()]
    assert len(steps) == 10
    assert (steps[0], steps[-1]) == (1, 1000)
    assert max(np.diff(steps)) <= 2 * min(np.diff(steps)) + 64
    assert dict(frames.chosen())[1000] == "matrix 1000"
    assert spread_out(3, 10).tolist() == [0, 1, 2]


# ---- reading


def test_metrics_are_read_as_they_were_logged(tmp_path: Path) -> None:
    lines = list(logged_steps(30, **NANO, loads_every=10))
    metrics = read_metrics(write_run(tmp_path / "run", lines=lines) / "metrics.jsonl")
    assert metrics.last_step == 30
    assert metrics.unreadable == []
    assert metrics.load_steps == [10, 20, 30]
    np.testing.assert_allclose(metrics.loads["moe/expert_load"][1], lines[19]["moe/expert_load"], rtol=1e-6)
    np.testing.assert_array_equal(metrics.series["train/lm_loss"].values, [line["train/lm_loss"] for line in lines])
    assert metrics.series["valid/lm_loss"].steps.tolist() == [30]
    assert metrics.series["valid/lm_loss"].tokens.tolist() == [30 * 4096]


def test_broken_lines_are_told_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    good = [json.dumps(line) for line in logged_steps(4, **NANO)]
    ragged = json.dumps({"step": 5, "moe/expert_load": [[1.0], [1.0, 2.0]]})
    other_shape = json.dumps({"step": 5, "moe/expert_load": [[1.0]], "moe/device_load": [[1.0]]})
    bad = ["{", "[]", "7", "null", "{}", '{"step": "5"}', '{"step": 4}', '{"step": 1.5}', ragged, other_shape, "\xff"]
    bad += [f'{{"step": {10**30}}}', f'{{"step": 5, "train/lm_loss": {10**400}}}']
    text = "\n".join([*good[:2], *bad[:5], *good[2:], *bad[5:]]) + '\n{"step": 6, "train/lm'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="latin-1")
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert some(metrics.unreadable, "line") == "13 lines: 3, 4, 5, 6, 7, ..."
    assert metrics.unreadable == [3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17]
    assert metrics.series["train/lm_loss"].steps.tolist() == [1, 2, 3, 4]


def test_what_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    lines = [{"step": 1, "train/lm_loss": 2.0}, {"step": 2, "train/lm_loss": None}, {"step": 3, "train/lm_loss": 1.0}]
    lines[1]["moe/expert_load"] = [[1.0, None]]
    lines[1]["moe/device_load"] = [[1.0]]
    runs = read_runs([write_run(tmp_path / "run", lines=lines)])
    (chart,) = charts.curves(runs)
    assert chart["lines"][0]["mean"] == [2.0, None, 1.0]
    assert chart["lines"][0]["not_finite"] == "step 2"
    load = charts.loads(runs)[0]["kinds"]["expert_load"]
    assert np.frombuffer(base64.b64decode(load["data"]), "<u2").tolist() == [65534, 65535]


def test_a_run_with_forced_routing_is_marked(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", "model.forced_routing=balanced", lines=[])])
    assert "routing was FORCED (balanced): its losses mean nothing" in run.notes


@pytest.mark.parametrize("folders", [["nowhere"], ["run", "nowhere"], ["empty"]])
def test_what_is_no_run_is_refused(tmp_path: Path, folders: list[str]) -> None:
    write_run(tmp_path / "run", lines=[])
    (tmp_path / "empty").mkdir()
    result = run_cli("tools/report.py", *folders, cwd=tmp_path)
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: {folders[-1]}/config.yaml: No such file or directory; is {folders[-1]} the folder of a run?\n"
    )
    assert not (tmp_path / "run/report.html").exists()


def test_a_folder_with_broken_files_makes_a_page_that_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines=[])
    (run / "environment.json").write_text("[")
    (run / "timeline.json").write_text('{"step": 3, "ranks": [{"rank": 0, "ranges": [{"name": "x"}]}]}')
    (run / "profile").mkdir()
    (run / "profile/step_00000003_rank_00000.json.gz").write_bytes(gzip.compress(b"{}"))
    (run / "profile/step_00000003_rank_00001.json.gz").write_bytes(gzip.compress(bytes(5000))[:-20] + b"x")
    (record,) = read_runs([run])
    notes = "\n".join(record.notes)
    for expected in (
        "nothing has been logged yet",
        "environment.json was left out",
        "timeline.json was left out",
        "rank_00000.json.gz was left out",
        "rank_00001.json.gz was left out",
        "the number of ranks is not recorded; the placement is that on 1",
    ):
        assert expected in notes
    html = page([record])
    assert all(note.split(":")[0] in html for note in record.notes)


# ---- charts


def test_of_one_run_related_metrics_share_a_chart_and_of_several_each_has_its_own(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, lines=list(logged_steps(20, **NANO, seed=i))) for i, name in enumerate("ab")]
    one, two = charts.curves(read_runs(folders[:1])), charts.curves(read_runs(folders))
    (held_out,) = [chart for chart in one if chart["title"] == "Held-out loss"]
    assert [line["label"] for line in held_out["lines"]] == ["mean of the sources", "code", "web"]
    titles = [chart["title"] for chart in two if chart["title"].startswith("Held-out loss")]
    assert titles == ["Held-out loss: mean of the sources", "Held-out loss: code", "Held-out loss: web"]
    for chart in two:
        assert [line["label"] for line in chart["lines"]] == ["a", "b"]
        assert [line["run"] for line in chart["lines"]] == [0, 1]


def test_every_metric_is_in_a_chart_or_said_to_be_constant(tmp_path: Path) -> None:
    lines = [line | {"my/metric": 2.5 * line["step"], "my/constant": 3.0} for line in logged_steps(20, **NANO)]
    runs = read_runs([write_run(tmp_path / "run", lines=lines)])
    shown = dict.fromkeys(runs[0].metrics.series, 0)
    for chart in charts.curves(runs):
        for line in chart["lines"]:
            values = [float(f"{value:.6g}") for value in line["mean"]]
            for name, one in runs[0].metrics.series.items():
                shown[name] += values == [float(f"{value:.6g}") for value in one.values]
    by_layer = {name for name in shown if name.startswith("moe/layer_")}
    missing = {name for name, count in shown.items() if count == 0} - by_layer
    assert missing == {"step", "consumed_tokens", "my/constant", "train/skipped_steps"}
    assert charts.constant_metrics(runs) == ["my/constant = 3", "train/skipped_steps = 0"]
    assert len(charts.violation_by_layer(runs)[0]["layers"]) == len(by_layer) == 3


def test_loads_are_kept_to_four_digits(tmp_path: Path) -> None:
    lines = list(logged_steps(5, **NANO))
    runs = read_runs([write_run(tmp_path / "run", "model=deepseekmoe_nano", lines=lines)])
    (loads,) = charts.loads(runs)
    expert = loads["kinds"]["expert_load"]
    assert loads["steps"] == [1, 2, 3, 4, 5]
    assert expert["layers"] == [1, 2, 3]
    packed = np.frombuffer(base64.b64decode(expert["data"]), "<u2").reshape(5, 3, expert["columns"])
    expected = [line["moe/expert_load"] for line in lines]
    np.testing.assert_allclose(packed * expert["max"] / 65534, expected, atol=1e-4)


def test_a_dense_model_and_a_run_of_one_step(tmp_path: Path) -> None:
    dense = write_run(
        tmp_path / "dense", "model=dense_nano", lines=[{"step": 1, "train/lm_loss": 9.0, "train/lr": 0.0}]
    )
    runs = read_runs([dense])
    assert [chart["title"] for chart in charts.curves(runs)] == ["Training loss"]
    assert charts.loads(runs) == charts.violation_by_layer(runs) == charts.timelines(runs) == []
    assert charts.costs(runs) is None
    assert 'id="routing"' not in page(runs)
    facts = {row.name: row.texts for row in tables.overview(runs)}
    assert facts["progress"] == ["1 of 450 steps, unfinished"]


def test_the_placement_is_that_of_the_plan(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "parallel=pp2_ep2", lines=[], world_size=4)
    rows = tables.placement(read_runs([run])[0])
    assert [(row.stage, row.ranks, row.layers, row.experts) for row in rows] == [
        (0, "0", "dense 0, MoE 1", "0-31"),
        (0, "1", "dense 0, MoE 1", "32-63"),
        (1, "2", "MoE 2-3", "0-31"),
        (1, "3", "MoE 2-3", "32-63"),
    ]
    assert rows[0].strip == ["dense", "moe", "", ""]


def test_options_that_differ_are_those_that_were_set(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "optimizer.lr=1e-3", lines=[]),
        write_run(tmp_path / "b", "optimizer.lr=2e-3", "train.exit_step=3", lines=[]),
    ]
    runs = read_runs(folders)
    differ = {row.name: row.texts for rows in tables.options(runs).values() for row in rows if row.differs}
    assert differ.pop("run.dir") == [str(folder) for folder in folders]
    assert differ == {"optimizer.lr": ["0.001", "0.002"], "train.exit_step": ["null", "3"]}


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run", lines=[]) for name in "ab"]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_what_a_run_is_called_stays_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    lines = [line | {f"valid/</script>{evil}/lm_loss": line["step"]} for line in logged_steps(3, **NANO)]
    run = write_run(tmp_path / "run", f"data.cache_dir='{evil}'", lines=lines)
    html = page(read_runs([run]))
    assert evil not in html
    assert html.count("</script>") == html.count("<script")


# ---- traces


def event(name: str, ts: float, dur: float, cat: str = "cpu_op", tid: Any = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "tid": tid, "args": args}


def test_time_on_a_cpu_goes_to_the_innermost_operation_that_is_known() -> None:
    events = [
        event("step 7", 0, 100, "user_annotation"),
        event("forward 0", 0, 60, "user_annotation"),
        event("aten::linear", 5, 20),
        event("aten::copy_", 10, 5),  # within: the matrix multiplication's
        event("_AllToAll", 30, 10),
        event("c10d::alltoall_base_", 31, 2),
        event("aten::mul", 45, 5),
        event("optimizer inner-step", 70, 20, "user_annotation"),
        event("aten::mm", 75, 5),  # within the optimizer: its
        event("aten::mm", 0, 100, tid=2),  # another thread
        event("aten::mm", 100, 50),  # after the step
    ]
    seconds = seconds_by_kind(events, "step 7")
    expected = {"matmul": 20, "all-to-all": 10, "other": 5, "optimizer": 20, "idle": 45}
    assert {kind: value * 1e6 for kind, value in seconds.items() if value} == pytest.approx(expected)


def test_time_on_a_gpu_is_communication_only_where_nothing_computes() -> None:
    gemm, sendrecv = "nvjet_tst_128x256", "ncclDevKernel_SendRecv"
    events = [
        event("step 1", 0, 100, "user_annotation"),
        event("aten::mm", 0, 100),  # the host does not count
        event("forward 0", 10, 50, "gpu_user_annotation", tid=7),
        event(gemm, 10, 20, "kernel", tid=7),
        event(sendrecv, 20, 20, "kernel", tid=9, **{"Collective name": "all_to_allv"}),
        event("pipeline forward-send", 50, 10, "gpu_user_annotation", tid=9),
        event(sendrecv, 52, 6, "kernel", tid=9),
        event("ncclDevKernel_AllReduce", 70, 5, "kernel", tid=9, **{"Collective name": "allreduce"}),
    ]
    seconds = seconds_by_kind(events, "step 1")
    expected = {"matmul": 20, "all-to-all": 10, "pipeline": 6, "communication": 5, "idle": 59}
    assert {kind: value * 1e6 for kind, value in seconds.items() if value} == pytest.approx(expected)


def test_a_real_trace_gives_the_times_of_the_profilers_own_table(tmp_path: Path) -> None:
    x = torch.randn(400, 400)
    q = torch.randn(1, 4, 256, 32)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function("step 3"):
        for _ in range(5):
            x = torch.matmul(x, x).tanh()
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
    path = tmp_path / "step_00000003_rank_00000.json.gz"
    profiler.export_chrome_trace(str(path))
    cost = read_cost(path)
    theirs = {average.key: average.self_cpu_time_total / 1e6 for average in profiler.key_averages()}
    whole = next(average.cpu_time_total for average in profiler.key_averages() if average.key == "step 3") / 1e6
    assert (cost.step, cost.rank, cost.on_gpu) == (3, 0, False)
    assert sum(cost.seconds.values()) == pytest.approx(whole, rel=1e-3)
    assert cost.seconds["idle"] == pytest.approx(theirs["step 3"], rel=0.02, abs=2e-5)
    assert cost.seconds["other"] == pytest.approx(theirs["aten::tanh"], rel=0.02, abs=2e-5)
    matmul = sum(theirs[name] for name in ("aten::matmul", "aten::mm"))
    assert cost.seconds["matmul"] == pytest.approx(matmul, rel=0.2)  # its helpers' time is theirs in the table


def test_the_report_imports_no_torch() -> None:
    code = "import sys, megatron_moe.report.page; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
