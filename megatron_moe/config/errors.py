"""What ends a command without a traceback: the user's input (exit code 2), a training that cannot go on, a signal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megatron_moe.files import may_pass, naming


class ConfigError(ValueError):
    """What the user asked for cannot be done.

    Args:
        problems: one line each: option or file, its value, the rule, what would work.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def report(self) -> str:
        """The text for a terminal: one bullet a problem."""
        return "\n".join(f"error: {problem}" for problem in self.problems)


class TrainingError(RuntimeError):
    """The training cannot go on, and would not if it were started again; the message says why and what may help."""


class Preempted(Exception):  # noqa: N818 nothing went wrong
    """The run was asked to stop, and has saved.

    Args:
        step: of the checkpoint.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"stopped at step {step}")


def unreadable(path: Path, error: OSError, hint: str = "") -> ConfigError | OSError:
    """What to raise of a file that cannot be read: the user's to mend, or, where it may pass, the file system's."""
    return naming(error, path) if may_pass(error) else ConfigError(f"{path}: {error.strerror}{hint}")


def exit_code_of(command: Callable[[], None]) -> int:
    """Run a tool's command: 0, 2 where the user can mend what went wrong, or 130 after Ctrl-C; without a traceback."""
    try:
        command()
    except ConfigError as error:
        sys.stderr.write(f"{error.report()}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0
