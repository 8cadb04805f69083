"""The place of a run with its 95 % interval: among the official teams, and among our runs.

Only our scores are resampled. The scores of official teams are fixed numbers, since the organisers publish no
scores of images; so an interval has no part that comes from the other teams.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.leaderboard.entries import Board, Entry
from harness.metrics import aggregate, bootstrap
from harness.scoring.compare import DRAWS, System, check_rows, on_half, read_run, rows_of


def official(board: Board, entry: Entry) -> dict[str, Any] | None:
    """The place that an entry's score takes, or would take, among the official teams on test.

    `place`, `best` and `worst` are numbers, or None if the teams next to it are not known; `text` has all
    three. A place falls as the score rises, so the ends of its bootstrap interval are the places of the ends
    of the score's. None without a rank or without standings; `hypothetical` if the score is on validation.
    """
    score = entry.scores.get(board.primary or "")
    if entry.apart or not board.standings or not score:
        return None
    ends = [score.get(end) for end in ("high", "low")]
    place, *rest = (None if end is None else board.place(end) for end in (score["value"], *ends))
    names = [_name(board, end) for end in (score["value"], *ends)]
    return {
        **dict(zip(("place", "best", "worst"), (place, *rest), strict=True)),
        "text": _text(*names),
        "hypothetical": entry.split == "valid",
    }


def among_ours(board: Board) -> tuple[dict[Path, tuple[int, int]], str | None]:
    """Best and worst rank of the 95 % interval of each ranked validation entry among the others, by folder.

    All runs are resampled together, with the same images. Empty for fewer than two runs; and, with the
    reason, if a run lacks the scores of its images or has other images than another.
    """
    ranked = [entry for entry in board.entries if entry.split == "valid" and not entry.apart]
    if len(ranked) < 2:
        return {}, None
    try:
        systems = [_system(board, entry) for entry in ranked]
        check_rows(systems)
        values = {str(at): _aligned(one, board.primary) for at, one in enumerate(systems)}
    except UserError as error:
        return {}, str(error.problems[0])
    drawn = bootstrap.resample(values, dict.fromkeys(values, aggregate(board.primary)), DRAWS)
    scores = np.stack(list(drawn.values()), axis=1)
    ranks = np.stack([1 + (scores > own[:, None]).sum(axis=1) for own in scores.T], axis=1)
    best = np.percentile(ranks, 2.5, axis=0, method="lower")
    worst = np.percentile(ranks, 97.5, axis=0, method="higher")
    return {entry.folder: (int(a), int(b)) for entry, a, b in zip(ranked, best, worst, strict=True)}, None


def _system(board: Board, entry: Entry) -> System:
    """A run's scores in the metric that ranks, on the board's half."""
    system = read_run(entry.folder, str(entry.folder), entry.task)
    system = replace(system, scores={board.primary: system.scores[board.primary]})
    return on_half(system, board.half) if board.half else system


def _aligned(system: System, metric: str) -> np.ndarray:
    """The numbers of each image in the order of ids."""
    return rows_of(system, metric)[np.argsort(np.asarray(system.ids, dtype=str))]


def ranked_text(rank: int, ends: Sequence[int] | None) -> str:
    """A rank among our runs, with its interval if there is one."""
    return _text(ordinal(rank), *(map(ordinal, ends) if ends else (None, None)))


def _name(board: Board, value: float | None) -> str | None:
    if value is None:
        return None
    if place := board.place(value):
        return ordinal(place)
    last = max((row.rank for row in board.standings if row.rank), default=0)
    return f"below {ordinal(last)}" if last and board.below_all(value) else "not known"


def _text(place: str, best: str | None, worst: str | None) -> str:
    if best is None or worst is None:
        return place
    return f"{place}, 95 %: {best}" + (f" to {worst}" if worst != best else "")


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ..."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
