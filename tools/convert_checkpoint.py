"""Exchange models with Hugging Face: a run as a transformers folder, or such a folder as weights to start a run from.

python tools/convert_checkpoint.py export --run runs/NAME --output DIR
python tools/convert_checkpoint.py import --hf DIR --output OUT
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.errors import exit_code_of

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str) -> int:
    """'5GB' as a number, with transformers' units."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B|)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="a run's checkpoint as a Hugging Face folder")
    export.add_argument("--run", type=Path, required=True, help="folder of a run")
    export.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    export.add_argument("--dtype", choices=("bf16", "fp32"), help="of the tensors (default: as saved)")
    export.add_argument("--max-shard-size", type=size_in_bytes, default="5GB", help="of a file (default: 5GB)")
    imported = commands.add_parser("import", help="a Hugging Face folder as weights to start a run from")
    imported.add_argument("--hf", type=Path, required=True, help="folder with config.json and safetensors files")
    for command in (export, imported):
        command.add_argument("--output", type=Path, required=True, help="new folder; appears when it is complete")
        command.add_argument("--tokenizer", type=Path, help="tokenizer.json, or its folder (default: the source's)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = _parser().parse_args(argv)
    return exit_code_of(lambda: print(convert(args)))


def convert(args: argparse.Namespace) -> str:
    """Convert; returns what to tell the user."""
    import torch

    from megatron_moe.hugging_face.exporter import export_run
    from megatron_moe.hugging_face.importer import import_model

    torch.set_num_threads(1)  # nothing is computed, and each thread reserves memory
    if args.command == "export":
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[args.dtype]
        done = export_run(
            args.run,
            args.output,
            step=args.step,
            tokenizer=args.tokenizer,
            dtype=dtype,
            max_shard_bytes=args.max_shard_size,
        )
    else:
        done = import_model(args.hf, args.output, tokenizer=args.tokenizer)
    text = f"{args.output}: {done.tensors:,} tensors, {done.parameters:,} parameters, {done.nbytes:,} bytes"
    files = f" in {done.files} file{'s' * (done.files != 1)}"
    tokenizer = "" if done.tokenizer else "\nno tokenizer.json found; give one with --tokenizer if you need it"
    return f"{text}{files}{tokenizer}{_next(args, done.model)}"


def _next(args: argparse.Namespace, model: str) -> str:
    """What to do with it."""
    if args.command == "export":
        return f"\nmodel_type {model}"
    out = args.output
    return f"\ntrain on with: python pretrain.py --config-dir {out} model={model} checkpoint.init_from={out}"


if __name__ == "__main__":
    sys.exit(main())
