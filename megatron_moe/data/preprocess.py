"""Tokenizing files in parallel; what was done survives a kill. Imports no torch, which each worker would load.

Blocks of records go to worker processes and come back in order, so that the output does not depend on the workers.
After each, `OUTPUT.partial/progress.json` says up to where the files there are whole.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from megatron_moe.config.errors import ConfigError
from megatron_moe.data.encode import Encoder
from megatron_moe.data.indexed import IndexedWriter, Manifest, read_manifest, sha256_of, with_ending
from megatron_moe.data.text_files import START, Position, Problem, Reader, Reading, Record, TextFile, describe, text_of
from megatron_moe.data.tokenizer import load_tokenizer
from megatron_moe.files import write_json

ENDINGS = ("bin", "idx", "tokenizer.json", "manifest.json")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to tokenize, and how.

    Attributes:
        sources: files, in order.
        reading: how they become documents.
        tokenizer: a tokenizer.json.
        end_of_document: id of the token after each document; None: nothing, and empty documents are left out.
        output: prefix of the dataset.
        skip: leave out records that are no document; else the first of them is an error.
        workers: processes.
    """

    sources: list[TextFile]
    reading: Reading
    tokenizer: Path
    end_of_document: int | None
    output: Path
    skip: bool = False
    workers: int = 1

    def identity(self) -> dict[str, Any]:
        """What the output follows from, as far as it is cheap to know."""
        return {
            "files": [[str(s.path), s.format.value, s.path.stat().st_size] for s in self.sources],
            "times of change": [s.path.stat().st_mtime_ns for s in self.sources],
            "tokenizer": sha256_of(self.tokenizer),
            "options": self.options(),
        }

    def options(self) -> dict[str, Any]:
        """Those that the output depends on."""
        return {**dataclasses.asdict(self.reading), "end_of_document": self.end_of_document}


@dataclass
class Progress:
    """What is done, and where to go on."""

    position: Position = START
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    largest_id: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, block: Block, ids: np.ndarray, lengths: np.ndarray, position: Position) -> None:
        """Count a block that ends at `position`."""
        self.position = position
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.text_bytes += block.text_bytes
        self.largest_id = max(self.largest_id, int(ids.max(initial=0)))
        self.skipped.update(block.skipped)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, vars(self))

    @staticmethod
    def load(path: Path) -> Progress:
        """As saved, or from the beginning."""
        if not path.exists():
            return Progress()
        values = json.loads(path.read_text(encoding="utf-8"))
        position, skipped = Position(*values.pop("position")), Counter(values.pop("skipped"))
        return Progress(position=position, skipped=skipped, **values)


@dataclass(frozen=True)
class Block:
    """Tokenized records, whose ids and lengths a worker has left in a file.

    Only this little comes through the pipe that all workers share, in one write: of a longer message, a worker that is
    killed could leave a part, for whose rest everyone would wait.
    """

    path: Path
    text_bytes: int
    skipped: Counter[str]
    first_problem: tuple[Record, Problem] | None

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths, whose file goes."""
        with np.load(self.path) as arrays:
            ids, lengths = arrays["ids"], arrays["lengths"]
        self.path.unlink()
        return ids, lengths


def preprocess(job: Job, report: Callable[[Progress], None]) -> Manifest:
    """Write the dataset `job.output`; go on with what an earlier, unfinished call left.

    Args:
        job: what to do.
        report: called with the progress.

    Raises:
        ConfigError: a record is no document, there is none, the output exists, is being written by another process, or
            was begun from other files or with other options.
    """
    partial = with_ending(job.output, "partial")
    if not partial.exists() and (manifest := _finished(job)) is not None:
        return manifest
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(partial / "lock", timeout=0):
            if _finished(job) is None:
                _check_begun(partial, job)
                if not (partial / "data.manifest.json").exists():
                    _write(partial, job, report)
            _publish(partial, job.output)
    except Timeout:
        raise ConfigError(f"{job.output}: another process is writing it") from None
    shutil.rmtree(partial, ignore_errors=True)  # after the lock in it is closed, which NFS asks for
    return read_manifest(job.output)


def _finished(job: Job) -> Manifest | None:
    """The dataset's manifest if it is the one asked for."""
    present = [path for ending in ENDINGS if (path := with_ending(job.output, ending)).exists()]
    manifest = read_manifest(job.output)  # the last file to appear
    if not present or (manifest is None and with_ending(job.output, "partial").exists()):
        return None
    same = (
        manifest is not None
        and manifest.options == job.options()
        and manifest.tokenizer_sha256 == sha256_of(job.tokenizer)
        and [source["path"] for source in manifest.sources] == [str(source.path) for source in job.sources]
        and all(
            there["bytes"] == here.path.stat().st_size and there["sha256"] == sha256_of(here.path)
            for there, here in zip(manifest.sources, job.sources, strict=True)
        )
    )
    if not same:
        raise ConfigError(
            f"{present[0]}: exists, made from other files or with other options; remove it or give another output"
        )
    return manifest


def _check_begun(partial: Path, job: Job) -> None:
    """Start over where nothing is lost by it; otherwise what was begun must be the same job."""
    file, identity = partial / "job.json", job.identity()
    begun = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if begun == identity:
        return
    if Progress.load(partial / "progress.json").documents:
        changed = ", ".join(key for key, value in identity.items() if begun.get(key) != value)
        raise ConfigError(
            f"{partial}: was begun with other {changed}; finish it with these, or remove the folder to start over"
        )
    for path in (partial / "progress.json", partial / "data.manifest.json"):
        path.unlink(missing_ok=True)
    write_json(file, identity)


def _write(partial: Path, job: Job, report: Callable[[Progress], None]) -> None:
    """All files of the dataset, the manifest last."""
    progress = Progress.load(partial / "progress.json")
    encoder = Encoder(load_tokenizer(job.tokenizer), job.end_of_document)
    writer = IndexedWriter(partial / "data", encoder.dtype, progress.documents, progress.tokens)
    report(progress)
    with _workers(job) as pool:
        for blocks in _tokenized(job, progress.position, pool, partial / "blocks"):
            problem = _append(blocks, writer, progress, skip=job.skip)
            writer.sync()
            progress.save(partial / "progress.json")
            report(progress)
            if problem is not None:
                raise _stopped(job, *problem, partial if progress.documents else None)
        digests = list(pool.map(sha256_of, (source.path for source in job.sources)))
    if progress.documents == 0:
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in progress.skipped.items())
        raise ConfigError(f"{', '.join(str(s.path) for s in job.sources[:3])}: no documents; left out: {left_out or 0}")
    writer.write_index()
    shutil.copyfile(job.tokenizer, partial / "data.tokenizer.json")
    manifest = _describe(partial, job, progress, encoder.vocab_size, digests)
    _check_begun(partial, job)  # once more: nothing has changed meanwhile
    manifest.write(partial / "data.manifest.json")


def _describe(partial: Path, job: Job, progress: Progress, vocab_size: int, digests: list[str]) -> Manifest:
    return Manifest.of(
        partial / "data",
        documents=progress.documents,
        tokens=progress.tokens,
        text_bytes=progress.text_bytes,
        largest_id=progress.largest_id,
        vocab_size=vocab_size,
        end_of_document=job.end_of_document,
        sources=[
            {"path": str(source.path), "bytes": source.path.stat().st_size, "sha256": digest}
            for source, digest in zip(job.sources, digests, strict=True)
        ],
        options=job.options(),
        skipped=dict(sorted(progress.skipped.items())),
    )


def _append(
    blocks: list[tuple[Block, Position]], writer: IndexedWriter, progress: Progress, *, skip: bool
) -> tuple[Record, Problem] | None:
    """Write and count blocks, up to the first with a problem, which is returned, unless these are skipped."""
    for block, position in blocks:
        if block.first_problem is not None and not skip:
            return block.first_problem
        ids, lengths = block.take()
        writer.append(ids, lengths)
        progress.add(block, ids, lengths, position)
    return None


def _stopped(job: Job, record: Record, problem: Problem, partial: Path | None) -> ConfigError:
    """The error, and what to do; `partial` holds what is done so far, if anything is."""
    text = f"{describe(job.sources, record, problem)}; --on-error skip leaves such records out and counts them"
    if partial is not None:
        text += f", and goes on with what {partial} holds; with the file repaired, remove that folder and start over"
    return ConfigError(text)


def _publish(partial: Path, output: Path) -> None:
    """Give the files their names, the manifest last; again, where a kill came between."""
    for ending in ENDINGS:
        if (path := partial / f"data.{ending}").exists():
            path.replace(with_ending(output, ending))


@contextmanager
def _workers(job: Job) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(job.workers, context, initializer=_start_worker, initargs=(job,))
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is the parent's to handle
        for _ in range(job.workers):
            pool.submit(int)
        signal.signal(signal.SIGINT, handler)
        yield pool
    except BrokenProcessPool:
        raise ConfigError(
            "a worker was killed, by the system when memory runs out; the same command goes on, and fewer --workers "
            "need less"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _tokenized(
    job: Job, start: Position, pool: ProcessPoolExecutor, folder: Path
) -> Iterator[list[tuple[Block, Position]]]:
    """Groups of finished blocks in order, each block with its end; their files are in `folder`."""
    folder.mkdir(exist_ok=True)
    reader = Reader(job.sources, job.reading, start)
    waiting: deque[tuple[Future[Block], Position]] = deque()
    for number, (records, end) in enumerate(reader.blocks()):
        waiting.append((pool.submit(_tokenize, records, folder / f"{number}.npz"), end))
        if len(waiting) > 2 * job.workers:
            yield _finished_blocks(waiting)
    while waiting:
        yield _finished_blocks(waiting)


def _finished_blocks(waiting: deque[tuple[Future[Block], Position]]) -> list[tuple[Block, Position]]:
    """The first, once it is done, and those after it that are."""
    done = []
    while waiting and (not done or waiting[0][0].done()):
        future, end = waiting.popleft()
        done.append((future.result(), end))
    return done


# In a worker process.
_job: Job
_encoder: Encoder


def _start_worker(job: Job) -> None:
    global _job, _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job, _encoder = job, Encoder(load_tokenizer(job.tokenizer), job.end_of_document)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenize(records: list[Record], path: Path) -> Block:
    texts, problems = [], []
    for record in records:
        text = text_of(record, _job.sources[record.source].format, _job.reading.field)
        if isinstance(text, Problem):
            problems.append((record._replace(payload=None), text))
        else:
            texts.append(text)
    ids, lengths = _encoder(texts)
    np.savez(path, ids=ids, lengths=lengths[lengths > 0])
    return Block(
        path,
        text_bytes=sum(len(text.encode()) for text in texts),
        skipped=Counter(problem.kind for _, problem in problems),
        first_problem=problems[0] if problems else None,
    )
