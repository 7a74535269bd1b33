"""One HTML page of a run, or of several beside each other: `python tools/report.py runs/NAME [runs/OTHER ...]`.

It opens in a browser without a network. Curves, expert and device load over time, placement, the time line of a step,
where the time of profiled steps went, configuration and environment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.errors import exit_code_of
from megatron_moe.files import write_whole
from megatron_moe.report.page import page
from megatron_moe.report.runs import read_runs


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--output", type=Path, help="file to write (default: report.html in the first run's folder)")
    args = parser.parse_args(argv)
    return exit_code_of(lambda: write_report(args.runs, args.output or args.runs[0] / "report.html"))


def write_report(folders: list[Path], output: Path) -> None:
    """Read the runs and write the page."""
    html = page(read_runs(folders)).encode()
    write_whole(output, html)
    print(f"wrote {output}, {len(html) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
