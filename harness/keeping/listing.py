"""All runs of a project in short: status, score, image gap, size on disk, and why one failed."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness import records
from harness.config.editions import EDITIONS
from harness.errors import Problem
from harness.records.status import failure_of, status_of
from harness.store import RUNS

_NEEDS = ("variant", "seed", "started", "ended", "steps", "scores", "image_gap")


@dataclass(frozen=True)
class Row:
    """One run: its primary score on validation, and its image gap in ROUGE-1.

    `size` is in bytes, of the run's own folder and of its steps; other runs may share these. `moment` is when
    the run ended, or began if it has not ended. `why` is what ended a run that did not finish.
    """

    run: str
    status: str
    metric: str | None
    score: Mapping[str, Any] | None
    gap: float | None
    size: int
    moment: str
    why: str | None
    edition: int
    standin_model: bool


SORTS: Mapping[str, Callable[[Row], Any]] = {
    "name": lambda row: row.run,
    "status": lambda row: (row.status, row.run),
    "score": lambda row: -_number((row.score or {}).get("value")),
    "gap": lambda row: -_number(row.gap),
    "size": lambda row: -row.size,
    "date": lambda row: _reversed(row.moment),
}
"""What runs can be sorted by: the highest score, the largest and the newest come first."""


def rows(
    patterns: Sequence[str] = (),
    status: Iterable[str] = (),
    sort: str = "date",
    metric: str | None = None,
    trials: bool = False,
    archived: bool = False,
    root: Path = RUNS,
) -> tuple[list[Row], list[Problem]]:
    """The runs below `root`, and the problems of records that can't be read.

    `patterns` are names of runs or of experiments, with `*` for any text; without any, all runs are listed.
    """
    files = [*records.below(root), *(records.archived(root) if archived else ())]
    found, left_out = records.read_all(files, _NEEDS)
    sizes: dict[Path, int] = {}
    made = [
        _row(folder, record, metric, root, sizes)
        for folder, record in found
        if trials or record.get("trial") is None
    ]
    wanted = {name.upper() for name in status}
    shown = [
        row
        for row in made
        if (not wanted or row.status in wanted)
        and (not patterns or any(_fits(row.run, one) for one in patterns))
    ]
    return sorted(shown, key=SORTS[sort]), left_out


def size(path: Path) -> int:
    """Bytes of the files in a folder, or of a file; 0 if it is gone."""
    if not path.is_dir():
        return path.stat().st_size if path.is_file() else 0
    files = (os.path.join(place, name) for place, _, names in os.walk(path) for name in names)
    return sum(os.lstat(file).st_size for file in files if os.path.lexists(file))


def _row(folder: Path, record: records.Record, metric: str | None, root: Path, sizes: dict[Path, int]) -> Row:
    scores = records.on_valid(record)
    chosen = metric or _primary(record)
    places = [folder, *(root / place for place in dict.fromkeys(record["steps"].values()))]
    for place in places:
        sizes.setdefault(place, size(place))
    failure = failure_of(record)
    gap = (record["image_gap"] or {}).get("rouge1")
    return Row(
        run=folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder),
        status=status_of(record, None),
        metric=chosen,
        score=scores.get(chosen),
        gap=gap.get("gap") if isinstance(gap, Mapping) else None,
        size=sum(sizes[place] for place in places),
        moment=record["ended"] or record["started"],
        why=f"{failure['step'] or 'start'}: {failure['reason']}" if failure else None,
        edition=record["edition"],
        standin_model=bool(record.get("standin_model")),
    )


def _primary(record: records.Record) -> str | None:
    """The metric that ranks runs of the record's task and edition."""
    if records.task_of(record) == records.CONCEPTS:
        return "concept_f1"
    return EDITIONS[record["edition"]].primary


def _fits(run: str, pattern: str) -> bool:
    pattern = pattern.removeprefix(f"{RUNS}/").rstrip("/")
    return fnmatchcase(run, pattern) or fnmatchcase(run, f"{pattern}/*")


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value


def _reversed(moment: str) -> float:
    return -datetime.fromisoformat(moment).timestamp()
