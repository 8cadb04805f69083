"""Errors for people: what is wrong, where, what was got, what is allowed, the next command."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.visible import one_line


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the place to mend it."""

    what: str
    file: str | Path | None = None
    line: int | None = None
    key: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else str(self.file or "")
        return one_line(": ".join(part for part in (place, self.key or "", self.what) if part))


@dataclass
class UserError(Exception):
    """A mistake that the user can mend; the command line prints it without a traceback.

    `exit_code` is 1 for a failed run, 2 for usage, config and data, 3 for an invalid submission.
    """

    problems: Sequence[Problem] = field(default_factory=list)
    hint: str | None = None
    exit_code: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.problems, str):
            self.problems = [Problem(self.problems)]
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = []
        for problem in self.problems:
            lines.append(f"error: {problem}")
            if problem.hint:
                lines.append(f"       {one_line(problem.hint)}")
        if self.hint:
            lines.append(f"       {one_line(self.hint)}")
        return "\n".join(lines)


class AcrossKeys(ValueError):
    """Keys of an experiment that do not go together; `keys` are below the section that found it."""

    def __init__(self, what: str, *keys: str) -> None:
        super().__init__(what)
        self.keys = keys


class Pruned(Exception):
    """A study ends this run early, since others of it are better; the message says by what it was judged."""
