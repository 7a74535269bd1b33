"""The bar below the lines of a run, as a terminal would show it."""

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from megatron_moe.metrics import terminal
from megatron_moe.metrics.terminal import TerminalBar, is_terminal

SPEED = {"speed/step_time_s": 0.6, "speed/tokens_per_second": 2394.4}
COLOR = r"\x1b\[[0-9;]*\b[34]8[;m]|\x1b\[[0-9;]*\b[349][0-7]m"


def drawn(width: int, metrics: dict[str, Any], **environment: str) -> str:
    """What is sent for one bar, after step 120 of 450."""
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=True, color_system="256", _environ={"TERM": "xterm", **environment}
    )
    bar = TerminalBar(450, console)
    bar.take(metrics)
    bar.show(120, 4.34042)
    console.print(bar)
    return out.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip("\r\n")


@pytest.mark.parametrize(
    ("width", "texts", "has_bar"),
    [
        (100, ["120/450", "loss 4.3404", "3m18s left", "2,394 tokens/s"], True),
        (60, ["120/450", "loss 4.3404", "3m18s left", "2,394 tokens/s"], True),
        (40, ["120/450", "loss 4.3404", "3m18s left"], True),
        (32, ["120/450", "loss 4.3404", "3m18s left"], False),
        (20, ["120/450", "loss 4.3404"], False),
        (9, ["120/450"], False),
    ],
)
def test_a_narrow_terminal_shows_less(width: int, texts: list[str], has_bar: bool) -> None:
    line = plain(drawn(width, SPEED))
    assert "\n" not in line
    assert cell_len(line) <= width
    assert [text for text in ("120/450", "loss 4.3404", "3m18s left", "2,394 tokens/s") if text in line] == texts
    assert ("━" in line) == has_bar


def test_before_the_speed_is_known_there_is_none() -> None:
    assert plain(drawn(100, {"valid/lm_loss": 1.0})).startswith("120/450 ━")
    assert "left" not in drawn(100, {})


def test_no_color_is_respected() -> None:
    assert re.search(COLOR, drawn(100, SPEED))
    assert not re.search(COLOR, drawn(100, SPEED, NO_COLOR="1"))


def test_it_is_drawn_below_what_is_printed_and_leaves_nothing() -> None:
    """The cursor is never hidden: a rank that is killed could not bring it back."""
    out = io.StringIO()
    console = terminal._Console(file=out, width=60, force_terminal=True, _environ={"TERM": "xterm"})
    bar = TerminalBar(450, console)
    bar.start()
    bar.show(1, 5.0)
    print("a line")
    bar.stop()
    text = out.getvalue()
    assert text.index("1/450") < text.index("a line") < text.rindex("1/450")
    assert text.endswith("\x1b[1A\x1b[2K")  # up, and the line is wiped
    assert "\x1b[?25l" not in text


@pytest.mark.parametrize(
    ("tty", "term", "expected"), [(True, "xterm", True), (False, "xterm", False), (True, "dumb", False)]
)
def test_only_a_terminal_gets_a_bar(tty: bool, term: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FORCE_COLOR, as in continuous integration, makes none of a pipe."""
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty, raising=False)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert is_terminal() is expected
