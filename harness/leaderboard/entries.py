"""Official standings and our runs: which runs get a rank, and why the others get none.

Official standings are scores on the test split; the organisers keep its captions. Runs score themselves on
validation. The two are never ranked together. A run gets a rank only if the official checkpoint computed the
edition's primary score, on the edition's own images, for captions by a real model.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import records
from harness.compare import record_on_half
from harness.config.editions import EDITIONS
from harness.data import fraction
from harness.errors import Problem, UserError
from harness.tracking.server import failure_of, status_of

STANDINGS = Path("leaderboard")
_NEEDS = ("variant", "seed", "started", "ended", "parameters", "standin_model", "git", "scores", "image_gap")
NOT_METRICS = ("rank", "team", "run", "source")
SCORE_KEYS = ("value", "low", "high", "n", "official", "signature", "reason")
SPLITS = {"valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Standing:
    """A row of an edition's official standings: scores on the test split."""

    rank: int
    team: str
    run: str
    scores: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Entry:
    """One run's scores on one split; `apart` is the reason why it has no rank, or None."""

    record: Mapping[str, Any]
    folder: Path
    split: str
    apart: str | None

    @property
    def scores(self) -> Mapping[str, Mapping[str, Any]]:
        """The scores after post-processing, by metric."""
        return self.record["scores"].get(self.split, {}).get("after", {})

    @property
    def run(self) -> str:
        """The name of the run's folder, `<variant>-s<seed>` unless the user renamed it."""
        return self.folder.resolve().name

    def score(self, metric: str) -> dict[str, Any] | None:
        """The fields of a score that pages and files show; None if the run does not have the metric."""
        score = self.scores.get(metric)
        return {key: score.get(key) for key in SCORE_KEYS} if score else None

    def value(self, metric: str | None) -> float | None:
        """The score's value, official or not; None if it is absent."""
        return self.scores.get(metric or "", {}).get("value")


@dataclass(frozen=True)
class Board:
    """One edition: its official standings and our runs, both in order.

    `left_out` are the problems of records that can't be read, of runs of any edition. With a `half`, `tune`
    or `held`, all scores of our runs are those of this half of validation.
    """

    edition: int
    standings: Sequence[Standing]
    entries: Sequence[Entry]
    left_out: Sequence[Problem] = ()
    half: str | None = None

    @property
    def primary(self) -> str | None:
        """The metric that determines the rank."""
        return EDITIONS[self.edition].primary

    @property
    def metrics(self) -> list[str]:
        """The metrics of the standings, then other metrics of our runs."""
        names = dict.fromkeys(name for row in self.standings for name in row.scores)
        return list(names | dict.fromkeys(name for entry in self.entries for name in entry.scores))

    def rank(self, entry: Entry) -> int | None:
        """The entry's rank: on test the one it would have in the standings, on validation among our runs.

        None if the entry is `apart`. Also None on test below all standings, because they lack the last teams.
        """
        if entry.apart:
            return None
        own = entry.value(self.primary)
        if entry.split == "test":
            others = [row.scores[self.primary] for row in self.standings]
        else:
            peers = [e for e in self.entries if e.split == entry.split and not e.apart]
            others = [e.value(self.primary) for e in peers]
        above = sum(other > own for other in others)
        return None if entry.split == "test" and above == len(others) else above + 1

    def beats(self, entry: Entry) -> dict[str, list[str]]:
        """By metric, the teams whose test score the entry exceeds; official scores only.

        Empty if `apart`, and for a half.
        A validation entry is compared across splits; the caller must tell the reader.
        """
        if entry.apart or not self.standings or self.half:
            return {}
        return {
            metric: [row.team for row in self.standings if row.scores[metric] < score["value"]]
            for metric, score in entry.scores.items()
            if score["official"] and score["value"] is not None and metric in self.standings[0].scores
        }


def editions(runs: Path, standings: Path = STANDINGS, trials: bool = False) -> list[int]:
    """The editions that have official standings or runs."""
    with_runs = {record["edition"] for _, record in _records(runs, trials)[0]}
    return [year for year in EDITIONS if year in with_runs or (standings / f"{year}.csv").exists()]


def board(
    edition: int,
    runs: Path,
    standings: Path = STANDINGS,
    trials: bool = False,
    half: str | None = None,
) -> Board:
    """Read an edition's standings and our runs of it, with the trials of studies if `trials`.

    With a `half`, `tune` or `held`, our scores are those of this half of validation. Raises `UserError` for
    an unknown edition or faulty standings.
    """
    if edition not in EDITIONS:
        known = ", ".join(map(str, EDITIONS))
        raise UserError([Problem(f"got {edition}; there are {known}", key="--edition")])
    found, left_out = _records(runs, trials)
    entries = [
        Entry(record, folder, split, _apart(record, split, edition))
        for folder, record in found
        if record["edition"] == edition
        for split in (record["scores"] if half is None else ()) or ("valid",)
    ]
    if half is not None:
        entries, more = _on_half(entries, half)
        left_out += more
    primary = EDITIONS[edition].primary
    # entries apart are not sorted by score, because their scores can't be compared
    entries.sort(key=lambda e: (e.split, bool(e.apart), 0 if e.apart else -e.value(primary), e.folder))
    return Board(edition, read_standings(standings / f"{edition}.csv"), entries, left_out, half)


def _on_half(entries: Sequence[Entry], half: str) -> tuple[list[Entry], list[Problem]]:
    """The entries with their scores on a half, and the problems of those that have none."""
    found, problems = [], []
    for entry in entries:
        try:
            record = record_on_half(entry.folder, entry.record, half) if entry.scores else entry.record
        except UserError as error:
            problems += error.problems
            continue
        found.append(replace(entry, record=record))
    return found, problems


def read_standings(file: Path) -> list[Standing]:
    """The official rows of an edition; empty if there is no file.

    Raises `UserError` naming every row without a source or with a score that is not a number.
    """
    if not file.exists():
        return []
    rows, problems = [], []
    with file.open(encoding="utf-8", newline="") as text:
        for line, row in enumerate(csv.DictReader(text), 2):
            try:
                scores = {name: float(value) for name, value in row.items() if name not in NOT_METRICS}
                rows.append(Standing(int(row["rank"]), row["team"], row["run"], scores, row["source"]))
            except (KeyError, TypeError, ValueError) as error:
                problems.append(Problem(f"not a standing: {error}", file, line))
                continue
            if not row["source"]:
                problems.append(Problem("has no source", file, line, hint="State where the row is from."))
    if problems:
        raise UserError(problems)
    return rows


def _records(runs: Path, trials: bool) -> tuple[list[tuple[Path, dict[str, Any]]], list[Problem]]:
    """Folder and record of every run, with trials of studies if `trials`; and problems of faulty records."""
    found, left_out = records.read_all(records.below(runs), _NEEDS)
    return [one for one in found if trials or one[1].get("trial") is None], left_out


def _apart(record: Mapping[str, Any], split: str, edition: int) -> str | None:
    """All reasons not to rank a run on a split, or None."""
    return "; ".join(_reasons(record, split, edition)) or None


def _because(failure: Mapping[str, Any] | None) -> str:
    """Step and reason of a failure, as text that follows the status."""
    if failure is None:
        return ""
    return (f" in {failure['step']}" if failure["step"] else "") + f": {failure['reason']}"


def _reasons(record: Mapping[str, Any], split: str, edition: int) -> Iterator[str]:
    if record["status"] != "FINISHED":
        yield f"the run is {status_of(record, None)}{_because(failure_of(record))}"
    if record.get("trial") is not None:
        yield "it is a trial of a study, or of harness best"
    if record["standin_model"]:
        yield "its captions are by a stand-in model"
    if record["config"].get("data", {}).get("phantom") is not None:
        yield "its images are made up"
    if share := fraction.looked(record):
        yield f"it is a quick look at {share} (data.fraction)"
    year = EDITIONS[edition]
    primary = year.primary
    if primary is None:
        yield f"the ranking rule of {edition} is not established"
        return
    score = record["scores"].get(split, {}).get("after", {}).get(primary)
    if score is None and (why := record.get("unscored", {}).get(split)):
        yield f"it has no scores on {SPLITS[split]}: {why}"
        return
    if score is None or score["value"] is None:
        yield f"{primary}, the ranking score, is absent: {(score or {}).get('reason') or 'not computed'}"
        return
    if not score["official"]:
        yield f"{primary}, the ranking score, is not the official one: {score['signature']}"
    wanted = year.images.get(split)
    if wanted is None:
        yield f"the size of the {SPLITS[split]} split of {edition} is not established"
    elif score["n"] != wanted:
        alike = [name for name, images in year.subtasks.items() if images.get(split) == score["n"]]
        of = f" (like the subtask {alike[0]})" if alike else ""
        yield f"it has {score['n']:,} images{of}, but the {SPLITS[split]} split of {edition} has {wanted:,}"
