"""Measure, beside what a user would take instead, in one run on this machine.

python tools/benchmark.py {train,data,checkpoint,plan} [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from megatron_moe.config.errors import exit_code_of
from megatron_moe.distributed.accelerators import quiet
from tools.benchmarks.checkpoint import save_and_load
from tools.benchmarks.plan import OTHERS, predictions
from tools.benchmarks.train import CONTENDER, CONTENDERS, SIZES, compare, measure

Result = dict[str, Any]
SEQUENCE_LENGTH = 4096
WARM_UP = 3  # steps


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    data = commands.add_parser("data", help="preprocessing, loading, and building the order of samples")
    data.add_argument("--megabytes", type=float, default=32, help="text to preprocess (default: 32)")
    data.add_argument("--documents", type=float, default=1e7, help="to build an order for (default: 1e7)")
    data.add_argument("--repeat", type=int, default=3, help="the median of so many counts (default: 3)")
    data.add_argument("--steps", type=int, default=60, help="training steps on each kind of data (default: 60)")
    data.set_defaults(benchmark=benchmark_data)
    checkpoint = commands.add_parser("checkpoint", help="saving and loading on one rank, in a new folder here")
    checkpoint.add_argument("--hidden-size", type=int, default=512, help="of the nano model (default: 512, 0.75 GB)")
    checkpoint.add_argument("--repeat", type=int, default=5, help="the median of so many counts (default: 5)")
    checkpoint.set_defaults(benchmark=benchmark_checkpoint)
    train = commands.add_parser("train", help="a training step beside transformers and plain megatron-core")
    train.add_argument("--sizes", nargs="+", default=["small"], choices=SIZES, help="of the model (default: small)")
    train.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    train.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="CONTENDER")
    train.add_argument("--steps", type=int, default=5, help="the median of so many (default: 5)")
    train.set_defaults(benchmark=benchmark_train)
    plan = commands.add_parser("plan", help="steps that tools/plan.py predicts, calibrated on one run on this machine")
    plan.add_argument("--steps", type=int, default=14, help="of each run (default: 14)")
    plan.add_argument("--others", nargs="+", default=OTHERS, metavar="OPTIONS", help="of the runs that are predicted")
    plan.set_defaults(benchmark=lambda args: predictions(args.steps, args.others))
    for command in (train, data, checkpoint, plan):
        command.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args(argv)
    return exit_code_of(lambda: report(args.benchmark(args), args.json))


def report(results: list[Result], file: Path | None) -> None:
    """Print a table and write the figures."""
    table = Table("what", "figure", "unit", "beside", "ratio", box=None)
    for result in results:
        ratio = f"{result['ratio']:.3f}" if "ratio" in result else ""
        table.add_row(result["what"], f"{result['figure']:,.4g}", result["unit"], result.get("beside", ""), ratio)
    Console(width=140).print(table)
    if file is not None:
        file.write_text(json.dumps(results, indent=1), encoding="utf-8")


def benchmark_data(args: argparse.Namespace) -> list[Result]:
    """Preprocessing beside bare `encode_batch`, the loader, a step beside mock data, and an index."""
    quiet()
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        write_documents(folder / "docs.jsonl", int(args.megabytes * 1e6))
        return [
            *preprocessing(folder, args.repeat),
            *loading(folder),
            *in_new_process(training_steps, str(folder), args.steps, "dense_nano", OMP_NUM_THREADS="1"),
            *in_new_process(training_steps, str(folder), args.steps, "deepseekmoe_nano", OMP_NUM_THREADS="1"),
            *in_new_process(order_building, str(folder), int(args.documents)),
        ]
    finally:
        shutil.rmtree(folder)


def benchmark_checkpoint(args: argparse.Namespace) -> list[Result]:
    """Saving and loading beside `torch.distributed.checkpoint`."""
    quiet()
    return in_new_process(save_and_load, args.hidden_size, args.repeat)


def benchmark_train(args: argparse.Namespace) -> list[Result]:
    """A step of each contender in a process of its own, one after the other."""
    quiet()
    results = []
    for size in args.sizes:
        measured = {}
        for precision, contender in itertools.product(args.precisions, dict.fromkeys((CONTENDER, *args.contenders))):
            try:
                found = in_new_process(measure, contender, size, precision, args.steps)
            except BrokenProcessPool:
                said = "killed, perhaps for its memory"
            else:
                measured[contender, precision], said = found, f"{found['median']:.3g} s"
            print(f"{size}, {precision}, {contender}: {said}", file=sys.stderr)
        results += compare(size, measured)
    return results


def in_new_process(function: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """Call in a process of its own, so that its memory and settings are its own."""
    os.environ |= environment
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def write_documents(path: Path, size: int) -> None:
    """The standard library's sources, tests too, over and over."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = [file.read_text(errors="replace") for file in files if "site-packages" not in file.parts]
    with path.open("w", encoding="utf-8") as out:
        for text in endless(texts):
            out.write(json.dumps({"text": text}) + "\n")
            if (size := size - len(text)) <= 0:
                return


def texts_of(folder: Path) -> list[str]:
    """What `write_documents` wrote."""
    with (folder / "docs.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def endless(items: list[str]) -> Iterator[str]:
    """Over and over."""
    while True:
        yield from items


def preprocessing(folder: Path, repeat: int) -> list[Result]:
    """Whole runs of preprocessing with 1 and 2 workers, in turn with `encode_batch` on 1 and 2 threads."""
    from megatron_moe.data.tokenizer import train_tokenizer

    texts = texts_of(folder)
    train_tokenizer(texts[:1000], 8192).save(str(folder / "tokenizer.json"))
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeat):
        for count in (1, 2):
            bare = in_new_process(encode_batch, str(folder), RAYON_NUM_THREADS=str(count))
            seconds.setdefault(("bare", count), []).append(bare)
            seconds.setdefault(("ours", count), []).append(preprocess(folder, count))
    size, tokens = sum(len(text.encode()) for text in texts) / 1e6, tokens_of(folder / "data2")
    results = []
    for count in (1, 2):
        ours, bare = (statistics.median(seconds[who, count]) for who in ("ours", "bare"))
        what, beside = f"preprocess_data.py, {count} workers", f"encode_batch, {count} threads"
        for unit, amount in (("MB/s", size), ("tokens/s", tokens)):
            results.append(
                {"what": what, "figure": amount / ours, "unit": unit, "beside": f"{beside}: {amount / bare:,.4g}"}
                | {"ratio": bare / ours, "seconds": seconds["ours", count], "seconds_beside": seconds["bare", count]}
            )
    return results


def encode_batch(folder: str) -> float:
    """Seconds that the tokenizer alone takes for the same documents, read beforehand."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    texts = texts_of(Path(folder))
    start = time.perf_counter()
    for first in range(0, len(texts), 1000):
        tokenizer.encode_batch(texts[first : first + 1000])
    return time.perf_counter() - start


def preprocess(folder: Path, workers: int) -> float:
    """Seconds of a whole run of the command's work, reading, digests and the start of workers included."""
    from megatron_moe.data.preprocess import Job
    from megatron_moe.data.preprocess import preprocess as run
    from megatron_moe.data.text_files import Reading, find_text_files

    output = folder / f"data{workers}"
    for file in folder.glob(f"{output.name}.*"):
        file.unlink()
    start = time.perf_counter()
    job = Job(
        sources=find_text_files([str(folder / "docs.jsonl")]),
        reading=Reading(),
        tokenizer=folder / "tokenizer.json",
        end_of_document=1,
        output=output,
        workers=workers,
    )
    run(job, lambda progress: None)
    return time.perf_counter() - start


def tokens_of(prefix: Path) -> int:
    """Of a dataset, by its manifest."""
    from megatron_moe.data.indexed import read_manifest

    return read_manifest(prefix).tokens


def loading(folder: Path) -> list[Result]:
    """Samples from the loader of one rank."""
    results = []
    for length in (128, SEQUENCE_LENGTH):
        train, batches = loader(options(folder, length))
        count = min(len(train), 2000) // 8
        start = time.perf_counter()
        for _ in itertools.islice(batches, count):
            pass
        rate = count * 8 / (time.perf_counter() - start)
        results.append({"what": f"loader, {length} tokens a sample", "figure": rate, "unit": "samples/s"})
    return results


def loader(overrides: list[str], first_sample: int = 0) -> tuple[Any, Iterator[dict[str, Any]]]:
    """A configuration's training data, and micro batches of 8 as one rank gets them."""
    from megatron_moe.config.load import compose_config
    from megatron_moe.data.sampler import micro_batches
    from megatron_moe.data.sources import build_datasets

    config, groups = compose_config(overrides), Groups()
    train = build_datasets(config).train
    batches = micro_batches(
        train,
        first_sample=first_sample,
        micro_batch_size=8,
        options=config.data,
        pg_collection=groups,
        device=groups.device,
    )
    return train, batches


class Groups:
    """What the loader asks of process groups, for one rank."""

    def __init__(self) -> None:
        import torch

        self.dp = self.cp = self
        self.device = torch.device("cpu")

    def size(self) -> int:
        """One rank."""
        return 1

    def rank(self) -> int:
        """Of one."""
        return 0


def options(folder: Path, sequence_length: int) -> list[str]:
    """Overrides that name the preprocessed documents."""
    return [
        "data=blend",
        f"data.train=[{{path: {folder}/data2}}]",
        f"data.sequence_length={sequence_length}",
        f"data.cache_dir={folder}/cache",
    ]


def training_steps(folder: str, steps: int, model: str) -> list[Result]:
    """Steps on mock data, on real data, and on real data that was read beforehand, in a new order each time.

    Text loads experts unevenly, the more so the longer they train: after 150 steps one on text took 2 % longer than on
    mock data, read or not. With two threads it was 7 %, as PyTorch divides operations among them by their size; so one.
    """
    quiet()
    from megatron_moe.config.load import compose_config
    from megatron_moe.config.validate import validate
    from megatron_moe.distributed.context import distributed
    from megatron_moe.train.loop import set_up
    from megatron_moe.train.step import train_step

    config = compose_config([f"model={model}", "data=mock", f"run.dir={folder}/run", "train.micro_batch_size=8"])
    validate(config, 1)
    real = options(Path(folder), 128)
    read = list(itertools.islice(loader(real, first_sample=10_000)[1], steps + WARM_UP))
    batches = {"mock": loader(["data=mock"])[1], "real": loader(real)[1], "read": iter(read)}
    seconds: dict[str, list[float]] = {kind: [] for kind in batches}
    waited: dict[str, list[float]] = {kind: [] for kind in batches}
    with distributed(config.parallel) as context:
        run = set_up(config, context)
        for _ in range(steps + WARM_UP):
            for kind in random.sample(list(batches), len(batches)):
                start = time.perf_counter()
                batch = next(batches[kind])
                waited[kind].append(time.perf_counter() - start)
                train_step(run.pipeline, run.optimizer, [iter([batch])], 1)
                seconds[kind].append(time.perf_counter() - start)
    median = {kind: statistics.median(values[WARM_UP:]) for kind, values in seconds.items()}
    step_on_real = {"what": f"training step of {model}", "figure": median["real"] * 1e3, "unit": "ms"}
    beside = {"mock": "on mock data", "read": "on text read beforehand"}
    return [
        {**step_on_real, "beside": f"{text}: {median[kind] * 1e3:,.4g}", "ratio": median["real"] / median[kind]}
        for kind, text in beside.items()
    ] + [
        {
            "what": f"waiting for data, {model}",
            "figure": statistics.median(waited["real"][WARM_UP:]) / median["real"] * 100,
            "unit": "% of a step",
        }
    ]


def order_building(folder: str, num_documents: int) -> list[Result]:
    """From an indexed dataset of many documents, whose ids are a hole in a file, to the first sample."""
    import numpy as np

    from megatron_moe.data.indexed import with_ending, write_index

    quiet()
    prefix = Path(folder) / "many"
    lengths = np.random.default_rng(0).lognormal(5.7, 1.0, num_documents).astype(np.int32) + 1
    write_index(prefix, np.dtype(np.uint16), lengths)
    with with_ending(prefix, "bin").open("wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))
    overrides = [
        "data=blend",
        f"data.train=[{{path: {prefix}}}]",
        "data.valid_fraction=0.01",
        f"data.sequence_length={SEQUENCE_LENGTH}",
        f"data.cache_dir={folder}/cache",
    ]
    results = []
    for what in ("order", "order that lies in the cache"):
        start = time.perf_counter()
        train, batches = loader(overrides)
        next(batches)
        figure = time.perf_counter() - start
        results.append({"what": f"{what}, {num_documents:,} documents, {len(train):,} samples", "figure": figure})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [{**result, "unit": "s"} for result in results] + [
        {"what": "peak memory of that process", "figure": peak, "unit": "GiB"}
    ]


if __name__ == "__main__":
    sys.exit(main())
