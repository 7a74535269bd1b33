"""Command-line arguments that the tools for text share. Imports no torch."""

from __future__ import annotations

import argparse

from megatron_moe.data.text_files import Format, Reading, TextFile, find_text_files


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Which files to read, and how."""
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or glob patterns")
    parser.add_argument("--format", choices=[f.value for f in Format], help="of the files (default: by ending)")
    parser.add_argument("--field", default="text", help="of a JSON object or row that holds the text (default: text)")
    parser.add_argument("--text-lines", action="store_true", help="documents of text files are lines, not files")
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="at a record that is no document: stop (default), or leave it out and count it",
    )


def text_files_of(args: argparse.Namespace) -> list[TextFile]:
    """The files that the arguments name.

    Raises:
        ConfigError: there is none.
    """
    return find_text_files(args.input, Format(args.format) if args.format else None)


def reading_of(args: argparse.Namespace) -> Reading:
    """How the arguments want them read."""
    return Reading(field=args.field, text_lines=args.text_lines)
