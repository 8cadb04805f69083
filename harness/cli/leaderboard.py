"""`harness leaderboard`: our runs and the official standings."""

import csv
import io
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.terminal import HalfOption, Terminal
from harness.cli.widths import Column, Row, Sheet
from harness.output.program import spelled
from harness.output.visible import console, json_text, print_csv

if TYPE_CHECKING:
    from harness.leaderboard import Board, Entry


TUNED = "† on all of validation: the half tune of it chose the thresholds, the half held did not"


class Task(StrEnum):
    """What is predicted."""

    captions = "captions"
    concepts = "concepts"


class BoardFormat(StrEnum):
    """How the leaderboard is given."""

    table = "table"
    csv = "csv"
    json = "json"
    html = "html"


def leaderboard(
    edition: Annotated[
        int | None, typer.Option(help="Year of the edition; by default all with standings or runs.")
    ] = None,
    task: Annotated[
        Task | None, typer.Option(help="Captions or concepts alone; by default both, where there are any.")
    ] = None,
    output: Annotated[
        BoardFormat, typer.Option("--format", help="html writes leaderboard/index.html.")
    ] = BoardFormat.table,
    everything: Annotated[
        bool, typer.Option("--all", help="Include the trials of studies and of best.")
    ] = False,
    half: HalfOption = None,
) -> None:
    """Show official standings (test) and our runs (validation), each with a rank or the reason for none.

    Example: harness leaderboard --edition 2023 --format html
    """
    from harness import leaderboard as boards
    from harness.store import RUNS

    found = []
    for name in [task.value] if task else boards.TASKS:
        years = boards.editions(RUNS, trials=everything, task=name)
        if edition is not None:
            asked = task is not None or name != boards.CONCEPTS or edition in years
            years = [edition] if asked else []
        found += [boards.board(year, RUNS, trials=everything, half=half, task=name) for year in years]
    for problem in dict.fromkeys(problem for board in found for problem in board.left_out):
        Terminal().say(f"left out: {problem}")
    if output is BoardFormat.html:
        print(boards.write_page(found))
    elif output is BoardFormat.json:
        print(json_text([boards.as_dict(board) for board in found]))
    elif output is BoardFormat.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(boards.rows(found))
        print_csv(text.getvalue())
    else:
        _print(found)


def _print(boards: Sequence["Board"]) -> None:
    from harness.cli.tables import NOT_COMPARABLE
    from harness.leaderboard import SPLITS, among_ours

    screen = console()
    for board in boards:
        _standings(screen, board)
        ranked = [e for e in board.entries if not e.apart and e.split == "valid"]
        if ranked:
            where = f"validation{_half(board)} (ranked among each other)"
            _runs(screen, board, ranked, f"{_title(board)}: our runs, {where}")
        for split, word in SPLITS.items():
            apart = [e for e in board.entries if e.apart and e.split == split]
            if apart:
                where = word + (_half(board) if split == "valid" else "")
                _runs(screen, board, apart, f"{_title(board)}: our runs, {where}, not ranked")
                _why(screen, apart)
        _seeds(screen, board)
        ranks, why = among_ours(board)
        if why:
            screen.print(f"{_title(board)}: ranks among our runs have no interval: {why}")
        for entry in board.entries:
            ends = ranks.get(entry.folder) if entry.split == "valid" else None
            for line in (*_origin(board, entry, ends), *_beaten(board, entry)):
                screen.print(spelled(line), soft_wrap=True)  # a command is copied whole
        if not board.entries:
            screen.print(f"{_title(board)}: no runs yet")
    if any(_starred(entry) for board in boards for entry in board.entries):
        screen.print(NOT_COMPARABLE)
    if any(score.get("tuned") for board in boards for e in board.entries for score in e.scores.values()):
        screen.print(TUNED)
    for warning in filter(None, dict.fromkeys(map(_few, boards))):
        screen.print(warning)
    screen.print(spelled("As a page: harness leaderboard --format html"))


def _title(board: "Board") -> str:
    return str(board.edition) if board.task == "captions" else f"{board.edition} {board.task}"


def _half(board: "Board") -> str:
    return f", the {board.half} half" if board.half else ""


def _few(board: "Board") -> str | None:
    """A warning if the smallest of the halves has few images."""
    from harness.scoring.compare import few_images

    counts = [score["n"] for entry in board.entries for score in _whole(board, entry)]
    few = few_images(min(counts), board.half) if board.half and counts else None
    return few and f"warning: {few}"


def _whole(board: "Board", entry: "Entry") -> list[Any]:
    """The scores of an entry over all images of the half; the secondary F1 leaves some out."""
    if board.task == "captions":
        return list(entry.scores.values())
    return [score for name, score in entry.scores.items() if name == board.primary]


def _standings(screen: Any, board: "Board") -> None:
    """Print the official rows and our runs on test in one table."""
    ours = [e for e in board.entries if e.split == "test" and not e.apart]
    if not board.standings and not ours:
        screen.print(f"{_title(board)}: no official standings at hand")
        return
    last = max((row.rank for row in board.standings if row.rank), default=0)
    lines = [
        (row.scores[board.primary], False, [str(row.rank or "-"), row.team, row.run, *_official(board, row)])
        for row in board.standings
    ]
    for entry in ours:
        rank = board.rank(entry)
        place = f"({rank})" if rank else f"(>{last})" if last and board.is_last(entry) else "-"
        cells = [place, entry.record["name"], entry.run, *_cells(board, entry)]
        lines.append((entry.value(board.primary), True, cells))
    title = f"{_title(board)}: official standings, test ({board.known})"
    ordered = sorted(lines, key=lambda line: (-line[0], not line[1]))
    _sheet(board, title, [cells for _, _, cells in ordered]).show(screen)


def _official(board: "Board", row: Any) -> list[str]:
    return [f"{row.scores[name]:.4f}" if name in row.scores else "-" for name in board.metrics]


def _runs(screen: Any, board: "Board", entries: Sequence["Entry"], title: str) -> None:
    found = []
    for entry in entries:
        rank = board.rank(entry)
        found.append([str(rank) if rank else "-", entry.record["name"], entry.run, *_cells(board, entry)])
    _sheet(board, title, found).show(screen)


def _why(screen: Any, apart: Sequence["Entry"]) -> None:
    """Print each reason once, after the names of its runs."""
    for reason in dict.fromkeys(entry.apart for entry in apart):
        names = ", ".join(_name(entry) for entry in apart if entry.apart == reason)
        screen.print(f"{names}: {reason}")


def _seeds(screen: Any, board: "Board") -> None:
    from harness.cli.tables import score_columns
    from harness.leaderboard import SPLITS, over_seeds

    groups = over_seeds(board)
    if not groups:
        return
    title = f"{_title(board)}: over seeds{_half(board)}, mean ± standard deviation (not ranked)"
    names = [name for name in board.metrics if any(name in group["scores"] for group in groups)]
    found = []
    for group in groups:
        seeds = ", ".join(map(str, group["seeds"]))
        cells = [_mean(group["scores"].get(name)) for name in names]
        variant = (group["experiment"], group["variant"], SPLITS[group["split"]])
        found.append(Row([*variant, seeds, *cells]))
    columns = [*map(Column, ("name", "variant", "split", "seeds")), *score_columns(names, board.primary)]
    Sheet(title, columns, found, labels=4).show(screen)


def _mean(score: dict[str, Any] | None) -> str:
    if score is None or score["mean"] is None:
        return "-"
    marks = ("" if score["official"] else "*") + ("†" if score.get("tuned") else "")
    return f"{score['mean']:.4f}{marks}\n±{score['sd']:.4f}"


def _starred(entry: "Entry") -> bool:
    return any(not score["official"] and score["value"] is not None for score in entry.scores.values())


def _sheet(board: "Board", title: str, rows: Sequence[list[str]]) -> Sheet:
    from harness.cli.tables import score_columns

    columns = [*map(Column, ("rank", "name", "run")), *score_columns(board.metrics, board.primary)]
    return Sheet(title, columns, [Row(cells) for cells in rows], labels=3)


def _cells(board: "Board", entry: "Entry") -> list[str]:
    from harness.cli.tables import cell

    scores = [entry.scores.get(name) for name in board.metrics]
    return [cell(score) + ("†" if score and score.get("tuned") else "") for score in scores]


def _origin(board: "Board", entry: "Entry", ends: Sequence[int] | None) -> list[str]:
    """The primary score, rank and place with their intervals, and the time, commit and command of a run."""
    from harness.cli.tables import cell

    record, score = entry.record, entry.scores.get(board.primary or "")
    line = _name(entry)
    if score and score["value"] is not None:
        line += f": {board.primary} {cell(score)}"
        line += f" [{score['low']:.4f}, {score['high']:.4f}]" if score["low"] is not None else ""
    found = [line, *_places(board, entry, ends)]
    changed = " (changed since)" if record["git"]["dirty"] else ""
    commit = (record["git"]["commit"] or "no commit")[:10] + changed
    return [*found, f"  {record['ended'] or record['started']}  {commit}  {record['command']}"]


def _places(board: "Board", entry: "Entry", ends: Sequence[int] | None) -> Iterator[str]:
    """A line with the rank among our runs and the place among the teams, each with its interval."""
    from harness.leaderboard import official, ranked_text

    rank, place = board.rank(entry), official(board, entry)
    parts = []
    if rank and entry.split == "valid":
        parts.append(f"among our runs {ranked_text(rank, ends)}")
    if place:
        parts.append(
            f"among the teams {place['text']}" + (" (hypothetical)" if place["hypothetical"] else "")
        )
    if parts:
        yield "  " + "; ".join(parts)


def _beaten(board: "Board", entry: "Entry") -> list[str]:
    beaten = board.beats(entry)
    if not beaten:
        return []
    hypothetical = ", hypothetical: its validation scores exceed the test scores of"
    head = f"{_name(entry)}{hypothetical if entry.split == 'valid' else ' on test would have beaten'}"
    return [head, *(f"  {metric}: {', '.join(teams) or 'none'}" for metric, teams in beaten.items())]


def _name(entry: "Entry") -> str:
    return f"{entry.record['name']}/{entry.run}"
