"""What a checkpoint holds, whether it is whole, and how it differs from another. Loads no model and runs no code of it.

python tools/inspect_checkpoint.py PATH [OTHER] [--verify] [--tensors [GLOB]] [--values] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from megatron_moe.config.errors import ConfigError, exit_code_of

if TYPE_CHECKING:
    from megatron_moe.checkpoint.inspection import Description, Differences, Entry, Size, TensorEntry

SHOWN = 20  # lines of a kind; --json has all


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code: 0, 1 if --verify found something, 2 where the user can mend what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", type=Path, help="a run (its newest checkpoint) or a checkpoint")
    parser.add_argument("other", metavar="OTHER", type=Path, nargs="?", help="another, to say what differs")
    parser.add_argument(
        "--verify", action="store_true", help="compare every file with the manifest, and the index with the model"
    )
    parser.add_argument("--tensors", metavar="GLOB", nargs="?", const="*", help="list the tensors of PATH")
    parser.add_argument("--values", action="store_true", help="compare the tensors of PATH and OTHER bit for bit")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(argv)
    problems: list[str] = []
    return exit_code_of(lambda: problems.extend(inspect(args))) or int(bool(problems))


def inspect(args: argparse.Namespace) -> list[str]:
    """Print what was asked for; returns the problems that --verify found."""
    if args.values and args.other is None:
        raise ConfigError("--values: compares two checkpoints; give OTHER too")
    from megatron_moe.checkpoint.inspection import compare, find, verify

    (checkpoint, entries), other = find(args.path), args.other and find(args.other)[0]
    found: dict[str, Any] = facts(checkpoint, args) | {"checkpoints": entries}
    if args.verify:
        found["problems"] = [problem for folder in filter(None, (checkpoint, other)) for problem in verify(folder)]
    if not found.get("problems"):  # what is damaged is not read on
        if args.tensors:
            found["tensors"] = matching(checkpoint, args.tensors)
        if other:
            found |= {"other": str(other), "differences": compare(checkpoint, other, values=args.values)}
    if args.json:
        print(json.dumps(found, default=dataclasses.asdict, indent=1))
    else:
        show(found)
    return found.get("problems", [])


def facts(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The files of a checkpoint and what they hold, as far as they are readable."""
    from megatron_moe.checkpoint.inspection import describe, entry

    found: dict[str, Any] = {"path": str(checkpoint), "entry": entry(checkpoint)}
    try:
        found["description"] = describe(checkpoint)
    except ConfigError as error:
        if found["entry"].state not in ("partial", "damaged") and not args.verify:
            raise
        found["unreadable"] = error.problems
    return found


def matching(checkpoint: Path, pattern: str) -> list[TensorEntry]:
    """The tensors whose names match.

    Raises:
        ConfigError: there are none.
    """
    from megatron_moe.checkpoint.inspection import tensors_of

    found = [tensor for tensor in tensors_of(checkpoint) if fnmatchcase(tensor.name, pattern)]
    if not found:
        raise ConfigError(f"--tensors={pattern}: no tensor of {checkpoint} has such a name; try '*{pattern}*'")
    return found


def show(found: dict[str, Any]) -> None:
    """For people. What a file says is printed as text: no markup, no control characters."""
    from megatron_moe.checkpoint.inspection import MEANINGS

    entry = found["entry"]
    say(f"checkpoint         {found['path']}")
    say(f"state              {entry.state}: {MEANINGS[entry.state]}")
    say(f"saved              {entry.saved_at}, {entry.files} files, {decimal(entry.nbytes)}")
    for line in found.get("unreadable", []):
        say(f"unreadable         {line}")
    if "description" in found:
        show_description(found["description"])
    show_entries(found["checkpoints"])
    if "tensors" in found:
        show_tensors(found["tensors"])
    if "differences" in found:
        show_differences(found["path"], found["other"], found["differences"])
    if "problems" in found:
        whole = "verified: every file is as its manifest says, and no part of the model is missing"
        show_lines(whole, "problem", found["problems"])


def show_description(description: Description) -> None:
    """Facts, then sizes by kind."""
    ranks = f"{description.world_size:,} rank{'s' * (description.world_size != 1)}"
    kinds = [f"{kind} {size}" for kind, size in description.layout.items() if size > 1]
    facts = {
        "step": f"{description.step:,}",
        "trained on": f"{description.consumed_samples:,} sequences, {description.consumed_tokens:,} tokens",
        "skipped steps": f"{description.skipped_steps:,}",
        "saved by": ": ".join([ranks, ", ".join(kinds)]) if kinds else ranks,
        "precision": description.precision,
        "model": f"{description.model}, {description.parameters:,} parameters",
    }
    facts |= {f"data {name}": digest for name, digest in description.data.items()}
    if description.weights_only:
        facts["saved by"] = "an import: weights only, which checkpoint.init_from starts a run with"
    for name, text in facts.items():
        say(f"{name:<18} {text}")
    show_sizes(description.sizes)


def show_sizes(sizes: dict[str, Size]) -> None:
    """By kind of tensor."""
    rows = [(kind, f"{s.tensors:,}", f"{s.values:,}", decimal(s.nbytes)) for kind, s in sizes.items() if s.tensors]
    show_table(("kind", "tensors", "values", "size"), rows)


def show_entries(entries: list[Entry]) -> None:
    """The checkpoints of a run."""
    rows = [(e.name, e.state, e.saved_at, f"{e.files:,}", decimal(e.nbytes)) for e in entries]
    if rows:
        show_table(("checkpoint", "state", "saved", "files", "size"), rows)


def show_tensors(tensors: list[TensorEntry]) -> None:
    """A row each."""
    rows = [(t.name, str(list(t.shape)), t.dtype, f"{t.nbytes:,}", f"{t.chunks:,}") for t in tensors]
    show_table(("tensor", "shape", "type", "bytes", "chunks"), rows)


def show_differences(before: str, after: str, differences: Differences) -> None:
    """By kind, from the first checkpoint to the second."""
    say(f"\n{before} -> {after}")
    show_lines("the same options", "option", differences.options)
    show_lines("the same tensors, shapes and types", "tensor", differences.tensors)
    if differences.values is not None:
        show_lines("the same values, bit for bit", "tensor", differences.values)


def show_lines(none: str, what: str, lines: list[str]) -> None:
    """The first of some lines, or that there are none."""
    say(f"\n{len(lines):,} {what}{'s' * (len(lines) != 1)}" if lines else none)
    for line in lines[:SHOWN]:
        say(f"  {line}")
    if len(lines) > SHOWN:
        say(f"  and {len(lines) - SHOWN:,} more; --json has all")


def show_table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """In columns as wide as what they hold."""
    table = Table(*titles, box=None)
    for row in rows:
        table.add_row(*map(printable, row))
    print()
    Console(width=10_000, markup=False, emoji=False, highlight=False).print(table)


def say(text: str) -> None:
    """Print a line."""
    print("\n".join(map(printable, text.split("\n"))))


def printable(text: str) -> str:
    """Without what moves a terminal's cursor."""
    return text if text.isprintable() else ascii(text)


if __name__ == "__main__":
    sys.exit(main())
