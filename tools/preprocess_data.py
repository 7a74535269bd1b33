"""Tokenize text into an indexed dataset for `data=blend`; after a kill the same command goes on.

python tools/preprocess_data.py --input FILES|FOLDER|GLOB --tokenizer DIR --output PREFIX
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.errors import ConfigError, exit_code_of
from megatron_moe.data.arguments import add_input_arguments, reading_of, text_files_of
from megatron_moe.distributed.launch import available_cores
from megatron_moe.metrics.throughput import format_duration

if TYPE_CHECKING:
    from megatron_moe.data.preprocess import Job, Progress

SECONDS_BETWEEN_LINES = 30  # where the output is no terminal


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or its folder")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="path of the dataset, no ending")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: cores)")
    parser.add_argument(
        "--end-of-document",
        metavar="TOKEN",
        help="token after each document (default: the tokenizer's end of sentence), or none",
    )
    args = parser.parse_args(argv)
    return exit_code_of(lambda: preprocess(args))


def preprocess(args: argparse.Namespace) -> None:
    """Write the dataset, and say what it holds."""
    from megatron_moe.data.preprocess import preprocess as run

    job = job_of(args)
    with ProgressDisplay(sum(source.path.stat().st_size for source in job.sources)) as display:
        manifest = run(job, display)
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in manifest.skipped.items())
    print(
        f"{args.output}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.text_bytes:,} bytes of text" + (f"; left out: {skipped}" if skipped else "")
    )


def job_of(args: argparse.Namespace) -> Job:
    """What the arguments ask for.

    Raises:
        ConfigError: a file is missing, or an argument makes no sense.
    """
    from megatron_moe.data.preprocess import Job
    from megatron_moe.data.tokenizer import end_of_document, load_tokenizer, tokenizer_file

    if args.workers < 1:
        raise ConfigError(f"--workers={args.workers}: must be at least 1")
    if args.output.is_dir() or args.output.suffix in (".bin", ".idx"):
        raise ConfigError(f"--output={args.output}: must be the path of the dataset without ending, such as data/docs")
    tokenizer = load_tokenizer(args.tokenizer)
    end = None if args.end_of_document == "none" else end_of_document(tokenizer, args.end_of_document)
    return Job(
        sources=text_files_of(args),
        reading=reading_of(args),
        tokenizer=tokenizer_file(args.tokenizer),
        end_of_document=end,
        output=args.output,
        skip=args.on_error == "skip",
        workers=args.workers,
    )


class ProgressDisplay:
    """A bar on a terminal, else a line now and then: documents, tokens and bytes a second, and the time left."""

    def __init__(self, total_bytes: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        console = Console(stderr=True)
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=console) if console.is_terminal else None
        self.task = self.bar.add_task("starting", total=total_bytes) if self.bar else None
        self.total_bytes = total_bytes
        self.first: tuple[float, int, int, int] | None = None
        self.last_line = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show where the work stands; the first call is where it starts."""
        bytes_read = progress.position.bytes_read
        now = (time.monotonic(), progress.documents, progress.tokens, bytes_read)
        if self.first is None and progress.documents:
            print(f"goes on after {progress.documents:,} documents")
        self.first = self.first or now
        text = rates(self.first, now, self.total_bytes)
        if bytes_read == self.total_bytes:
            text += " | computing digests"
        if self.bar is not None:
            self.bar.update(self.task, completed=bytes_read, description=text)
        elif now[0] - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now[0]
            print(f"{bytes_read / self.total_bytes:.0%} | {text}", file=sys.stderr, flush=True)


def rates(first: tuple[float, int, int, int], now: tuple[float, int, int, int], total_bytes: int) -> str:
    """Speed between two moments (seconds, documents, tokens, bytes), and the time left at this speed."""
    seconds, documents, tokens, size = (b - a for a, b in zip(first, now, strict=True))
    seconds = max(seconds, 1e-9)
    left = format_duration((total_bytes - now[3]) * seconds / size) if size else "?"
    return (
        f"{documents / seconds:,.0f} documents/s | {tokens / seconds:,.0f} tokens/s | "
        f"{size / seconds / 1e6:.1f} MB/s | {left} left"
    )


if __name__ == "__main__":
    sys.exit(main())
