"""What a dataset holds, or what a run trains on: documents, lengths, shares of the sources, and a sample as text.

python tools/inspect_data.py PREFIX|RUN [--sample N] [--verify]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_moe.config.errors import ConfigError, exit_code_of
from megatron_moe.data.indexed import Manifest, read_manifest, sha256_of, with_ending
from megatron_moe.data.tokenizer import load_tokenizer
from megatron_moe.distributed.accelerators import quiet

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from megatron_moe.config.schema import Config
    from megatron_moe.data.dataset import BlendedDataset
    from megatron_moe.data.sources import Datasets

BAR = 40  # characters of the longest bar


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="PREFIX|RUN", help="dataset without ending, or folder of a run")
    parser.add_argument("--sample", type=int, metavar="N", help="show a dataset's document or a run's sample")
    parser.add_argument("--verify", action="store_true", help="compare the files with the digests of their manifests")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (default: beside the data)")
    args = parser.parse_args(argv)
    return exit_code_of(lambda: inspect(args))


def inspect(args: argparse.Namespace) -> None:
    """Print what was asked for."""
    quiet()
    if args.sample is not None and args.sample < 0:
        raise ConfigError(f"--sample={args.sample}: must not be negative")
    if with_ending(args.data, "idx").is_file() or not Path(args.data).is_dir():
        inspect_dataset(args.data, args)
    else:
        inspect_run(Path(args.data), args)


def inspect_dataset(prefix: str, args: argparse.Namespace) -> None:
    """Of an indexed dataset."""
    from megatron_moe.data.dataset import examine, open_indexed

    files, dataset = examine(prefix), open_indexed(prefix)
    if args.verify:
        verify([prefix])
    if args.sample is None:
        print_dataset(dataset.sequence_lengths, files.manifest)
        print_histogram(dataset.sequence_lengths)
        return
    if args.sample >= len(dataset):
        raise ConfigError(f"--sample={args.sample}: {prefix} has documents 0 to {len(dataset) - 1:,}")
    tokenizer = tokenizer_of(args.tokenizer or with_ending(prefix, "tokenizer.json"))
    print_document(tokenizer, f"document {args.sample:,} of {prefix}", dataset[args.sample])


def inspect_run(folder: Path, args: argparse.Namespace) -> None:
    """Of a run's training data."""
    from megatron_moe.config.schema import DataKind
    from megatron_moe.data.sources import build_datasets
    from megatron_moe.train.restore import read_config

    config = read_config(folder)
    if config.data.kind is DataKind.mock:
        raise ConfigError(f"{folder}: was trained on random tokens (data.kind=mock), which no file holds")
    datasets = build_datasets(config)
    sources = datasets.train.datasets
    if args.verify:
        held_out = [source.sequences for source in [*datasets.valid, *datasets.test]]
        verify(source.files.prefix for source in [*sources, *held_out])
    if args.sample is not None:
        print_sample(args.sample, datasets.train, tokenizer_of(args.tokenizer or datasets.tokenizer))
        return
    print_uses(config, datasets)
    print_histogram(np.concatenate([source.lengths for source in sources]))


def tokenizer_of(path: Path | None) -> Tokenizer:
    """The tokenizer to read ids with."""
    if path is None or not path.exists():
        raise ConfigError(f"{path or 'tokenizer'}: no such file; --tokenizer gives the one that made the ids")
    return load_tokenizer(path)


def verify(prefixes: Iterable[str]) -> None:
    """Compare files with their manifests, and say so.

    Raises:
        ConfigError: a file differs, or there is no manifest.
    """
    problems = []
    for prefix in dict.fromkeys(prefixes):
        manifest = read_manifest(prefix)
        if manifest is None:
            problems.append(f"{prefix}.manifest.json: no such file; there is nothing to compare with")
            continue
        digests = {
            "bin": manifest.bin_sha256,
            "idx": manifest.idx_sha256,
            "tokenizer.json": manifest.tokenizer_sha256,
        }
        wrong = [path for ending, sha in digests.items() if _differs(path := with_ending(prefix, ending), sha)]
        problems += [f"{path}: is not the file that {prefix}.manifest.json describes (sha256)" for path in wrong]
        if not wrong:
            print(f"{prefix}: as its manifest says")
    if problems:
        raise ConfigError(*problems)


def _differs(path: Path, sha256: str) -> bool:
    return not path.is_file() or sha256_of(path) != sha256


def print_dataset(lengths: np.ndarray, manifest: Manifest | None) -> None:
    """Counts, and what the manifest adds."""
    facts = {
        "documents": f"{len(lengths):,}",
        "tokens": f"{lengths.sum(dtype=np.int64):,}",
        "tokens a document": f"mean {lengths.mean():,.1f}, median {np.median(lengths):,.0f}, "
        f"{lengths.min():,} to {lengths.max():,}",
    }
    if manifest is not None:
        files = [source["path"] for source in manifest.sources]
        facts |= {
            "bytes of text": f"{manifest.text_bytes:,}; {manifest.text_bytes / max(manifest.tokens, 1):.2f} a token",
            "made from": ", ".join(files[:3]) + (f" and {len(files) - 3:,} more" if len(files) > 3 else ""),
            "left out": ", ".join(f"{count:,} {kind}" for kind, count in manifest.skipped.items()) or "nothing",
            "tokenizer": f"{manifest.vocab_size:,} entries, sha256 {manifest.tokenizer_sha256[:12]}...",
        }
    for name, text in facts.items():
        print(f"{name:<18} {text}")


def print_uses(config: Config, datasets: Datasets) -> None:
    """What the run makes of each source."""
    from megatron_moe.data.sources import source_uses

    table = Table(*("source", "documents", "tokens", "share of samples", "tokens in the run", "epochs"), box=None)
    for use in source_uses(config, datasets):
        tokens = use.samples * config.data.sequence_length
        table.add_row(
            use.name,
            f"{use.documents:,}",
            f"{use.tokens:,}",
            f"{use.share:.2%}",
            f"{tokens:,.0f}",
            f"{use.epochs:.2f}",
        )
    Console(width=120).print(table)


def print_histogram(lengths: np.ndarray) -> None:
    """Documents by length, in powers of two."""
    powers, counts = np.unique(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
    print("\ntokens a document, at most")
    for power, count in zip(powers.tolist(), counts.tolist(), strict=True):
        print(f"{2**power:>12,} {count:>12,} {'#' * max(1, round(BAR * count / counts.max()))}")


def print_sample(number: int, train: BlendedDataset, tokenizer: Tokenizer) -> None:
    """A training sample, document by document."""
    source, index = train.place(number)
    packed = train.datasets[source]
    ids, start = packed[index], 0
    print(f"sample {number:,}: sequence {index:,} of {packed.files.prefix}, epoch {index // len(packed)}")
    for document, offset, length in packed.pieces(index):
        title = f"document {document:,} of {packed.files.prefix}, tokens {offset:,} to {offset + length - 1:,}"
        print_document(tokenizer, title, ids[start : start + length])
        start += length


def print_document(tokenizer: Tokenizer, title: str, ids: np.ndarray) -> None:
    """Tokens as text, special ones too."""
    print(f"--- {title}")
    print(tokenizer.decode(ids.tolist(), skip_special_tokens=False))


if __name__ == "__main__":
    sys.exit(main())
