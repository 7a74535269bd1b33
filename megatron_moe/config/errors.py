"""The errors a user can cause. They become exit code 2, without a traceback."""

from __future__ import annotations


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
