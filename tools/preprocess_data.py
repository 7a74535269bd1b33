"""Tokenize JSONL into an indexed dataset for `data=blend`.

python tools/preprocess_data.py --input docs.jsonl --tokenizer tokenizer.json --output PREFIX
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.errors import ConfigError, exit_code_of
from megatron_moe.distributed.accelerators import quiet


def documents(paths: list[Path], field: str) -> Iterator[str]:
    """The text of each line of each file; blank lines hold none.

    Raises:
        ConfigError: a line is no UTF-8, or no JSON object with a text in `field`.
    """
    for path in paths:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text(path, number, line, field)


def _text(path: Path, number: int, line: bytes, field: str) -> str:
    try:
        text = json.loads(line)[field]
        str(text).encode()  # JSON can spell halves of characters, which no tokenizer takes
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}:{number}: no JSON object with the field {field!r} ({error})") from None
    if not isinstance(text, str):
        raise ConfigError(f"{path}:{number}: field {field!r} is {type(text).__name__}, not text")
    return text


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSONL files, in order")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or its folder")
    parser.add_argument("--output", type=Path, required=True, help="path of the .bin and .idx without the ending")
    parser.add_argument("--field", default="text", help="field of a line that holds the text (default: text)")
    args = parser.parse_args(argv)
    return exit_code_of(lambda: preprocess(args))


def preprocess(args: argparse.Namespace) -> None:
    """Write the dataset, and say what it holds."""
    quiet()
    from megatron_moe.data.corpus import write_indexed
    from megatron_moe.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    if all(path.stat().st_size == 0 for path in args.input):
        raise ConfigError(f"{', '.join(map(str, args.input))}: no documents")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    num_documents, num_tokens = write_indexed(documents(args.input, args.field), tokenizer, args.output)
    print(f"{args.output}: {num_documents:,} documents, {num_tokens:,} tokens")


if __name__ == "__main__":
    sys.exit(main())
