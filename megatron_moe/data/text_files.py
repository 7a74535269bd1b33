"""Documents in files: JSON Lines, Parquet and plain text, a block at a time. Imports no torch."""

from __future__ import annotations

import glob
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_moe.config.errors import ConfigError

BLOCK_BYTES = 4 * 2**20  # of records that are worked on together
RECORD_BYTES = 100  # what a record takes beside its text
MAX_RECORD_BYTES = 64 * 2**20  # a line or file beyond it is no document: it bounds memory
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
UNCOMPRESSED_BYTES = 2**14  # at once; as much is lost, at most, of what precedes damage


class Format(Enum):
    """What a file holds."""

    jsonl = "jsonl"
    parquet = "parquet"
    text = "text"


ENDINGS = {
    ".jsonl": Format.jsonl,
    ".ndjson": Format.jsonl,
    ".json": Format.jsonl,
    ".parquet": Format.parquet,
    ".txt": Format.text,
}

NO_TEXT = (".bin", ".idx", "manifest.json", "tokenizer.json", "tokenizer_config.json")


class TextFile(NamedTuple):
    """A file of documents."""

    path: Path
    format: Format


class Problem(NamedTuple):
    """Why a record is no document: one of few kinds, to count, and the reason, to read."""

    kind: str
    reason: str


class Record(NamedTuple):
    """A line, row or file that should hold a document.

    Attributes:
        source: its number.
        number: of the line or row in it, from 1.
        payload: bytes of a line, a file or a row's text, another value of a row, or what is wrong with it.
        end: where the next record begins in its file (uncompressed bytes, or rows); None: in the next file.
    """

    source: int
    number: int
    payload: Any
    end: int | None


class Position(NamedTuple):
    """Where to go on reading.

    Attributes:
        source: number of the file.
        offset: in it, in uncompressed bytes or rows.
        number: of lines or rows before it.
        bytes_read: of all files up to there, compressed as they are; for the progress.
    """

    source: int = 0
    offset: int = 0
    number: int = 0
    bytes_read: int = 0


START = Position()


@dataclass(frozen=True)
class Reading:
    """How files become documents.

    Attributes:
        field: of a JSON object or a Parquet row that holds the text.
        text_lines: whether each line of a plain-text file is a document; else each file is.
    """

    field: str = "text"
    text_lines: bool = False


def find_text_files(inputs: Iterable[str], format: Format | None = None) -> list[TextFile]:
    """The files that are named, lie in a named folder at any depth, or match a pattern, in a fixed order.

    Args:
        inputs: paths of files and folders, and glob patterns.
        format: of all of them; None: by their endings, and a folder's other files are left out.

    Raises:
        ConfigError: with one line per input that names no text, and per file that is named twice.
    """
    sources, problems = [], []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.is_file() and not _is_left_out(p.relative_to(path))]
            found = [TextFile(p, f) for p in sorted(files) if (f := format or _format_of(p))]
            problem = f"{name}: holds no text: no file that ends in {_endings()}"
        else:
            matching = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
            matches = [path] if path.is_file() else [p for p in map(Path, matching) if not _is_left_out(Path(p.name))]
            found = [TextFile(p, format or _format_of(p)) for p in matches if p.is_file()]
            problem = f"{name}: no such file or folder, and no file matches it"
        if unknown := [s.path for s in found if s.format is None]:
            problem = f"{unknown[0]}: unknown ending; --format says what it holds, or one of {_endings()}"
            found = []
        sources += found
        problems += [] if found else [problem]
    paths = [source.path.resolve() for source in sources]
    problems += [f"{path}: is named twice" for path, count in Counter(paths).items() if count > 1]
    if problems:
        raise ConfigError(*problems)
    return sources


def _is_left_out(path: Path) -> bool:
    """Whether it is hidden, or of a dataset or tokenizer that lies among the text."""
    return (
        any(part.startswith(".") for part in path.parts)
        or any(part.endswith(".partial") for part in path.parts[:-1])
        or path.name.endswith(NO_TEXT)
    )


def _format_of(path: Path) -> Format | None:
    if path.suffix not in COMPRESSION:
        return ENDINGS.get(path.suffix)
    inner = ENDINGS.get(path.with_suffix("").suffix)
    return None if inner is Format.parquet else inner


def _endings() -> str:
    return f"{', '.join(ENDINGS)} (and, but for .parquet, {' or '.join(COMPRESSION)} after it)"


class Reader:
    """Blocks of records of many files."""

    def __init__(self, sources: list[TextFile], reading: Reading, start: Position = START) -> None:
        self.sources = sources
        self.reading = reading
        self.start = start
        sizes = (source.path.stat().st_size for source in sources)
        self.before = list(itertools.accumulate(sizes, initial=0))  # bytes of the files before each
        self.bytes_read = start.bytes_read

    def blocks(self) -> Iterator[tuple[list[Record], Position]]:
        """Some records, and where the next block begins. The same blocks from wherever one of them begins."""
        block, size = [], 0
        for record in self.records():
            block.append(record)
            size += RECORD_BYTES + (len(record.payload) if isinstance(record.payload, bytes | str) else 0)
            if size >= BLOCK_BYTES:
                yield block, self._after(record)
                block, size = [], 0
        if block:
            yield block, self._after(block[-1])

    def _after(self, record: Record) -> Position:
        if record.end is None:
            return Position(record.source + 1, bytes_read=self.before[record.source + 1])
        return Position(record.source, record.end, record.number, self.bytes_read)

    def records(self) -> Iterator[Record]:
        """All records from the start on; a file that cannot be read further ends in a problem."""
        for number in range(self.start.source, len(self.sources)):
            start = self.start if number == self.start.source else Position(number)
            yield from self._records_of(start, self.before[number])

    def _records_of(self, start: Position, before: int) -> Iterator[Record]:
        from pyarrow import ArrowException

        record = None
        try:
            for record in self._readable_records(self.sources[start.source], start, before):
                yield record
        except (OSError, ArrowException) as error:
            if getattr(error, "errno", None):  # the system's word: another try may well succeed
                raise
            line = 1 + (record.number if record else start.number)
            record = Record(start.source, line, Problem("damaged file", _first_line(error)), None)
            yield record
        if record is None and start.number == 0:
            yield Record(start.source, 0, Problem("empty file", "holds no text"), None)

    def _readable_records(self, source: TextFile, start: Position, before: int) -> Iterator[Record]:
        if source.format is Format.parquet:
            yield from self._rows(source, start, before)
            return
        with source.path.open("rb") as raw, _uncompressed(source.path, raw) as file:
            if source.format is Format.text and not self.reading.text_lines:
                if whole := _read_whole(file):
                    yield Record(start.source, 1, whole, None)
                return
            _skip_to(file, start.offset)
            for record in _lines(file, start):
                self.bytes_read = before + raw.tell()
                yield record

    def _rows(self, source: TextFile, start: Position, before: int) -> Iterator[Record]:
        import pyarrow.parquet as pq

        row, size, field = 0, source.path.stat().st_size, self.reading.field
        with pq.ParquetFile(source.path, buffer_size=2**20) as file:
            if field not in file.schema_arrow.names:
                reason = f"no column {field!r} (--field); there are {', '.join(file.schema_arrow.names)}"
                yield Record(start.source, 0, Problem("missing field", reason), None)
                return
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if row + num_rows <= start.offset:
                    row += num_rows
                    continue
                for batch in file.iter_batches(32, row_groups=[group], columns=[field]):
                    for value in _bytes_of_text(batch.column(0)).to_pylist():
                        row += 1
                        if row > start.offset:
                            self.bytes_read = before + size * row // file.metadata.num_rows
                            yield Record(start.source, row, value, row)


def _bytes_of_text(column: Any) -> Any:
    """Texts need not be UTF-8, which a worker finds out."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return column.cast(pa.large_binary()) if is_text else column


def _uncompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix not in COMPRESSION:
        return raw
    import pyarrow

    # pyarrow says so when a compressed file is cut off.
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, COMPRESSION[path.suffix]), UNCOMPRESSED_BYTES)


def _skip_to(file: BinaryIO, offset: int) -> None:
    if file.seekable():
        file.seek(offset)
        return
    while offset and (data := file.read(min(offset, 2**20))):
        offset -= len(data)


def _read_whole(file: BinaryIO) -> bytes | Problem:
    data = file.read(MAX_RECORD_BYTES + 1)
    return _too_long() if len(data) > MAX_RECORD_BYTES else data


def _lines(file: BinaryIO, start: Position) -> Iterator[Record]:
    """Blank lines are no records."""
    offset, number = start.offset, start.number
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        offset += len(line)
        too_long = len(line) > MAX_RECORD_BYTES
        while too_long and not line.endswith(b"\n") and (line := file.readline(2**20)):
            offset += len(line)
        if too_long:
            yield Record(start.source, number, _too_long(), offset)
        elif line.strip():
            yield Record(start.source, number, line, offset)


def _too_long() -> Problem:
    return Problem("too long", f"longer than {MAX_RECORD_BYTES // 2**20} MiB")


def text_of(record: Record, format: Format, field: str) -> str | Problem:
    """The document of a record, or what is wrong with it."""
    value = record.payload
    if isinstance(value, Problem):
        return value
    if isinstance(value, bytes):
        if len(value) > MAX_RECORD_BYTES:
            return _too_long()
        has_mark = record.number == 1 and format is not Format.parquet
        try:
            value = value.decode("utf-8-sig" if has_mark else "utf-8")
        except UnicodeDecodeError as error:
            return Problem("not UTF-8", f"not UTF-8: {error.reason} at byte {error.start}")
        if format is Format.text:
            return value.removesuffix("\n").removesuffix("\r") if record.end is not None else value
        if format is Format.jsonl:
            value = _field_of(value, field)
    return _checked(value, field)


def _field_of(line: str, field: str) -> Any:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        return Problem("broken JSON", f"broken JSON: {what}; each line must be one JSON object")
    if not isinstance(parsed, dict):
        return Problem("wrong type", f"a JSON {type(parsed).__name__} where an object with the field {field!r} is due")
    if field not in parsed:
        return Problem(
            "missing field", f"no field {field!r} (--field); there are {', '.join(map(repr, parsed)) or 'none'}"[:200]
        )
    return parsed[field]


def _checked(value: Any, field: str) -> str | Problem:
    if isinstance(value, Problem):
        return value
    if not isinstance(value, str):
        return Problem("wrong type", f"field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell halves of characters, which no tokenizer takes
        half = f"{value[error.start]!a} at character {error.start}"
        return Problem("not UTF-8", f"field {field!r} holds half of a surrogate pair, {half}")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def describe(sources: list[TextFile], record: Record, problem: Problem) -> str:
    """A problem with its place: file, line and reason."""
    line = f":{record.number}" if record.number else ""
    return f"{sources[record.source].path}{line}: {problem.reason}"


def documents(sources: list[TextFile], reading: Reading, *, skip: bool, skipped: Counter[str]) -> Iterator[str]:
    """All documents, one by one.

    Args:
        sources: files, in order.
        reading: how they become documents.
        skip: leave out records that are no document, and count them in `skipped` by kind of problem.
        skipped: changed.

    Raises:
        ConfigError: a record is no document, and `skip` is not given.
    """
    for record in Reader(sources, reading).records():
        text = text_of(record, sources[record.source].format, reading.field)
        if isinstance(text, str):
            yield text
        elif skip:
            skipped[text.kind] += 1
        else:
            raise ConfigError(f"{describe(sources, record, text)}; --on-error skip leaves such records out")
