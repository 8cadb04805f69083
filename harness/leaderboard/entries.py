"""Official standings and our runs: which runs get a rank, and why the others get none.

Official standings are scores on the test split; the organisers keep its captions. Runs score themselves on
validation. The two are never ranked together. A run gets a rank only if the official checkpoint computed the
edition's primary score, on the edition's own images, for captions by a real model.

Captions and concepts have boards of their own. Thresholds of concepts are chosen on the half `tune` of
validation, so runs are ranked by their F1 on the half `held`; the F1 of all of validation stands beside it.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import records
from harness.config.editions import EDITIONS
from harness.data import fraction
from harness.data.halves import HELD, TUNE
from harness.errors import Problem, UserError
from harness.records import CAPTIONS, CONCEPTS
from harness.records.status import failure_of, status_of
from harness.scoring.compare import record_on_half

STANDINGS = Path("leaderboard")
_NEEDS = ("variant", "seed", "started", "ended", "parameters", "standin_model", "git", "scores", "image_gap")
NOT_METRICS = ("rank", "team", "run", "source")
SCORE_KEYS = ("value", "low", "high", "n", "official", "signature", "reason")
SPLITS = {"valid": "validation", "test": "test"}
TASKS = (CAPTIONS, CONCEPTS)
F1, SECONDARY, WHOLE = "f1", "f1_secondary", "f1_whole"
"""The scores of concepts; `WHOLE` is the F1 on all of validation, beside that on a half."""


@dataclass(frozen=True)
class Standing:
    """A row of an edition's official standings: scores on the test split.

    `rank` is None if the source does not give the place. A score that the source does not give is missing.
    """

    rank: int | None
    team: str
    run: str
    scores: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Entry:
    """One run's scores on one split; `apart` is the reason why it has no rank, or None.

    `half` is the half of validation that the scores of concepts are of.
    """

    record: Mapping[str, Any]
    folder: Path
    split: str
    apart: str | None
    task: str = CAPTIONS
    half: str | None = None

    @property
    def scores(self) -> Mapping[str, Mapping[str, Any]]:
        """The scores of captions after post-processing, or those of concepts, by metric."""
        if self.task == CONCEPTS:
            return concept_scores(self.record, self.split, self.half)
        return self.record["scores"].get(self.split, {}).get("after", {})

    @property
    def run(self) -> str:
        """The name of the run's folder, `<variant>-s<seed>` unless the user renamed it."""
        return self.folder.resolve().name

    def score(self, metric: str) -> dict[str, Any] | None:
        """The fields of a score that pages and files show; None if the run does not have the metric."""
        score = self.scores.get(metric)
        if not score:
            return None
        shown = {key: score.get(key) for key in SCORE_KEYS}
        return shown | {"tuned": True} if score.get("tuned") else shown

    def value(self, metric: str | None) -> float | None:
        """The score's value, official or not; None if it is absent."""
        return self.scores.get(metric or "", {}).get("value")


@dataclass(frozen=True)
class Board:
    """One task of one edition: its official standings and our runs, both in order.

    `left_out` are the problems of records that can't be read, of runs of any edition. With a `half`, `tune`
    or `held`, all scores of our runs are those of this half of validation; boards of concepts have one.
    """

    edition: int
    standings: Sequence[Standing]
    entries: Sequence[Entry]
    left_out: Sequence[Problem] = ()
    half: str | None = None
    task: str = CAPTIONS

    @property
    def primary(self) -> str | None:
        """The metric that determines the rank."""
        return _primary(self.edition, self.task)

    @property
    def ranking(self) -> str:
        """How the organisers rank, in words."""
        return f"by {F1}, highest first" if self.task == CONCEPTS else EDITIONS[self.edition].ranking

    @property
    def metrics(self) -> list[str]:
        """The metrics of the standings, then other metrics of our runs."""
        names = dict.fromkeys(name for row in self.standings for name in row.scores)
        return list(names | dict.fromkeys(name for entry in self.entries for name in entry.scores))

    @property
    def known(self) -> str:
        """How many of the teams the standings have, in words."""
        count, every = len(self.standings), EDITIONS[self.edition].teams.get(self.task)
        if every == count:
            return f"all {count} teams"
        return f"{count} of the {every} teams" if every else f"{count} known; there may be more teams"

    def place(self, value: float) -> int | None:
        """The place of a score among the official ones on test; None if the teams next to it are not known.

        So it is below the last team that is known.
        """
        rest = [row for row in self.standings if row.scores[self.primary] <= value]
        place = len(self.standings) - len(rest) + 1
        best = max(rest, key=lambda row: row.scores[self.primary], default=None)
        return place if best and best.rank == place else None

    def rank(self, entry: Entry) -> int | None:
        """The entry's rank: on test the one it would have in the standings, on validation among our runs.

        None if the entry is `apart`. Also None on test if `place` is.
        """
        if entry.apart:
            return None
        own = entry.value(self.primary)
        if entry.split == "test":
            return self.place(own)
        peers = [e for e in self.entries if e.split == entry.split and not e.apart]
        return 1 + sum(e.value(self.primary) > own for e in peers)

    def is_last(self, entry: Entry) -> bool:
        """Whether a ranked entry's score on test is below all standings."""
        return self.below_all(entry.value(self.primary))

    def below_all(self, value: float) -> bool:
        """Whether a score is below all standings."""
        return all(row.scores[self.primary] > value for row in self.standings)

    def beats(self, entry: Entry) -> dict[str, list[str]]:
        """By metric, the teams whose test score the entry exceeds; official scores only.

        Empty if `apart`, and for a half; for concepts, for the half that chose the thresholds.
        A validation entry is compared across splits; the caller must tell the reader.
        """
        if entry.apart or self.half not in ((None,) if self.task == CAPTIONS else (None, HELD)):
            return {}
        return {
            metric: self._below(metric, score["value"])
            for metric, score in entry.scores.items()
            if score["official"] and score["value"] is not None and self._known(metric)
        }

    def _below(self, metric: str, value: float) -> list[str]:
        return [row.team for row in self.standings if row.scores.get(metric, value) < value]

    def _known(self, metric: str) -> bool:
        return any(metric in row.scores for row in self.standings)


def editions(
    runs: Path, standings: Path = STANDINGS, trials: bool = False, task: str = CAPTIONS
) -> list[int]:
    """The editions that have official standings or runs of a task."""
    found = _records(runs, trials)[0]
    with_runs = {record["edition"] for _, record in found if task in records.tasks_of(record)}
    return [year for year in EDITIONS if year in with_runs or _file(standings, year, task).exists()]


def concept_scores(record: Mapping[str, Any], split: str, half: str | None) -> dict[str, dict[str, Any]]:
    """The scores of a run's concepts by metric: on validation those of a half, and the F1 of all of it.

    That F1 is `tuned` if thresholds were chosen on a part of these images.
    """
    concepts = record.get("concepts") or {}
    whole = concepts.get("scores", {}).get(split, {})
    if split != "valid" or F1 not in whole:
        return whole
    tuned = (concepts.get("thresholds") or {}).get("chosen_on") == TUNE
    tuned = tuned or concepts.get("predictor") == "votes"  # of runs, which may each have chosen theirs
    return concepts.get("halves", {}).get(half, {}) | {WHOLE: whole[F1] | {"tuned": tuned}}


def _primary(edition: int, task: str) -> str | None:
    return F1 if task == CONCEPTS else EDITIONS[edition].primary


def _file(standings: Path, edition: int, task: str) -> Path:
    """The file with the official standings of a task."""
    return standings / (f"{edition}.csv" if task == CAPTIONS else f"{task}_{edition}.csv")


def board(
    edition: int,
    runs: Path,
    standings: Path = STANDINGS,
    trials: bool = False,
    half: str | None = None,
    task: str = CAPTIONS,
) -> Board:
    """Read an edition's standings and our runs of a task, with the trials of studies if `trials`.

    With a `half`, `tune` or `held`, our scores are those of this half of validation; without one, those of
    concepts are of `held`. Raises `UserError` for an unknown edition or faulty standings.
    """
    if edition not in EDITIONS:
        known = ", ".join(map(str, EDITIONS))
        raise UserError([Problem(f"got {edition}; there are {known}", key="--edition")])
    found, left_out = _records(runs, trials)
    ours = [one for one in found if one[1]["edition"] == edition and task in records.tasks_of(one[1])]
    if task == CONCEPTS:
        entries = _concept_entries(ours, half)
        half = half or HELD
    else:
        entries, more = _caption_entries(ours, half)
        left_out += more
    # entries apart are the newest first, because their scores can't be compared
    primary = _primary(edition, task)
    entries.sort(key=lambda e: e.folder)
    entries.sort(key=lambda e: e.record["ended"] or e.record["started"] or "", reverse=True)
    entries.sort(key=lambda e: (e.split, bool(e.apart), 0 if e.apart else -e.value(primary)))
    return Board(edition, read_standings(_file(standings, edition, task)), entries, left_out, half, task)


def _caption_entries(
    ours: Sequence[tuple[Path, dict[str, Any]]], half: str | None
) -> tuple[list[Entry], list[Problem]]:
    """The entries of runs with captions, and the problems of those that have no scores on the half."""
    entries = [
        Entry(record, folder, split, _apart(record, split))
        for folder, record in ours
        for split in (record["scores"] if half is None else ()) or ("valid",)
    ]
    return (entries, []) if half is None else _on_half(entries, half)


def _concept_entries(ours: Sequence[tuple[Path, dict[str, Any]]], half: str | None) -> list[Entry]:
    """The entries of runs with concepts; on validation with the scores of the half, by default `held`."""
    entries = []
    for folder, record in ours:
        scored = (record.get("concepts") or {}).get("scores", {})
        for split in (scored if half is None else ()) or ("valid",):
            apart = _apart(record, split, CONCEPTS, half or HELD)
            entries.append(Entry(record, folder, split, apart, CONCEPTS, half or HELD))
    return entries


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

    A row may lack its rank or the secondary F1, if its source does. Raises `UserError` naming every row
    without a source or with another score that is not a number.
    """
    if not file.exists():
        return []
    rows, problems = [], []
    with file.open(encoding="utf-8", newline="") as text:
        for line, row in enumerate(csv.DictReader(text), 2):
            try:
                given = {name: value for name, value in row.items() if (name, value) != (SECONDARY, "")}
                scores = {name: float(value) for name, value in given.items() if name not in NOT_METRICS}
                rank = None if row["rank"] == "" else int(row["rank"])
                rows.append(Standing(rank, row["team"], row["run"], scores, row["source"]))
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


def _apart(
    record: Mapping[str, Any], split: str, task: str = CAPTIONS, half: str | None = None
) -> str | None:
    """All reasons not to rank a run on a split, or None."""
    reasons = [*_run_reasons(record, task), *_score_reasons(record, split, task, half)]
    return "; ".join(reasons) or None


def _because(failure: Mapping[str, Any] | None) -> str:
    """Step and reason of a failure, as text that follows the status."""
    if failure is None:
        return ""
    return (f" in {failure['step']}" if failure["step"] else "") + f": {failure['reason']}"


def _run_reasons(record: Mapping[str, Any], task: str) -> Iterator[str]:
    """What a run is, if that is nothing to rank."""
    if record["status"] != "FINISHED":
        yield f"the run is {status_of(record, None)}{_because(failure_of(record))}"
    if record.get("trial") is not None:
        yield "it is a trial of a study, or of `harness best`"
    if record["standin_model"]:
        yield f"the {task} are by a stand-in model"
    if record["config"].get("data", {}).get("phantom") is not None:
        yield "the images are made up"
    if share := fraction.looked(record):
        yield f"it is a quick look at {share} (data.fraction)"


def _score_reasons(record: Mapping[str, Any], split: str, task: str, half: str | None) -> Iterator[str]:
    """What a score is, or is not, if that can't be ranked."""
    edition = record["edition"]
    primary = _primary(edition, task)
    if primary is None:
        yield f"the ranking rule of {edition} is not established"
        return
    scores = Entry(record, Path(), split, None, task, half).scores
    score = scores.get(primary)
    if score is None and (why := record.get("unscored", {}).get(split)):
        yield f"it has no scores on {SPLITS[split]}: {why}"
        return
    if score is None or score["value"] is None:
        yield f"{primary}, the ranking score, is absent: {(score or {}).get('reason') or 'not computed'}"
        return
    if not score["official"]:
        yield f"{primary}, the ranking score, is not the official one: {score['signature']}"
    yield from _size_reasons(edition, split, scores.get(WHOLE, score)["n"])


def _size_reasons(edition: int, split: str, n: int) -> Iterator[str]:
    """Why a score of n images is not one of the edition's split."""
    year = EDITIONS[edition]
    wanted = year.images.get(split)
    if wanted is None:
        yield f"the size of the {SPLITS[split]} split of {edition} is not established"
    elif n != wanted:
        alike = [name for name, images in year.subtasks.items() if images.get(split) == n]
        of = f" (like the subtask {alike[0]})" if alike else ""
        yield f"it has {n:,} images{of}, but the {SPLITS[split]} split of {edition} has {wanted:,}"
