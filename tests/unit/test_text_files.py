"""Files to documents, and what is wrong with them."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.data import text_files
from megatron_moe.data.text_files import (
    Format,
    Position,
    Problem,
    Reader,
    Reading,
    TextFile,
    describe,
    find_text_files,
    text_of,
)

TEXTS = [f"document {i} ☃ " * (i % 4) for i in range(40)]


def read(*names: Path | str, **reading: object) -> list[str | Problem]:
    reading = Reading(**reading)
    sources = find_text_files(map(str, names))
    records = Reader(sources, reading).records()
    return [text_of(record, sources[record.source].format, reading.field) for record in records]


def complaints(*names: Path | str, **reading: object) -> list[tuple[str, str]]:
    """Of what is wrong, the kind and the whole message."""
    reading = Reading(**reading)
    sources = find_text_files(map(str, names))
    found = []
    for record in Reader(sources, reading).records():
        problem = text_of(record, sources[record.source].format, reading.field)
        if isinstance(problem, Problem):
            found.append((problem.kind, describe(sources, record, problem)))
    return found


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def in_two(compress, data: bytes) -> bytes:
    return compress(data[:333]) + compress(data[333:])


def parquet(path: Path, column: object, name: str = "text", **options: object) -> Path:
    pq.write_table(pa.table({name: column}), path, **options)
    return path


@pytest.mark.parametrize(
    ("ending", "compress"),
    [
        ("", lambda data: data),
        ("", lambda data: b"\xef\xbb\xbf" + data),
        ("", lambda data: data.replace(b"\n", b"\r\n")),
        ("", lambda data: data.replace(b"\n", b"\n \t\n")),
        ("", lambda data: data.removesuffix(b"\n")),
        (".gz", gzip.compress),
        (".gz", lambda data: in_two(gzip.compress, data)),
        (".zst", zstd),
        (".zst", lambda data: in_two(zstd, data)),
    ],
)
def test_json_lines_hold_their_documents(tmp_path: Path, ending: str, compress) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(compress(json_lines(TEXTS)))
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([text.encode() for text in TEXTS]),
    ],
)
def test_parquet_holds_its_documents(tmp_path: Path, column: pa.Array) -> None:
    assert read(parquet(tmp_path / "a.parquet", column, row_group_size=7)) == TEXTS


def test_text_is_taken_by_file_or_by_line(tmp_path: Path) -> None:
    lines = "first\r\n\n  second \nthird\r\r\nlast"
    (tmp_path / "a.txt").write_bytes(lines.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("☃\n".encode()))
    assert read(tmp_path) == [lines, "☃\n"]
    assert read(tmp_path, text_lines=True) == ["first", "  second ", "third\r", "last", "☃"]


def test_another_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}')
    assert read(tmp_path, field="body") == ["x"]
    assert read(parquet(tmp_path / "b.parquet", ["z"], "body"), field="body") == ["z"]


def test_halves_of_surrogate_pairs_are_characters_only_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude00"}' + "\n" + r'{"text": "ab\ud800"}')
    assert read(tmp_path)[0] == "😀"
    reason = f"{tmp_path}/a.jsonl:2: field 'text' holds half of a surrogate pair, '\\ud800' at character 2"
    assert complaints(tmp_path) == [("not UTF-8", reason)]


def test_a_folder_is_read_at_any_depth_in_order(tmp_path: Path) -> None:
    for name in ["b/2.jsonl", "b/1.txt", "a.ndjson", "b/c/3.json", "z.parquet"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in [".hidden.jsonl", ".git/x.jsonl", "b/notes.md", "b/a.jsonl.bz2"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_text_files([str(tmp_path)])
    assert [str(s.path.relative_to(tmp_path)) for s in found] == [
        "a.ndjson", "b/1.txt", "b/2.jsonl", "b/c/3.json", "z.parquet"
    ]  # fmt: skip
    assert [s.format for s in found] == [Format.jsonl, Format.text, Format.jsonl, Format.jsonl, Format.parquet]


def test_patterns_and_files_are_taken_in_the_order_given(tmp_path: Path) -> None:
    for name in ["b.jsonl", "a.jsonl", "c/d.jsonl", "e.data"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*inputs: str, **options: Format) -> list[str]:
        found = find_text_files([f"{tmp_path}/{name}" for name in inputs], **options)
        return [str(source.path.relative_to(tmp_path)) for source in found]

    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "c/d.jsonl"]
    assert names("c", "[ab].jsonl") == ["c/d.jsonl", "a.jsonl", "b.jsonl"]
    assert names("e.data", format=Format.text) == ["e.data"]


def test_a_name_that_looks_like_a_pattern_is_a_file_first(tmp_path: Path) -> None:
    (tmp_path / "[a].jsonl").write_text('{"text": "x"}')
    assert read(tmp_path / "[a].jsonl") == ["x"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.jsonl", "missing.jsonl: no such file or folder"),
        ("missing/*.jsonl", r"missing/\*.jsonl: no such file or folder, and no file matches it"),
        ("folder", "folder: holds no text: no file that ends in .jsonl"),
        ("folder/a.bz2", "folder/a.bz2: unknown ending; --format says what it holds"),
        ("folder/a.parquet.gz", "folder/a.parquet.gz: unknown ending"),
    ],
)
def test_inputs_without_text_are_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.bz2").touch()
    (tmp_path / "folder" / "a.parquet.gz").touch()
    with pytest.raises(ConfigError, match=reason):
        find_text_files([str(tmp_path / name)])


def test_a_file_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"a\.txt: is named twice"):
        find_text_files([str(tmp_path), f"{tmp_path}/../{tmp_path.name}/a.txt"])


def test_all_missing_inputs_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        find_text_files([f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"])
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        (b"{", "broken JSON", "broken JSON: Expecting property name"),
        (b"[" * 100_000, "broken JSON", "broken JSON: maximum recursion depth"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "broken JSON", "broken JSON: Exceeds the limit"),
        (b'"text"', "wrong type", "a JSON str where an object with the field 'text' is due"),
        (b"{}", "missing field", "no field 'text' (--field); there are none"),
        (b'{"body": "x"}', "missing field", "no field 'text' (--field); there are 'body'"),
        (b'{"text": 3}', "wrong type", "field 'text' is int, not text"),
        (b'{"text": null}', "wrong type", "field 'text' is NoneType, not text"),
        (b'{"text": "\xff"}', "not UTF-8", "not UTF-8: invalid start byte at byte 10"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8", "not UTF-8: invalid continuation byte at byte 10"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, kind: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    [(found, message)] = complaints(tmp_path)
    assert found == kind
    assert message.startswith(f"{tmp_path}/a.jsonl:3: {reason}")
    assert read(tmp_path).count("fine") == 2


@pytest.mark.parametrize(
    ("column", "kind", "reason"),
    [
        (pa.array(["fine", None]), "wrong type", "2: field 'text' is NoneType, not text"),
        (pa.array([b"fine", b"\xff"]), "not UTF-8", "2: not UTF-8: invalid start byte at byte 0"),
        (pa.array([b"fine", b"\xff"]).view(pa.string()), "not UTF-8", "2: not UTF-8: invalid start byte at byte 0"),
        (pa.array([7]), "wrong type", "1: field 'text' is int, not text"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, column: pa.Array, kind: str, reason: str) -> None:
    path = parquet(tmp_path / "a.parquet", column)
    assert complaints(path) == [(kind, f"{path}:{reason}")]


def test_a_parquet_file_without_the_column_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", TEXTS, "body")
    assert complaints(path) == [("missing field", f"{path}: no column 'text' (--field); there are body")]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"])
def test_an_empty_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.touch()
    assert complaints(path) == [("empty file", f"{path}: holds no text")]


def test_files_without_records_are_empty_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n \n"))
    parquet(tmp_path / "b.parquet", pa.array([], pa.string()))
    assert [kind for kind, _ in complaints(tmp_path)] == ["empty file"] * 2


@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("cut", [1, 9, 500])
def test_a_truncated_file_is_read_up_to_the_cut(tmp_path: Path, ending: str, compress, cut: int) -> None:
    texts = [f"{i} {i * i} {i * 7919 % 10007}" for i in range(20_000)]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(in_two(compress, json_lines(texts))[:-cut])
    (tmp_path / "b.jsonl").write_text('{"text": "next"}')
    *found, problem, after = read(tmp_path)
    assert found == texts[: len(found)]
    assert len(found) > 13_000
    assert after == "next"
    assert complaints(tmp_path) == [("damaged file", f"{path}:{len(found) + 1}: Truncated compressed stream")]
    assert isinstance(problem, Problem)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.jsonl.gz", "zlib inflate failed: incorrect header check"),
        ("a.jsonl.zst", "ZSTD decompress failed: Unknown frame descriptor"),
        ("a.parquet", "Parquet magic bytes not found in footer"),
    ],
)
def test_garbage_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(b"garbage " * 10)
    [(kind, message)] = complaints(tmp_path / name)
    assert kind == "damaged file"
    assert message.startswith(f"{tmp_path}/{name}:1: {reason}")


def test_a_parquet_file_with_a_hole_is_read_up_to_it(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", TEXTS, row_group_size=10, compression="gzip", use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    *found, problem = read(path)
    assert found == TEXTS[:20]
    assert problem.kind == "damaged file"


def test_what_the_system_refuses_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')

    def refuse(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(text_files, "_lines", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        read(tmp_path)


def test_what_is_too_long_is_named_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 2**20)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1)
    line = b'{"text": "%s"}'
    most = line % (b"x" * (2**20 - len(line) + 1)) + b"\n"
    lines = [most, most.replace(b"xx", b"xxx", 1), line % (b"x" * 2**22) + b"\n", line % b"end"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "b.txt").write_bytes(b"x" * (2**20 + 1))
    assert complaints(tmp_path) == [
        ("too long", f"{tmp_path}/{place}: longer than 1 MiB") for place in ("a.jsonl:2", "a.jsonl:3", "b.txt:1")
    ]
    assert [len(text) for text in read(tmp_path) if isinstance(text, str)] == [2**20 - len(line) + 1, 3]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet"])
def test_reading_goes_on_where_any_block_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 100)
    monkeypatch.setattr(text_files, "UNCOMPRESSED_BYTES", 64)
    compress = {"gz": gzip.compress, "st": zstd}.get(name[-2:], bytes)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        if name == "a.parquet":
            parquet(tmp_path / folder / name, TEXTS, row_group_size=7)
        else:
            (tmp_path / folder / name).write_bytes(compress(json_lines(TEXTS)))
    (tmp_path / "two" / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS * 9))[:-1])
    sources = find_text_files([str(tmp_path)])
    reading = Reading(text_lines=True)
    blocks = list(Reader(sources, reading).blocks())
    assert len(blocks) > 10
    for number, (_, end) in enumerate(blocks):
        assert list(Reader(sources, reading, end).blocks()) == blocks[number + 1 :]


def test_positions_tell_the_bytes_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 500)
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    parquet(tmp_path / "b.parquet", TEXTS, row_group_size=5)
    (tmp_path / "c.txt").write_text("x")
    sources = find_text_files([str(tmp_path)])
    ends = [end for _, end in Reader(sources, Reading()).blocks()]
    read_so_far = [end.bytes_read for end in ends]
    assert read_so_far == sorted(read_so_far)
    assert len(set(read_so_far)) > 3
    assert ends[-1] == Position(3, bytes_read=sum(source.path.stat().st_size for source in sources))


def test_the_format_given_wins_over_the_ending(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(json_lines(TEXTS)))
    [source] = find_text_files([str(tmp_path / "a.txt.gz")], Format.jsonl)
    assert source == TextFile(tmp_path / "a.txt.gz", Format.jsonl)
    assert [text_of(r, source.format, "text") for r in Reader([source], Reading()).records()] == TEXTS


def test_records_without_text_fill_blocks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 10_000)
    parquet(tmp_path / "a.parquet", pa.array([None] * 500, pa.string()))
    (tmp_path / "b.txt").write_text("x\n" * 500)
    sources = find_text_files([str(tmp_path)])
    blocks = [records for records, _ in Reader(sources, Reading(text_lines=True)).blocks()]
    assert sum(map(len, blocks)) == 1000
    assert max(map(len, blocks)) <= 100
