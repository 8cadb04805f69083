"""The output of `score --verify`: our scores compared with those of the original packages."""

import math
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from harness.errors import Problem, UserError

if TYPE_CHECKING:
    from harness.scoring.verify import Verified


def lines(verified: Mapping[str, "Verified"], wanted: int, count: int) -> Iterator[str]:
    """The lines of a table with the largest difference of each metric, and how its rows were chosen."""
    from harness.scoring.verify import SEED, TOLERANCE

    yield ""
    rows = f"{min(wanted, count):,} of {count:,} rows, chosen by seed {SEED}"
    yield f"verified by the original packages, one pair at a time, on {rows}; {TOLERANCE:g} is allowed"
    width = max(map(len, verified))
    yield f"{'metric':<{width}}  rows  largest difference"
    for name, one in verified.items():
        if one.difference is None:
            yield f"{name:<{width}}  {'-':>4}  {one.why}"
        else:
            judged = "TOO FAR" if one.fails else "ok"
            yield f"{name:<{width}}  {one.rows:>4}  {one.difference:<18.1e}  {judged:<7}  {_package(one)}"


def plain(verified: Mapping[str, "Verified"]) -> dict[str, dict[str, Any]]:
    """The comparison as JSON-like values; a difference that is not finite is null and not ok."""
    return {
        name: {
            "package": one.package and _package(one),
            "rows": one.rows,
            "difference": one.difference if math.isfinite(one.difference or 0) else None,
            "ok": None if one.difference is None else not one.fails,
            "reason": one.why,
        }
        for name, one in verified.items()
    }


def judge(verified: Mapping[str, "Verified"]) -> None:
    """Raise `UserError` (exit code 1) if a score differs by more than TOLERANCE or nothing was compared."""
    from harness.scoring.verify import TOLERANCE

    wrong = [name for name, one in verified.items() if one.fails]
    if wrong:
        what = f"differ from the original packages by more than {TOLERANCE:g}: {', '.join(wrong)}"
        raise UserError([Problem(what, key="--verify")], exit_code=1)
    if all(one.difference is None for one in verified.values()):
        what = "no score was compared: none has a value, an original package and rows without blank captions"
        raise UserError([Problem(what, key="--verify")], exit_code=1)


def _package(one: "Verified") -> str:
    return f"{one.package} {metadata.version(str(one.package))}"
