"""The choice of the day, and the table."""

import os
from pathlib import Path

import pytest

from tests import soak
from tests.helpers.cli import ROOT

pytest_plugins = ["pytester"]
CASES = """
import pytest
@pytest.mark.soak("row b")
@pytest.mark.parametrize("i", range(40))
def test_long(i, record_property):
    record_property("kills", 2)
    record_property("lost steps", 0)
    assert i != 3

@pytest.mark.soak("row a")
def test_other(record_property):
    record_property("lost steps", 1)

def test_short():
    pass
"""
# As if midnight had passed before the workers started.
LATE_WORKERS = """
import os
from tests import soak
soak.today = lambda: 8 if "PYTEST_XDIST_WORKER" in os.environ else 7
"""


PLUGINS = ("-p", "tests.soak", "-p", "no:hypothesispytest", "-p", "no:cacheprovider")


def cases_of(pytester: pytest.Pytester, *arguments: str) -> list[str]:
    result = pytester.runpytest_inprocess(*PLUGINS, "--collect-only", "-q", *arguments)
    return [line for line in result.outlines if "::" in line]


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\nmarkers = soak(row): long")
    pytester.makepyfile(test_cases=CASES)
    return pytester


def test_over_ten_days_every_case_has_its_turn_once(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for day in range(20_780, 20_790):
        monkeypatch.setattr(soak, "today", lambda day=day: day)
        chosen = cases_of(project)
        assert "test_cases.py::test_short" in chosen
        found += [case for case in chosen if "test_short" not in case]
    assert sorted(found) == sorted(case for case in cases_of(project, "--soak=all") if "test_short" not in case)
    assert len(found) == 41
    assert cases_of(project, "--soak=none") == ["test_cases.py::test_short"]


def test_a_turn_depends_on_the_case_alone() -> None:
    """It must not move when Python's hashes do, or when other cases come. Red: hash()."""
    node_ids = [f"tests/test_a.py::test_b[{i}]" for i in range(5)]
    assert [next(d for d in range(10) if soak.has_its_turn(node_id, d)) for node_id in node_ids] == [9, 0, 3, 2, 3]


def run_with_workers(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    os.environ["PYTHONPATH"] = str(ROOT)  # pytester restores these
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    return project.runpytest_subprocess(*PLUGINS, "-n2", *arguments)


def test_workers_take_the_day_of_their_controller(project: pytest.Pytester) -> None:
    project.makeconftest(LATE_WORKERS)
    due = [i for i in range(40) if soak.has_its_turn(f"test_cases.py::test_long[{i}]", 7)]
    result = run_with_workers(project, "-v", "-k", "test_long")
    ran = {i for i in range(40) if any(f"test_long[{i}]" in line for line in result.outlines)}
    assert ran == set(due)
    result.stdout.fnmatch_lines(["soak: those of day 7; all: make soak"])
    result.stdout.fnmatch_lines([f"soak: {len(due)} of 40 cases, those of day 7; all: make soak"])


def test_the_table_adds_up_what_workers_report(project: pytest.Pytester) -> None:
    result = run_with_workers(project, "--soak=all", "-m", "soak")
    lines = [line.rstrip() for line in result.outlines]
    start = lines.index("soak: 41 of 41 cases, all cases")
    cells = [[cell for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 : start + 5]]
    assert [[cell.strip() for cell in row[:-1]] for row in cells] == [
        ["property", "cases", "passed", "failed", "skipped", "lost", "counted"],
        ["row a", "1", "1", "0", "0", "1 steps", "-"],
        ["row b", "40", "39", "1", "0", "nothing", "80 kills"],
        ["all", "41", "40", "1", "0", "1 steps", "80 kills"],
    ]


def test_a_case_whose_worker_died_has_failed(project: pytest.Pytester) -> None:
    project.makepyfile(test_cases='import os, pytest\n@pytest.mark.soak("row")\ndef test_a():\n    os._exit(1)')
    result = run_with_workers(project, "--soak=all", "--max-worker-restart=0")
    result.stdout.fnmatch_lines(["row  *1  *0  *1  *0  *-  *-*"])


def test_the_marker_needs_a_row(project: pytest.Pytester) -> None:
    project.makepyfile(test_cases="import pytest\n@pytest.mark.soak\ndef test_a():\n    pass")
    result = project.runpytest_inprocess(*PLUGINS, "--soak=all")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*its marker needs the row of the table*"])


def test_make_soak_runs_all_of_them() -> None:
    makefile = (Path(ROOT) / "Makefile").read_text()
    assert "-n 2 --dist worksteal -m soak --soak=all" in makefile
