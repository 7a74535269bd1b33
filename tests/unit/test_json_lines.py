"""The file of metrics: whole lines, whatever happens."""

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_moe.metrics.json_lines import JsonLines, drop_after


class FullDisk:
    """A file on a disk with `room` bytes left, after which it raises, or, as disks mostly do, writes a part."""

    def __init__(self, file, room: int, *, in_part: bool) -> None:
        self.file, self.room, self.in_part = file, room, in_part
        self.name = file.name

    def write(self, data: bytes) -> int:
        if len(data) > self.room and not self.in_part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data[: self.room])

    def truncate(self, size: int) -> None:
        self.file.truncate(size)


@pytest.mark.parametrize("in_part", [True, False])
def test_a_full_disk_loses_no_line(tmp_path: Path, capsys: pytest.CaptureFixture, in_part: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1})
    disk, lines._file = lines._file, FullDisk(lines._file, 17, in_part=in_part)
    lines.write({"step": 2, "loss": 3.0})
    lines.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n'  # and no half a line
    assert capsys.readouterr().err == f"warning: {path}: No space left on device; it goes on when it can be written\n"
    lines._file = disk
    lines.write({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_later_steps_and_lines_that_were_cut_off_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert drop_after(path, 3) == 0
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3}\nnonsense\n[2]\n{"step": 4}\n{"step": 2}')
    assert drop_after(path, 3) == 4
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_json_has_no_number_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        JsonLines(tmp_path / "x").write({"loss": float("nan")})
