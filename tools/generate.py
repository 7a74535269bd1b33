"""Let a trained model continue a text.

python tools/generate.py --run RUN --prompt TEXT
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.errors import ConfigError, exit_code_of
from megatron_moe.distributed.accelerators import quiet


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, or of an imported model")
    parser.add_argument("--prompt", required=True, help="text to continue; empty: a new document")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="stop here at the latest (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample within this share of probability (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (default: the run's own)")
    args = parser.parse_args(argv)
    return exit_code_of(lambda: print(text(args)))


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for values that make no sense."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={args.max_new_tokens}: must be positive")
    if not 0 <= args.temperature < math.inf:
        raise ConfigError(f"--temperature={args.temperature}: must be a number from 0")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p={args.top_p}: must be above 0 and at most 1")
    if args.top_p < 1 and args.temperature == 0:
        raise ConfigError(f"--top-p={args.top_p}: needs a --temperature above 0, which draws samples")


def text(args: argparse.Namespace) -> str:
    """The prompt and what follows, to the end of the document."""
    check(args)
    quiet()
    from megatron_moe.data.tokenizer import end_of_document
    from megatron_moe.train.generate import generate
    from megatron_moe.train.restore import restored

    with restored(args.run) as run:
        tokenizer = run.tokenizer(args.tokenizer)
        end = end_of_document(tokenizer)
        prompt = tokenizer.encode(args.prompt).ids
        tokens = generate(
            run,
            prompt or [end],
            vocab_size=tokenizer.get_vocab_size(),
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        )
        answer = itertools.takewhile(lambda token: token != end, itertools.islice(tokens, args.max_new_tokens))
        return tokenizer.decode([*prompt, *answer])


if __name__ == "__main__":
    sys.exit(main())
