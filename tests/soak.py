"""Cases that take too long for every run: a tenth of them a day, all of them with `make soak`, one table of what ran.

`@pytest.mark.soak("bitwise resume")` makes a test (or, as `pytestmark`, all of a module) such a case; its argument is
the row of the table that the case belongs to. What a case did besides passing it tells with pytest's `record_property`:
numbers are summed by name, and names that begin with "lost " fill the column of what was lost:

    record_property("kills", 10)
    record_property("lost steps", 0)

A case's turn is a digest of its node id, so that it comes up once in any ten days in a row, whatever else there is.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

DAYS = 10  # in which every case has its turn
ROW = "soak"  # the property that carries a case's row from xdist's workers
LOST = "lost "
COLUMNS = ("property", "cases", "passed", "failed", "skipped", "lost", "counted", "seconds")
TEXT_COLUMNS = ("property", "lost", "counted")


def today() -> int:
    """Days since 1970 (UTC)."""
    return int(time.time()) // 86400


def has_its_turn(node_id: str, day: int) -> bool:
    """Whether a case is one of that day's tenth."""
    return int.from_bytes(hashlib.sha256(node_id.encode()).digest()) % DAYS == day % DAYS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak",
        choices=("today", "all", "none"),
        default="today",
        help="which cases marked 'soak' run: those of the day (a tenth), all or none",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Soak(config), "soak-table")


@dataclass
class Case:
    """What is known of one case: its row, how its phases went, what it counted."""

    row: str
    failed: bool = False
    skipped: bool = False
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, report: pytest.TestReport) -> None:
        """Take in a phase (setup, call or teardown); the last one has all properties."""
        self.failed |= report.failed
        self.skipped |= report.skipped
        self.seconds += report.duration
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name != ROW:
                    self.counts[name] += value


class Soak:
    """Chooses cases where they are collected, and adds up reports where these arrive (xdist: workers, controller)."""

    def __init__(self, config: pytest.Config) -> None:
        self.choice = config.getoption("--soak")
        # Of the controller, so that midnight does not come between two workers.
        self.day = getattr(config, "workerinput", {}).get("soak_day", today())
        self.chosen = self.marked = 0
        self.cases: dict[str, Case] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["soak_day"] = self.day

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.chosen, self.marked = getattr(node, "workeroutput", {}).get("soak", (self.chosen, self.marked))

    def pytest_report_header(self) -> str:
        return f"soak: {self.which()}"

    def which(self) -> str:
        """The chosen cases, in words."""
        return {
            "today": f"those of day {self.day}; all: make soak",
            "all": "all cases",
            "none": "no cases (--soak=none)",
        }[self.choice]

    @pytest.hookimpl(trylast=True)  # after -k and -m
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        marked = [item for item in items if row_of(item) is not None]
        left_out = {item for item in marked if not self.runs(item.nodeid)}
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
        self.chosen, self.marked = len(marked) - len(left_out), len(marked)
        if hasattr(config, "workeroutput"):
            config.workeroutput["soak"] = (self.chosen, self.marked)

    def runs(self, node_id: str) -> bool:
        """Whether a marked case is chosen."""
        return self.choice == "all" or (self.choice == "today" and has_its_turn(node_id, self.day))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if (row := row_of(item)) is not None:
            item.user_properties.append((ROW, row))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = dict(report.user_properties).get(ROW)
        if row is not None:
            self.cases.setdefault(report.nodeid, Case(row))
        if report.nodeid in self.cases:  # a worker that died leaves a report without properties
            self.cases[report.nodeid].add(report)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.marked:
            terminalreporter.section("soak")
            terminalreporter.write_line(f"soak: {self.chosen} of {self.marked} cases, {self.which()}")
            for line in table(self.cases.values()):
                terminalreporter.write_line(line)


def row_of(item: pytest.Item) -> str | None:
    """The row of the table that a marked test belongs to."""
    marker = item.get_closest_marker("soak")
    if marker is None:
        return None
    if len(marker.args) != 1:
        raise pytest.UsageError(f'{item.nodeid}: its marker needs the row of the table: soak("bitwise resume")')
    return marker.args[0]


def table(cases: Iterable[Case]) -> Iterator[str]:
    """Lines: a heading, a row for each property, and their sum; none without cases."""
    by_row: dict[str, list[Case]] = {}
    for case in cases:
        by_row.setdefault(case.row, []).append(case)
    if not by_row:
        return
    everything = [case for some in by_row.values() for case in some]
    rows = [COLUMNS, *(_cells(name, by_row[name]) for name in sorted(by_row)), _cells("all", everything)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        cells = zip(row, COLUMNS, widths, strict=True)
        yield "  ".join(f"{c:<{w}}" if name in TEXT_COLUMNS else f"{c:>{w}}" for c, name, w in cells)


def _cells(name: str, cases: list[Case]) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for case in cases:
        counts.update(case.counts)
    lost = {key.removeprefix(LOST): counts[key] for key in counts if key.startswith(LOST)}
    counted = {key: counts[key] for key in counts if not key.startswith(LOST)}
    failed = sum(case.failed for case in cases)
    skipped = sum(case.skipped and not case.failed for case in cases)
    return (
        name,
        str(len(cases)),
        str(len(cases) - failed - skipped),
        str(failed),
        str(skipped),
        _text({key: number for key, number in lost.items() if number}) or ("nothing" if lost else "-"),
        _text(counted) or "-",
        f"{sum(case.seconds for case in cases):.0f}",
    )


def _text(counts: dict[str, float]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())
