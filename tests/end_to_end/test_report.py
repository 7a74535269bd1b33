"""The report in a browser, as a user opens it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.browser import Opened, chromium, opened
from tests.helpers.cli import metrics_of, run_cli
from tests.helpers.report_runs import logged_steps, write_run
from tests.helpers.training import TINY

# For each plot its title, and what of it is drawn: curves and points, heat maps or bars.
MARKS = """() => [...document.querySelectorAll("figure")].map((figure) => [
    figure.querySelector("h3").textContent,
    [...figure.querySelectorAll(".scatterlayer path[d], .heatmaplayer image, .barlayer path[d]")]
        .filter((mark) => { const box = mark.getBoundingClientRect(); return box.width + box.height > 0; }).length,
])"""
TRACES = "(title) => [...document.querySelectorAll('figure')].find((f) => f.querySelector('h3').textContent === title)\
.querySelector('.plot').data.map(({ x, y, z, name }) => ({ x, y, z, name }))"
CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  const light = (color) => channels(color).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const style = getComputedStyle;
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = style(node).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
  };
  const names = "h1, h2, h3, p, a, td, th, span, label, button, .xtick text, .ytick text";
  const texts = [...document.querySelectorAll(names)]
    .filter((node) => node.textContent.trim());
  return Math.min(...texts.map((node) => {
    const [a, b] = [light(node.tagName === "text" ? style(node).fill : style(node).color), light(behind(node))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two pipeline stages with everything that a run can leave."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["parallel=pp2", "train.train_steps=8", "logger.log_interval=1", "evaluation.interval=3", "run.name=run"]
    options += ["evaluation.num_samples=4", "debug=profile", "profile.ranks=[0,1]"]
    result = run_cli("pretrain.py", *TINY, *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "runs/run"


@pytest.fixture(scope="module")
def trained_report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(trained, output=tmp_path_factory.mktemp("report") / "report.html")


def report(*runs: Path, output: Path) -> Path:
    result = run_cli("tools/report.py", *map(str, runs), "--output", str(output), cwd=output.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"wrote {output}, ")
    return output


def check(found: Opened) -> dict[str, int]:
    """What holds of every page; returns how many marks each chart has."""
    marks = dict(found.page.evaluate(MARKS))
    assert marks
    assert all(marks.values()), marks
    assert found.console == []
    assert found.requests == []
    assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert found.page.evaluate(CONTRAST) >= 4.5  # WCAG 2.2, 1.4.3
    return marks


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "light"), (1440, "dark"), (390, "dark")])
def test_everything_of_a_run_is_drawn(
    browser: Any, trained: Path, trained_report: Path, width: int, scheme: str
) -> None:
    with opened(browser, trained_report, width=width, scheme=scheme) as found:
        marks = check(found)
        assert list(marks) == [
            *("Training loss", "Held-out loss"),
            *("Balance losses", "Largest violation", "Violation by layer", "Expert load", "Device load"),
            *("Learning rate", "Gradient norm"),
            *("Throughput", "Throughput per GPU", "Model FLOP/s per GPU", "Duration of a step and its parts", "Memory"),
            *("Time line of step 3", "Where the time of profiled steps went"),
        ]
        assert marks["Time line of step 3"] > 2 * 2 * 4  # passes of 4 micro batches on two ranks
        (loss,) = found.page.evaluate(TRACES, "Training loss")
        assert loss["y"] == pytest.approx([line["train/lm_loss"] for line in metrics_of(trained)], rel=1e-5)
        background = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(246, 247, 248)", "dark": "rgb(18, 21, 24)"}[scheme]


def test_the_slider_moves_the_heat_map_to_what_was_logged(browser: Any, trained: Path, trained_report: Path) -> None:
    logged = {line["step"]: line for line in metrics_of(trained)}
    with opened(browser, trained_report, width=390) as found:
        page = found.page
        image = page.get_by_role("img", name="Expert load, over the mean").locator(".heatmaplayer image")
        slider = page.get_by_role("slider", name="Step of the load heat maps")
        pictures = set()
        for key, step in (("End", 8), ("ArrowLeft", 7), ("Home", 1)):
            slider.press(key)
            page.get_by_text(f"Step {step}; busiest: expert").wait_for()
            assert slider.get_attribute("aria-valuetext") == f"step {step}"
            for title, name in (("Expert load", "moe/expert_load"), ("Device load", "moe/device_load")):
                (heat_map,) = page.evaluate(TRACES, title)
                np.testing.assert_allclose(heat_map["z"], logged[step][name], atol=1e-4)
            pictures.add(image.get_attribute("href"))
        assert len(pictures) == 3
        assert found.console == []


def test_several_runs_share_the_charts(browser: Any, trained: Path, tmp_path: Path) -> None:
    dense = ["model=dense_nano", "optimizer.lr=2e-3"]
    lines = [{"step": step, "consumed_tokens": 100 * step, "train/lm_loss": 9 - step} for step in range(1, 5)]
    lines[2]["train/lm_loss"] = None
    other = write_run(tmp_path / "other", *dense, lines=lines)
    empty = write_run(tmp_path / "empty", lines=[])
    with opened(browser, report(trained, other, empty, output=tmp_path / "report.html"), width=390) as found:
        page = found.page
        check(found)
        traces = page.evaluate(TRACES, "Training loss")
        assert [trace["name"] for trace in traces] == ["run", "other"]
        assert traces[1]["y"] == [8, 7, None, 5]
        assert page.get_by_text("other: not finite at step 3").is_visible()
        assert page.get_by_text("empty: metrics.jsonl: nothing has been logged yet").is_visible()
        page.get_by_label("Curves over").select_option("tokens")
        page.wait_for_selector("html[data-drawn]", state="attached")
        assert page.evaluate(TRACES, "Training loss")[1]["x"] == [100, 200, 300, 400]
        assert page.evaluate(TRACES, "Training loss")[0]["x"] == [256 * step for step in range(1, 9)]
        row = page.get_by_role("row", name="optimizer.lr").first
        assert row.get_by_role("cell").all_inner_texts() == ["0.001", "0.002", "0.004"]


def test_dark_and_light_can_be_switched(browser: Any, trained_report: Path) -> None:
    with opened(browser, trained_report, scheme="dark") as found:
        tick = "getComputedStyle(document.querySelector('.xtick text')).fill"
        before = found.page.evaluate(tick)
        found.page.get_by_role("button", name="Switch dark and light").click()
        found.page.wait_for_selector("html[data-drawn]", state="attached")
        assert found.page.evaluate(tick) != before
        check(found)


def test_a_hundred_thousand_steps_open_fast(browser: Any, tmp_path: Path) -> None:
    """Of 61 layers with 128 experts, within 3 s that the page computes; what else the machine does is not counted."""
    run = write_run(tmp_path / "run", "model=deepseekmoe_145b", "train.train_steps=100000", lines=[])
    lines = [json.dumps(line).partition(", ")[2] for line in logged_steps(97, layers=61, experts=128, loads_every=97)]
    spike, loss = 54_321, '"train/lm_loss": '
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            line = lines[step % 96 if step % 970 else 96]  # a load at every 970th
            file.write(f'{{"step": {step}, {line.replace(loss, loss + "99") if step == spike else line}\n')
    page = report(run, output=tmp_path / "report.html")
    assert page.stat().st_size < 15e6
    with opened(browser, page) as found:
        first_s = found.cpu_s
    with opened(browser, page) as found:
        check(found)
        assert min(first_s, found.cpu_s) < 3
        high = found.page.evaluate(TRACES, "Training loss")[1]
        assert max(high["y"]) > 990
        assert abs(high["x"][high["y"].index(max(high["y"]))] - spike) < 125
