"""Errors for users: what is wrong, where, what was got, what is allowed, the next command."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from harness.output.visible import one_line

_NAMED = 5  # of many rows with the same fault
_LONGEST = 200  # characters of a row that are shown


@dataclass(frozen=True)
class Problem:
    """One mistake, and the place to correct it."""

    what: str
    file: str | Path | None = None
    line: int | None = None
    key: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else str(self.file or "")
        key = "" if place == f"--set {self.key}" else self.key or ""
        return one_line(": ".join(part for part in (place, key, self.what) if part))


class Flaw(NamedTuple):
    """A faulty row; many rows may share the fault `what`. `subject` is the faulty content, e.g. an id."""

    line: int | None
    what: str
    hint: str | None = None
    subject: str = ""


def grouped(file: str | Path, flaws: Iterable[Flaw]) -> list[Problem]:
    """One problem for each cause, at its first line, with the number of its rows and the first few."""
    causes: dict[tuple[str, str | None], list[Flaw]] = {}
    for flaw in flaws:
        causes.setdefault((flaw.what, flaw.hint), []).append(flaw)
    return [
        Problem(f"{what}{places(same)}", file, same[0].line, hint=hint)
        for (what, hint), same in causes.items()
    ]


def places(flaws: Sequence[Flaw]) -> str:
    """The places of flaws of one cause: ` (17,237 rows): line 1, line 2, line 3 and 17,234 more`."""
    if len(flaws) == 1:
        return f": {_cut(flaws[0].subject)}" if flaws[0].subject else ""
    count = f" ({len(flaws):,} rows)" if len(flaws) > _NAMED else ""
    more = f" and {len(flaws) - _NAMED:,} more" if len(flaws) > _NAMED else ""
    return f"{count}: {', '.join(_place(flaw) for flaw in flaws[:_NAMED])}{more}"


def _place(flaw: Flaw) -> str:
    line = f"line {flaw.line}" if flaw.line else ""
    subject = _cut(flaw.subject)
    return f"{subject} ({line})" if subject and line else subject or line


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@dataclass
class UserError(Exception):
    """A mistake that the user can correct; the command line prints it without a traceback.

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
    """Keys of an experiment that conflict; `keys` are paths below the section that raises this."""

    def __init__(self, what: str, *keys: str) -> None:
        super().__init__(what)
        self.keys = keys


class Pruned(Exception):
    """A study ends this run early because other runs are better; the message says by which score."""
