"""Our runs beside the official standings: what may be ranked, what stands apart, and why.

Official standings are scores on the test split, whose captions the organisers keep; a run scores itself on
validation. The two are never ranked together. A run has a rank only where the edition's primary score is
computed by the official checkpoint, on the edition's own images, for captions by a real model.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.editions import EDITIONS
from harness.errors import Problem, UserError
from harness.pages import filled
from harness.store import write
from harness.tracking.server import STATE

STANDINGS = Path("leaderboard")
PAGE = "index.html"
IMAGES: Mapping[int, Mapping[str, int]] = {2023: {"valid": 10_437, "test": 10_473}}
"""Images of each edition's splits as the organisers released them, where that is known."""
NOT_METRICS = ("rank", "team", "run", "source")
_VALUES = ("value", "low", "high", "n", "official", "signature")
SPLITS = {"valid": "validation", "test": "test"}

TABLE_3: Sequence[tuple[str, tuple[bool, int, bool], Mapping[str, float]]] = (
    ("Q-Former only, 224 pixels", (False, 224, False), {"bertscore": 0.541, "rouge1": 0.160}),
    ("with OPT-2.7B, 224 pixels", (True, 224, False), {"bertscore": 0.593, "rouge1": 0.249}),
    ("with OPT-2.7B, 364 pixels", (True, 364, False), {"bertscore": 0.608, "rouge1": 0.255}),
    ("with OPT-2.7B, 364 pixels, de-duplicated", (True, 364, True), {"bertscore": 0.628, "rouge1": 0.253}),
)
"""Table 3 of closeAI2023's working notes (validation), by (language model, image size, de-duplicated)."""


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
    """One run's scores on one split; `apart` says why it has no rank."""

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
        """`<variant>-s<seed>`."""
        return f"{self.record['variant']}-s{self.record['seed']}"

    def value(self, metric: str | None) -> float | None:
        """The score, official or not; None where it is absent."""
        return self.scores.get(metric or "", {}).get("value")


@dataclass(frozen=True)
class Board:
    """One edition: its official standings and our runs, each in their order."""

    edition: int
    standings: Sequence[Standing]
    entries: Sequence[Entry]

    @property
    def primary(self) -> str | None:
        """The score that ranks."""
        return EDITIONS[self.edition].primary

    @property
    def metrics(self) -> list[str]:
        """The metrics of the standings and of our runs, the official ones first."""
        names = dict.fromkeys(name for row in self.standings for name in row.scores)
        return list(names | dict.fromkeys(name for entry in self.entries for name in entry.scores))

    def rank(self, entry: Entry) -> int | None:
        """On test the place that the entry would take in the standings; on validation that among our runs.

        None for an entry apart, and for one on test below all standings, which end before the last team.
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
        """By metric, the teams whose test score the entry exceeds; only by official scores, never if apart.

        For an entry on validation that is a comparison across splits, and whoever shows it has to say so.
        """
        if entry.apart or not self.standings:
            return {}
        return {
            metric: [row.team for row in self.standings if row.scores[metric] < score["value"]]
            for metric, score in entry.scores.items()
            if score["official"] and score["value"] is not None and metric in self.standings[0].scores
        }


def editions(runs: Path, standings: Path = STANDINGS) -> list[int]:
    """The editions that have official standings or runs."""
    with_runs = {record["edition"] for _, record in _records(runs)}
    return [year for year in EDITIONS if year in with_runs or (standings / f"{year}.csv").exists()]


def board(edition: int, runs: Path, standings: Path = STANDINGS) -> Board:
    """Read an edition's standings and our runs of it; raises `UserError` where a file can't be read."""
    if edition not in EDITIONS:
        known = ", ".join(map(str, EDITIONS))
        raise UserError([Problem(f"got {edition}; there are {known}", key="--edition")])
    entries = [
        Entry(record, folder, split, _apart(record, split, edition))
        for folder, record in _records(runs)
        if record["edition"] == edition
        for split in record["scores"] or ("valid",)
    ]
    primary = EDITIONS[edition].primary
    # those apart are not put in the order of scores that can't be compared
    entries.sort(key=lambda e: (e.split, bool(e.apart), 0 if e.apart else -e.value(primary), e.folder))
    return Board(edition, read_standings(standings / f"{edition}.csv"), entries)


def read_standings(file: Path) -> list[Standing]:
    """The official rows of an edition, none where there is no file.

    Raises `UserError` naming every row that has no source or a score that is no number.
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
                problems.append(Problem("has no source", file, line, hint="Say where the row is from."))
    if problems:
        raise UserError(problems)
    return rows


def _records(runs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for file in sorted(runs.rglob("run.json")):
        try:
            yield file.parent, json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError([Problem(f"not the record of a run: {error}", file)]) from None


def _apart(record: Mapping[str, Any], split: str, edition: int) -> str | None:
    """Every reason for which a run must not be ranked on a split; None where there is none."""
    return "; ".join(_reasons(record, split, edition)) or None


def _reasons(record: Mapping[str, Any], split: str, edition: int) -> Iterator[str]:
    if record["status"] != "FINISHED":
        yield f"the run is {record['status']}"
    if record["standin_model"]:
        yield "its captions are by a stand-in model"
    if record["config"]["data"]["phantom"] is not None:
        yield "its images are made up"
    primary = EDITIONS[edition].primary
    if primary is None:
        yield f"the ranking rule of {edition} is not established"
        return
    score = record["scores"].get(split, {}).get("after", {}).get(primary)
    if score is None or score["value"] is None:
        yield f"{primary}, which ranks, is absent: {(score or {}).get('reason') or 'not computed'}"
        return
    if not score["official"]:
        yield f"{primary}, which ranks, is not the official one: {score['signature']}"
    wanted = IMAGES.get(edition, {}).get(split)
    if wanted is None:
        yield f"the size of the {SPLITS[split]} split of {edition} is not established"
    elif score["n"] != wanted:
        yield f"it has {score['n']:,} images, the {SPLITS[split]} split of {edition} {wanted:,}"


def table_3(board: Board) -> list[dict[str, Any]]:
    """The paper's Table 3 beside our runs of the same kind on validation, with differences where comparable.

    A difference is significant where the paper's value, which has no interval, lies outside the 95 % interval
    of ours. A run that stands apart has no difference.
    """
    if board.edition != 2023:
        return []
    rows: list[dict[str, Any]] = []
    for name, kind, paper in TABLE_3:
        ours = [e for e in board.entries if e.split == "valid" and e.scores and _kind(e) == kind]
        for entry in ours or [None]:
            cells = {metric: _beside(value, entry, metric) for metric, value in paper.items()}
            run = f"{entry.record['name']}/{entry.run}" if entry else None
            experiment = entry.record["name"] if entry else None
            apart = entry.apart if entry else None
            rows.append({"row": name, "run": run, "experiment": experiment, "apart": apart, "scores": cells})
    return rows


def _kind(entry: Entry) -> tuple[bool, int, bool]:
    config = entry.record["config"]
    model = config["model"]
    return model["language_model"], model["image_size"], config["postprocess"]["deduplicate"]


def _beside(paper: float, entry: Entry | None, metric: str) -> dict[str, Any]:
    score = entry.scores.get(metric) if entry else None
    cell: dict[str, Any] = {"paper": paper, "ours": _score(score) if score else None}
    if entry and score and score["value"] is not None and score["official"] and not entry.apart:
        cell["difference"] = score["value"] - paper
        if score["low"] is not None:
            cell["significant"] = not score["low"] <= paper <= score["high"]
    return cell


def as_dict(board: Board, page: Path = STANDINGS) -> dict[str, Any]:
    """The board as JSON-like values; links are relative to the folder `page`."""
    return {
        "edition": board.edition,
        "primary": board.primary,
        "ranking": EDITIONS[board.edition].ranking,
        "metrics": board.metrics,
        "standings": [vars(row) for row in board.standings],
        "runs": [_entry(board, entry, page) for entry in board.entries],
        "table_3": table_3(board),
    }


def _entry(board: Board, entry: Entry, page: Path) -> dict[str, Any]:
    record = entry.record
    links = {name: entry.folder / name for name in ("config.yaml", "report.html")}
    return {
        "experiment": record["name"],
        "run": entry.run,
        "split": entry.split,
        "rank": board.rank(entry),
        "apart": entry.apart,
        "scores": {metric: _score(score) for metric, score in entry.scores.items()},
        "beats": board.beats(entry),
        "image_gap": (record["image_gap"] or {}).get("rouge1") if entry.split == "valid" else None,
        "seed": record["seed"],
        "status": record["status"],
        "date": record["ended"] or record["started"],
        "commit": record["git"]["commit"],
        "dirty": record["git"]["dirty"],
        "command": record["command"],
        "links": {
            name: quote(os.path.relpath(path, page).replace(os.sep, "/"))
            for name, path in links.items()
            if path.exists()
        },
        "mlflow": _mlflow(entry),
    }


def _score(score: Mapping[str, Any]) -> dict[str, Any]:
    return {key: score.get(key) for key in (*_VALUES, "reason")}


def _mlflow(entry: Entry) -> list[dict[str, str | None]]:
    """Where the run is mirrored: server, run id and, where the server has pages, a link."""
    file = entry.folder.parent / STATE
    servers = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = []
    for server, state in servers.items():
        run = state.get("runs", {}).get(entry.folder.name, {}).get("run_id")
        if run:
            local = server.startswith("sqlite:")  # `mlflow ui` in the project folder shows it there
            site = "http://127.0.0.1:5000" if local else server.rstrip("/")
            link = f"{site}/#/runs/{run}" if site.startswith(("http://", "https://")) else None
            found.append({"server": "mlflow ui" if local else server, "run": run, "link": link})
    return found


def rows(boards: Sequence[Board]) -> list[list[Any]]:
    """The boards as CSV rows with a header: one for each official row or run, and metric."""
    header = ["edition", "split", "kind", "rank", "name", "run", "metric", *_VALUES, "apart"]
    table: list[list[Any]] = [[*header, "seed", "date", "commit", "command", "source"]]
    for board in boards:
        for row in board.standings:
            for metric, value in row.scores.items():
                start = [board.edition, "test", "team", row.rank, row.team, row.run, metric, value]
                table.append([*start, "", "", "", True, "", "", "", "", "", "", row.source])
        for entry in board.entries:
            record = entry.record
            end = [record["seed"], record["ended"], record["git"]["commit"], record["command"], ""]
            start = [board.edition, entry.split, "run", board.rank(entry), record["name"], entry.run]
            for metric, score in entry.scores.items():
                table.append([*start, metric, *(score[key] for key in _VALUES), entry.apart, *end])
    return table


def write_page(boards: Sequence[Board], folder: Path = STANDINGS) -> Path:
    """Write `index.html`: one file that needs neither network nor server."""
    data = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "boards": [as_dict(board, folder) for board in boards],
    }
    return write(folder / PAGE, filled("leaderboard.html", data))
