"""The errors a user can cause. They become exit code 2, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


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
    """The training cannot go on; becomes exit code 3, without a traceback."""


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
