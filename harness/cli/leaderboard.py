"""`harness leaderboard`: our runs beside the official standings."""

import csv
import io
import json
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from harness.leaderboard import Board, Entry


class BoardFormat(StrEnum):
    """How the leaderboard is given."""

    table = "table"
    csv = "csv"
    json = "json"
    html = "html"


def leaderboard(
    edition: Annotated[
        int | None, typer.Option(help="Year of the edition; by default all that have standings or runs.")
    ] = None,
    output: Annotated[
        BoardFormat, typer.Option("--format", help="html writes leaderboard/index.html.")
    ] = BoardFormat.table,
) -> None:
    """Official standings (test) and our runs (validation), each with a rank or the reason for none."""
    from harness import leaderboard as boards
    from harness.plan import RUNS

    years = [edition] if edition is not None else boards.editions(RUNS)
    found = [boards.board(year, RUNS) for year in years]
    if output is BoardFormat.html:
        print(boards.write_page(found))
    elif output is BoardFormat.json:
        print(json.dumps([boards.as_dict(board) for board in found], indent=1, ensure_ascii=False))
    elif output is BoardFormat.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(boards.rows(found))
        print(text.getvalue(), end="")
    else:
        _print(found)


def _print(boards: Sequence["Board"]) -> None:
    from rich.console import Console

    from harness.leaderboard import SPLITS

    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    for board in boards:
        _standings(console, board)
        ranked = [e for e in board.entries if not e.apart and e.split == "valid"]
        if ranked:
            _runs(console, board, ranked, f"{board.edition}: our runs, validation (ranked among each other)")
        for entry in ranked:
            for line in (*_origin(board, entry), *_beaten(board, entry)):
                console.print(line, markup=False)
        apart = [e for e in board.entries if e.apart]
        if apart:
            _runs(console, board, apart, f"{board.edition}: our runs that are not ranked")
        for entry in apart:
            console.print(f"{_name(entry)} ({SPLITS[entry.split]}): {entry.apart}", markup=False)
        if not board.entries:
            console.print(f"{board.edition}: no runs yet", markup=False)
    console.print("As a page: python -m harness leaderboard --format html", markup=False)


def _standings(console: Any, board: "Board") -> None:
    """The official rows and our runs on test in one table."""
    from rich.markup import escape

    ours = [e for e in board.entries if e.split == "test" and not e.apart]
    if not board.standings and not ours:
        console.print(f"{board.edition}: no official standings at hand", markup=False)
        return
    table = _table(board, f"{board.edition}: official standings, test (the {len(board.standings)} at hand)")
    last = max((row.rank for row in board.standings), default=0)
    lines = [
        (row.rank, False, [str(row.rank), escape(row.team), row.run, *_official(board, row)])
        for row in board.standings
    ]
    for entry in ours:
        rank = board.rank(entry)
        cells = [f"({rank})" if rank else f"(>{last})", escape(entry.record["name"]), escape(entry.run)]
        lines.append((rank or last + 1, True, [*cells, *_cells(board, entry)]))
    for _, _, cells in sorted(lines, key=lambda line: (line[0], not line[1])):
        table.add_row(*cells)
    console.print(table)


def _official(board: "Board", row: Any) -> list[str]:
    return [f"{row.scores[name]:.4f}" if name in row.scores else "-" for name in board.metrics]


def _runs(console: Any, board: "Board", entries: Sequence["Entry"], title: str) -> None:
    from rich.markup import escape

    table = _table(board, title)
    for entry in entries:
        rank = board.rank(entry)
        name = [str(rank) if rank else "-", escape(entry.record["name"]), escape(entry.run)]
        table.add_row(*name, *_cells(board, entry))
    console.print(table)


def _table(board: "Board", title: str) -> Any:
    from rich.table import Table

    table = Table("rank", "name", "run", title=title, title_justify="left")
    for name in board.metrics:
        table.add_column(name, justify="right")
    return table


def _cells(board: "Board", entry: "Entry") -> list[str]:
    from harness.tables import cell

    return [cell(entry.scores.get(name)) for name in board.metrics]


def _origin(board: "Board", entry: "Entry") -> list[str]:
    """Interval and origin of a ranked run; the page has those of every score."""
    record, score = entry.record, entry.scores[board.primary or ""]
    interval = f" [{score['low']:.4f}, {score['high']:.4f}]" if score["low"] is not None else ""
    commit = (record["git"]["commit"] or "no commit")[:10] + (
        " (changed since)" if record["git"]["dirty"] else ""
    )
    return [
        f"{_name(entry)}: {board.primary} {score['value']:.4f}{interval}",
        f"  {record['ended']}  {commit}  {record['command']}",
    ]


def _beaten(board: "Board", entry: "Entry") -> list[str]:
    beaten = board.beats(entry)
    if not beaten:
        return []
    head = f"{_name(entry)}, hypothetical: its validation scores exceed the test scores of"
    return [head, *(f"  {metric}: {', '.join(teams) or 'none'}" for metric, teams in beaten.items())]


def _name(entry: "Entry") -> str:
    return f"{entry.record['name']}/{entry.run}"
