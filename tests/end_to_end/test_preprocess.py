"""Preprocessing as a user sees it, by functions in this process."""

import gzip
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from megatron_moe.data import indexed, preprocess, text_files
from megatron_moe.data.encode import Encoder
from megatron_moe.data.indexed import read_manifest, sha256_of
from megatron_moe.data.preprocess import Job, Progress
from megatron_moe.data.text_files import Position
from megatron_moe.data.tokenizer import load_tokenizer, train_tokenizer
from tools import preprocess_data
from tools.preprocess_data import ProgressDisplay, main, rates

TEXTS = [f"The number {i} is followed by {i + 1}, and {i * i} is its square.\n" * (i % 5) for i in range(200)]
ENDINGS = ("bin", "idx", "manifest.json", "tokenizer.json")
TOKENIZER = train_tokenizer(TEXTS, 270).to_str()


class KilledError(BaseException):
    """As SIGKILL, nothing handles it."""


def write_json_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def files_of(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{ending}").read_bytes() for ending in ENDINGS]


class Immediately(Executor):
    """Does what it is asked while the other waits."""

    def submit(self, function: Callable, /, *args: object) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


submit = Immediately.submit


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a tokenizer and documents; there are no other processes, and blocks are small."""

    @contextmanager
    def no_workers(job: Job) -> Iterator[Executor]:
        encoder = Encoder(load_tokenizer(job.tokenizer), job.end_of_document)
        monkeypatch.setattr(preprocess, "_job", job, raising=False)
        monkeypatch.setattr(preprocess, "_encoder", encoder, raising=False)
        yield Immediately()

    monkeypatch.setattr(preprocess, "_workers", no_workers)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1000)
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path / "docs.jsonl", TEXTS)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    return tmp_path


def run(*arguments: str, output: str = "out") -> int:
    """The command's exit code."""
    source = [] if "--input" in arguments else ["--input", "docs.jsonl"]
    return main([*source, "--tokenizer", "tokenizer.json", "--output", output, "--workers", "1", *arguments])


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command until it would change files for the n-th time; tells how often it did."""
    count = last = 0
    opened, open_at = [], indexed._open_at
    monkeypatch.setattr(indexed, "_open_at", lambda *args: opened.append(open_at(*args)) or opened[-1])

    def before(function: Callable, *, is_done: bool = True) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == last:
                for file in opened:
                    file.raw.close()  # what it still buffers is lost
                raise KilledError
            return function(*args, **kwargs) if is_done else None

        return wrapper

    monkeypatch.setattr(os, "fsync", before(os.fsync, is_done=False))
    for module, names in ((os, ("replace", "unlink", "rmdir", "mkdir")), (shutil, ("copyfile",))):
        for name in names:
            monkeypatch.setattr(module, name, before(getattr(module, name)))

    def run_until(number: int, command: Callable[[], int] = run) -> int:
        nonlocal count, last
        count, last = 0, number
        with suppress(KilledError):
            assert command() == 0
        last = 0
        return count

    return run_until


def test_every_format_gives_the_same_files(folder: Path) -> None:
    texts = [text.strip().replace("\n", " ") for text in TEXTS if text]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    (folder / "docs.jsonl").write_bytes(b"".join(lines))
    (folder / "docs.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:50])) + gzip.compress(b"".join(lines[50:])))
    halves = [pa.compress(b"".join(part), codec="zstd", asbytes=True) for part in (lines[:50], lines[50:])]
    (folder / "docs.jsonl.zst").write_bytes(b"".join(halves))
    pq.write_table(pa.table({"text": texts}), "docs.parquet", row_group_size=30)
    (folder / "lines.txt").write_text("\n".join(texts))
    for number, text in enumerate(texts):
        path = folder / "files" / str(number // 50) / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    inputs = ["docs.jsonl", "docs.jsonl.gz", "docs.jsonl.zst", "docs.parquet", "lines.txt", "files", "files/*/*.txt"]
    digests = set()
    for number, name in enumerate(inputs):
        options = ["--text-lines"] if name == "lines.txt" else []
        assert run("--input", name, *options, output=f"out{number}") == 0
        manifest = read_manifest(f"out{number}")
        assert manifest.documents == len(texts)
        digests.add((manifest.bin_sha256, manifest.idx_sha256, manifest.text_bytes))
    assert len(digests) == 1


def test_the_manifest_tells_what_there_is(folder: Path) -> None:
    write_json_lines(folder / "more.jsonl", ["one", "two"])
    assert run("--input", "docs.jsonl", "more.jsonl") == 0
    manifest = read_manifest("out")
    texts = [*TEXTS, "one", "two"]
    ids, lengths = Encoder(load_tokenizer(folder), manifest.end_of_document)(texts)
    assert (folder / "out.bin").read_bytes() == ids.tobytes()
    assert (manifest.documents, manifest.tokens) == (len(lengths), len(ids))
    assert manifest.text_bytes == sum(map(len, texts))
    assert (manifest.largest_id, manifest.vocab_size, manifest.end_of_document) == (max(ids), 270, 1)
    assert manifest.bin_sha256 == sha256_of(folder / "out.bin")
    assert manifest.idx_sha256 == sha256_of(folder / "out.idx")
    assert manifest.tokenizer_sha256 == sha256_of(folder / "out.tokenizer.json") == sha256_of(folder / "tokenizer.json")
    assert manifest.sources == [
        {"path": name, "bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in ("docs.jsonl", "more.jsonl")
    ]
    assert manifest.options == {"field": "text", "text_lines": False, "end_of_document": 1}
    assert manifest.skipped == {}


def test_without_a_token_at_the_end_empty_documents_are_none(folder: Path) -> None:
    assert run("--end-of-document", "none") == 0
    assert read_manifest("out").documents == sum(map(bool, TEXTS))


def test_a_kill_at_any_change_of_files_leaves_what_the_same_command_finishes(
    folder: Path, kill: Callable[[int], int]
) -> None:
    steps = kill(0)
    expected = files_of(folder / "out")
    assert steps > 40
    for step in range(1, steps + 1):
        for path in folder.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        kill(step)
        kill(max(1, step // 2))
        assert run() == 0, step
        assert files_of(folder / "out") == expected, step
        assert len(list(folder.glob("out*"))) == len(ENDINGS), step


def test_finished_blocks_are_not_tokenized_again(
    folder: Path, kill: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized, tokenize = [], preprocess._tokenize
    monkeypatch.setattr(
        preprocess,
        "_tokenize",
        lambda records, path: tokenized.extend(r.number for r in records) or tokenize(records, path),
    )
    steps = kill(0)
    assert tokenized == list(range(1, len(TEXTS) + 1))
    for path in folder.glob("out*"):
        path.unlink()
    kill(steps // 2)
    progress = Progress.load(folder / "out.partial" / "progress.json")
    assert 0 < progress.position.number == progress.documents < len(TEXTS)
    tokenized.clear()
    assert run() == 0
    assert tokenized == list(range(progress.documents + 1, len(TEXTS) + 1))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: (folder / "docs.jsonl").open("a").write("\n"), "files, times of change"),
        (lambda folder: os.utime(folder / "docs.jsonl", (1, 1)), "times of change"),
        (lambda folder: (folder / "tokenizer.json").write_text(TOKENIZER + "\n"), "tokenizer"),
        (lambda folder: ["--end-of-document", "none"], "options"),
        (lambda folder: ["--field", "body"], "options"),
        (lambda folder: ["--input", "docs.jsonl", "tokenizer.json"], "files, times of change"),
    ],
)
def test_another_job_does_not_go_on_with_this_one(
    folder: Path, kill: Callable[[int], int], capsys: pytest.CaptureFixture[str], change, what: str
) -> None:
    kill(40)
    assert (folder / "out.partial" / "progress.json").exists()
    options = change(folder)
    assert run(*(options if isinstance(options, list) else [])) == 2
    message = f"error: out.partial: was begun with other {what}; finish it with these, or remove the folder"
    assert message in capsys.readouterr().err


def test_input_that_changes_meanwhile_is_noticed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda *args: (os.utime("docs.jsonl", (1, 1)), copy(*args))[1])
    assert run() == 2
    assert "was begun with other times of change" in capsys.readouterr().err
    assert not (folder / "out.manifest.json").exists()


def test_an_unfinished_start_may_become_another_job(folder: Path) -> None:
    (folder / "docs.jsonl").write_text("{")
    assert run() == 2
    write_json_lines(folder / "docs.jsonl", TEXTS)
    assert run() == 0
    assert read_manifest("out").documents == len(TEXTS)


def test_two_processes_do_not_write_one_dataset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out.partial").mkdir()
    with FileLock("out.partial/lock"):
        assert run() == 2
    assert "error: out: another process is writing it" in capsys.readouterr().err
    assert run() == 0


def test_a_finished_dataset_is_left_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    said = capsys.readouterr().out
    assert said.startswith("out: 200 documents, ")
    before = [(folder / f"out.{ending}").stat().st_mtime_ns for ending in ENDINGS]
    assert run() == 0
    assert capsys.readouterr().out == said
    assert [(folder / f"out.{ending}").stat().st_mtime_ns for ending in ENDINGS] == before
    assert not (folder / "out.partial").exists()


def test_the_output_may_lie_among_the_input(folder: Path, kill: Callable[[int], int]) -> None:
    (folder / "in").mkdir()
    (folder / "docs.jsonl").rename(folder / "in" / "docs.jsonl")
    (folder / "in" / "out.jsonl").write_text('{"text": "one more"}')
    arguments = ("--input", "in")

    def begin() -> int:
        return run(*arguments, output="in/out")

    assert run(*arguments, output="elsewhere") == 0
    assert kill(40, begin) == 40
    assert (folder / "in" / "out.partial" / "progress.json").exists()
    for _ in range(2):
        assert begin() == 0
        assert files_of(folder / "in" / "out") == files_of(folder / "elsewhere")


@pytest.mark.parametrize(
    "options", [["--input", "other.jsonl"], ["--end-of-document", "none"], ["--tokenizer", "other.json"]]
)
def test_a_dataset_of_another_job_is_not_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    write_json_lines(folder / "other.jsonl", ["other"])
    train_tokenizer(["other"], 260).save("other.json")
    assert run() == 0
    expected = files_of(folder / "out")
    assert run(*options) == 2
    assert "error: out.bin: exists, made from other files or with other options; remove it" in capsys.readouterr().err
    assert files_of(folder / "out") == expected


def test_a_dataset_of_unknown_origin_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out.idx").write_text("precious")
    assert run() == 2
    assert "error: out.idx: exists" in capsys.readouterr().err
    assert (folder / "out.idx").read_text() == "precious"


def spoil(folder: Path) -> None:
    """Records that are no documents, far apart."""
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[90:90] = ["{", '{"text": 3}']
    lines[150] = "{]"
    (folder / "docs.jsonl").write_text("\n".join(lines))


def test_after_a_stop_skipping_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(folder)
    assert run("--on-error", "skip", output="other") == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("other: 199 documents, ")
    assert last_line.endswith("of text; left out: 2 broken JSON, 1 wrong type")
    assert run() == 2
    stopped = capsys.readouterr()
    assert stopped.err.startswith("error: docs.jsonl:91: broken JSON: Expecting property name")
    assert "; --on-error skip leaves such records out and counts them, and goes on with what out.partial holds" in (
        stopped.err
    )
    assert Progress.load(folder / "out.partial" / "progress.json").documents > 0
    assert run("--on-error", "skip") == 0
    assert files_of(folder / "out") == files_of(folder / "other")
    assert read_manifest("out").skipped == {"broken JSON": 2, "wrong type": 1}


def test_what_is_skipped_is_counted_by_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder / "source"
    source.mkdir()
    lines = [b"[]", b'{"body": 1}', b'{"text": null}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": "fine"}']
    (source / "a.jsonl").write_bytes(b"\n".join(lines))
    (source / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "lost"}')[:-4])
    (source / "c.parquet").write_bytes(b"garbage" * 9)
    (source / "d.txt").touch()
    pq.write_table(pa.table({"body": ["x"]}), source / "e.parquet")
    assert run("--input", "source", "--on-error", "skip") == 0
    counts = {"damaged file": 2, "empty file": 1, "missing field": 2, "not UTF-8": 2, "wrong type": 2}
    assert read_manifest("out").skipped == counts
    assert read_manifest("out").documents == 1
    told = "left out: 2 damaged file, 1 empty file, 2 missing field, 2 not UTF-8, 2 wrong type"
    assert capsys.readouterr().out.strip().endswith(told)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", "0"], "--workers=0: must be at least 1"),
        (["--end-of-document", "<nowhere>"], "tokenizer: has no end-of-sentence token <nowhere>"),
        (
            ["--tokenizer", "nowhere.json"],
            "tokenizer nowhere.json: is no tokenizer.json of Hugging Face tokenizers: No such file",
        ),
        (["--tokenizer", "docs.jsonl"], "tokenizer docs.jsonl: "),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--input", "docs.*", "--output", "docs.jsonl/out"], "Not a directory"),
        (["--input", "empty.jsonl"], "empty.jsonl: holds no text"),
        (["--input", "blank.jsonl", "--on-error", "skip"], "blank.jsonl: no documents"),
        (["--input", "cut.jsonl.gz"], "cut.jsonl.gz:1: Truncated compressed stream"),
    ],
)
def test_what_cannot_be_done_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "blank.jsonl").write_text("\n")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}')[:-1])
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert expected in said
    assert not list(folder.glob("out.[!p]*"))


# Progress.


def test_rates_are_those_between_two_moments() -> None:
    line = rates((100.0, 10, 20, 3_000_000), (110.0, 20_010, 4_000_020, 8_000_000), 20_000_000)
    assert line == "2,000 documents/s | 400,000 tokens/s | 0.5 MB/s | 24s left"
    assert rates((1.0, 0, 0, 0), (1.0, 0, 0, 0), 5) == "0 documents/s | 0 tokens/s | 0.0 MB/s | ? left"


def show_three_steps() -> None:
    with ProgressDisplay(1000) as display:
        for step in (5, 7, 10):  # an earlier call has read half of it
            display(Progress(Position(bytes_read=100 * step), documents=step, tokens=step))


def test_lines_tell_the_progress_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show_three_steps()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(preprocess_data, "SECONDS_BETWEEN_LINES", -1)
    show_three_steps()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["50%", "70%", "100%"]
    assert lines[0].endswith("? left")
    assert lines[2].endswith("0s left | computing digests")


def test_a_bar_shows_the_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)
    show_three_steps()
    assert "━━━━" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert "documents/s" in terminal.getvalue()


def test_what_comes_from_a_worker_is_written_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe takes 4096 bytes whole or not at all; a part of a message would stop everyone."""
    sent = []
    monkeypatch.setattr(Immediately, "submit", lambda *args: sent.append(submit(*args)) or sent[-1])
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 10**9)
    (folder / "docs.jsonl").write_text('{"text": "fine"}\n' + f'{{"{"x" * 500}": 1}}\n' * 5000)
    assert run("--on-error", "skip") == 0
    blocks = [future.result() for future in sent if isinstance(future.result(), preprocess.Block)]
    assert [block.skipped for block in blocks] == [{"missing field": 5000}]
    assert max(len(pickle.dumps(block)) for block in blocks) < 2000
