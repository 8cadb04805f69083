"""The leaderboard: our runs and the official standings, as values for tables, files and a page."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.leaderboard.entries import (
    SPLITS,
    STANDINGS,
    TASKS,
    WHOLE,
    Board,
    Entry,
    Standing,
    board,
    editions,
    read_standings,
)
from harness.leaderboard.places import among_ours, official, ranked_text
from harness.leaderboard.table3 import steps, table_3
from harness.pages import filled, link
from harness.records import CONCEPTS
from harness.records.status import failure_of, status_of
from harness.store import fingerprint, write
from harness.tracking.bookkeeping import mirrored_as, site_of

__all__ = [
    "CONCEPTS",
    "SPLITS",
    "TASKS",
    "WHOLE",
    "Board",
    "Entry",
    "Standing",
    "among_ours",
    "as_dict",
    "board",
    "editions",
    "official",
    "over_seeds",
    "ranked_text",
    "read_standings",
    "rows",
    "steps",
    "table_3",
    "write_page",
]

PAGE = "index.html"


def as_dict(board: Board, page: Path = STANDINGS) -> dict[str, Any]:
    """The board as JSON-like values; links are relative to the folder `page`.

    Only a board of concepts has a `task`: programs that read captions find what they always found.
    """
    ranks, why = among_ours(board)
    return {
        **({"task": board.task} if board.task == CONCEPTS else {}),
        "edition": board.edition,
        "primary": board.primary,
        "half": board.half,
        "ranking": board.ranking,
        "known": board.known,
        "without_intervals": why,
        "metrics": board.metrics,
        "standings": [vars(row) for row in board.standings],
        "runs": [_entry(board, entry, page, ranks) for entry in board.entries],
        "left_out": [str(problem) for problem in board.left_out],
        "seeds": over_seeds(board),
        "table_3": table_3(board),
        "table_3_steps": steps(board),
    }


def over_seeds(board: Board) -> list[dict[str, Any]]:
    """Mean and standard deviation (n - 1) over two or more runs that differ only in their seed.

    A metric has a `reason` instead if a run lacks it or if the runs did not compute it in the same way.
    """
    groups: dict[Any, list[Entry]] = {}
    for entry in board.entries:
        rest = {key: value for key, value in entry.record["parameters"].items() if key != "seed"}
        key = (entry.folder.parent, entry.record["variant"], entry.split, fingerprint(rest))
        groups.setdefault(key, []).append(entry)
    return [
        {
            "experiment": group[0].record["name"],
            "variant": group[0].record["variant"],
            "split": group[0].split,
            "seeds": sorted(entry.record["seed"] for entry in group),
            "scores": {metric: _spread(group, metric) for metric in group[0].scores},
        }
        for group in groups.values()
        if len(group) > 1
    ]


def _spread(group: Sequence[Entry], metric: str) -> dict[str, Any]:
    lacking = sorted(entry.record["seed"] for entry in group if entry.value(metric) is None)
    if lacking:
        return {"mean": None, "reason": f"absent for seed {', '.join(map(str, lacking))}"}
    scores = [entry.scores[metric] for entry in group]
    if len({(score["signature"], score["n"]) for score in scores}) > 1:
        return {"mean": None, "reason": "the seeds have different signatures or numbers of images"}
    values = [score["value"] for score in scores]
    found = {"mean": statistics.fmean(values), "sd": statistics.stdev(values)}
    shared = ("n", "official", "signature", "tuned")
    return found | {key: scores[0][key] for key in shared if key in scores[0]}


def _entry(board: Board, entry: Entry, page: Path, ranks: Mapping[Path, tuple[int, int]]) -> dict[str, Any]:
    record, rank = entry.record, board.rank(entry)
    ends = ranks.get(entry.folder) if entry.split == "valid" else None
    links = {name: entry.folder / name for name in ("config.yaml", "report.html")}
    return {
        "experiment": record["name"],
        "run": entry.run,
        "split": entry.split,
        "rank": rank,
        "rank_best": ends[0] if ends else None,
        "rank_worst": ends[1] if ends else None,
        "rank_text": ranked_text(rank, ends) if rank and entry.split == "valid" else None,
        "place": official(board, entry),
        "apart": entry.apart,
        "scores": {metric: entry.score(metric) for metric in entry.scores},
        "beats": board.beats(entry),
        "image_gap": _gap(entry),
        "seed": record["seed"],
        "status": status_of(record, None),
        "failure": failure_of(record),
        "date": record["ended"] or record["started"],
        "commit": record["git"]["commit"],
        "dirty": record["git"]["dirty"],
        "command": record["command"],
        "links": {name: link(path, page) for name, path in links.items() if path.exists()},
        "mlflow": _mlflow(entry),
    }


def _gap(entry: Entry) -> dict[str, Any] | None:
    """The image gap of captions on validation."""
    if entry.task == CONCEPTS or entry.split != "valid":
        return None
    return (entry.record["image_gap"] or {}).get("rouge1")


def _mlflow(entry: Entry) -> list[dict[str, str | None]]:
    """Where the run is mirrored: server, run id and, if the server has web pages, a link."""
    found = []
    for server, run in mirrored_as(entry.folder).items():
        local = server.startswith("sqlite:")  # `mlflow ui` in the project folder shows it there
        site = site_of(server)
        link = f"{site}/#/runs/{run}" if site else None
        found.append({"server": "mlflow ui" if local else server, "run": run, "link": link})
    return found


_COLUMNS = (
    "edition",
    "split",
    "half",
    "kind",
    "rank",
    "name",
    "run",
    "metric",
    "value",
    "low",
    "high",
    "sd",
    "n",
)
_COLUMNS += ("official", "signature", "reason", "apart", "seed", "date", "commit", "dirty", "command")
_COLUMNS += ("config.yaml", "report.html", "mlflow", "source", "rank_best", "rank_worst", "place")


def rows(boards: Sequence[Board]) -> list[list[Any]]:
    """The boards as CSV rows with a header: one row for each metric of a team, a run or a group of seeds.

    Links are relative to the working folder. With a board of concepts, the last column is the task.
    """
    columns = [*_COLUMNS, "task"] if any(board.task == CONCEPTS for board in boards) else list(_COLUMNS)
    found = (row | {"task": board.task} for board in boards for row in _rows(board))
    return [columns, *([row.get(column) for column in columns] for row in found)]


def _rows(board: Board) -> Iterator[dict[str, Any]]:
    for row in board.standings:
        team = {"edition": board.edition, "split": "test", "kind": "team", "name": row.team, "official": True}
        team |= {"rank": row.rank, "run": row.run, "source": row.source}
        for metric, value in row.scores.items():
            yield team | {"metric": metric, "value": value}
    ranks, _ = among_ours(board)
    for entry in board.entries:
        run = _entry(board, entry, Path(), ranks)
        run["place"] = (run["place"] or {}).get("text")
        run |= {"edition": board.edition, "kind": "run", "name": run["experiment"]}
        run |= run["links"]
        run["mlflow"] = " ".join(place["link"] or place["run"] for place in run["mlflow"])
        for metric, score in run["scores"].items():
            yield run | score | {"metric": metric, "half": _half(board, entry.split, metric)}
    for group in over_seeds(board):
        mean = {
            "edition": board.edition,
            "split": group["split"],
            "kind": "seeds",
            "name": group["experiment"],
        }
        mean |= {"run": group["variant"], "seed": " ".join(map(str, group["seeds"]))}
        for metric, score in group["scores"].items():
            half = _half(board, group["split"], metric)
            yield mean | score | {"metric": metric, "value": score["mean"], "half": half}


def _half(board: Board, split: str, metric: str) -> str | None:
    """The half of validation that a score is of."""
    return None if split == "test" or metric == WHOLE else board.half


def write_page(boards: Sequence[Board], folder: Path = STANDINGS) -> Path:
    """Write `index.html`, one file that needs neither network nor server -> its path."""
    data = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "boards": [as_dict(board, folder) for board in boards],
    }
    return write(folder / PAGE, filled("leaderboard.html", data))
