"""Train a byte-level BPE tokenizer, with the special tokens of DeepSeek's, on text.

python tools/train_tokenizer.py --input FILES|FOLDER|GLOB --vocab-size 8192 --output DIR
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.errors import ConfigError, exit_code_of
from megatron_moe.data.arguments import add_input_arguments, reading_of, text_files_of
from megatron_moe.data.text_files import documents
from megatron_moe.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from megatron_moe.hugging_face.tokenizer import open_tokenizer


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser)
    parser.add_argument("--vocab-size", type=int, required=True, help="entries, special tokens included")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for tokenizer.json")
    args = parser.parse_args(argv)
    return exit_code_of(lambda: train(args))


def train(args: argparse.Namespace) -> None:
    """Write the tokenizer, and say what it holds."""
    file = args.output / "tokenizer.json"
    if args.vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"--vocab-size={args.vocab_size}: must be at least {SMALLEST_VOCABULARY}: 256 bytes and the special tokens"
        )
    if file.exists():
        raise ConfigError(f"{file}: exists; remove it or give another --output")
    skipped: Counter[str] = Counter()
    texts = documents(text_files_of(args), reading_of(args), skip=args.on_error == "skip", skipped=skipped)
    tokenizer = train_tokenizer(texts, args.vocab_size, show_progress=sys.stderr.isatty())
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))
    size = tokenizer.get_vocab_size()
    open_tokenizer(file, size).write_settings(args.output)
    left_out = "".join(f"; left out: {count:,} {kind}" for kind, count in sorted(skipped.items()))
    print(f"{file}: {size:,} entries" + ("" if size == args.vocab_size else ", all that the text holds") + left_out)


if __name__ == "__main__":
    sys.exit(main())
