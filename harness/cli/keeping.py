"""`harness ls`, `rm` and `gc`: which runs there are, and what can be deleted."""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.terminal import Format, Output
from harness.cli.widths import Column, Row, Sheet
from harness.errors import UserError
from harness.output.program import short, spelled
from harness.output.visible import console, is_terminal, json_text, print_csv

if TYPE_CHECKING:
    from harness.keeping.listing import Row as Run


class Sort(StrEnum):
    """What runs are sorted by."""

    date = "date"
    name = "name"
    status = "status"
    score = "score"
    gap = "gap"
    size = "size"


class Status(StrEnum):
    """How far a run is."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"
    PRUNED = "PRUNED"


def _print_version(wanted: bool) -> None:
    from importlib import metadata

    from harness.machine.environment import PACKAGES, git_state

    if wanted:
        git = git_state()
        changed = ", with changes" if git["dirty"] else ""
        commit = f" at commit {git['commit'][:12]}{changed}" if git["commit"] else ""
        print(f"harness {metadata.version(PACKAGES[0])}{commit}")
        raise typer.Exit


def version(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command without a subcommand."""


Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def ls(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME ...", help="Runs or experiments, with * for any text; by default all."),
    ] = None,
    status: Annotated[
        list[Status] | None,
        typer.Option("--status", help="Only these; repeat it for several.", case_sensitive=False),
    ] = None,
    sort: Annotated[Sort, typer.Option("--sort", help="Best, largest and newest first.")] = Sort.date,
    metric: Annotated[
        str | None, typer.Option("--metric", help="By default what ranks runs of their edition.")
    ] = None,
    trials: Annotated[bool, typer.Option("--trials", help="Trials of studies and of best, too.")] = False,
    archived: Annotated[bool, typer.Option("--archived", help="Runs that others replaced, too.")] = False,
    output: Output = Format.table,
) -> None:
    """List the runs: status, primary score on validation, image gap, size, date, and why one failed.

    A run's size includes its steps. Runs share equal steps, so the sizes may add up to more than the total.

    Example: harness ls quickstart --sort score
    """
    from harness.keeping import listing
    from harness.store import RUNS, gb

    found, left_out = listing.rows(runs or (), status or (), sort.value, metric, trials, archived)
    for problem in left_out:
        print(f"left out: {problem}", file=sys.stderr)
    if output is Format.json:
        print(json_text([asdict(row) for row in found]))
    elif output is Format.csv:
        print_csv(_csv(found))
    elif found:
        _table(found)
        console().print(f"{RUNS}/ has {gb(listing.size(RUNS))} in all")
    else:
        print(
            spelled(
                "No such runs; all: harness ls" if runs or status else "No runs yet: harness run quickstart"
            )
        )


def _table(rows: Sequence["Run"]) -> None:
    """A line for each run; below it the reason why it failed."""
    from harness.cli.tables import NOT_COMPARABLE, cell
    from harness.store import gb

    metrics = {row.metric for row in rows}
    one = next(iter(metrics)) if len(metrics) == 1 else None
    columns = [Column("run"), Column("status", 1), Column(one or "score", 0), Column("image gap", 3)]
    columns += [Column("size", 4), Column("ended", 2)]
    lines = []
    for row in rows:
        gap = "-" if row.gap is None else f"{row.gap:+.4f}"
        score = cell(row.score) if one or not row.score else f"{row.metric} {cell(row.score)}"
        when = row.moment[:16].replace("T", " ")
        lines.append(Row([row.run, row.status, score, gap, gb(row.size), when]))
    screen = console()
    Sheet(f"{len(rows)} run{'s' * (len(rows) != 1)}", columns, lines).show(screen)
    for row in rows:
        if row.why:
            screen.print(f"{row.run}: {row.why}")
    if any(row.score and not row.score["official"] for row in rows):
        screen.print(NOT_COMPARABLE)
    if any(row.standin_model for row in rows):
        names = ", ".join(dict.fromkeys(row.run.rpartition("/")[0] for row in rows if row.standin_model))
        screen.print(f"captions by a STAND-IN model: {names}")


def _csv(rows: Sequence["Run"]) -> str:
    text = io.StringIO()
    columns = (
        "run",
        "status",
        "edition",
        "metric",
        "value",
        "low",
        "high",
        "official",
        "gap",
        "size",
        "moment",
    )
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "standin_model", "why"])
    for row in rows:
        values = asdict(row) | dict(row.score or {})
        cells = [values.get(name) for name in (*columns, "standin_model", "why")]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def rm(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN ...", help="Runs, such as quickstart/opt_224-s42.")
    ],
    yes: Yes = False,
) -> None:
    """Delete runs with their submissions; steps, MLflow's runs and other runs stay.

    Example: harness rm quickstart/opt_224-s42
    """
    from harness.keeping import cleaning
    from harness.store import gb

    found = cleaning.removals(runs)
    for one in found:
        print(f"{one.run}: deletes {', '.join(map(short, one.folders))} ({gb(one.size)})")
        for what in one.stays:
            print(f"  stays: {what}")
    if not yes and not is_terminal(sys.stdin):
        raise UserError("nobody can be asked here; give --yes to delete without a question")
    if yes or typer.confirm(f"Delete {len(found)} runs?" if len(found) > 1 else "Delete this run?"):
        for one in found:
            cleaning.remove(one)
            print(f"deleted {one.run}")


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted.")] = False,
    yes: Yes = False,
) -> None:
    """Delete steps, checkpoints and caches that no run needs; on a terminal it asks first.

    It keeps what a running process uses. Scores in the cache stay: they are small and save much time.

    Example: harness gc --dry-run
    """
    from harness.keeping import cleaning
    from harness.store import gb

    found = cleaning.unneeded()
    for item in found:
        print(f"{gb(item.size):>8}  {item.kind:16}  {item.path}")
    total = gb(sum(item.size for item in found))
    if not found:
        print("Nothing to delete: runs need all steps that there are.")
    elif dry_run:
        print(spelled(f"{total} in all; nothing was deleted. Delete it: harness gc"))
    elif yes or not is_terminal(sys.stdin) or typer.confirm(f"Delete {total}?"):
        done, kept = cleaning.delete(found)
        print(f"deleted {gb(sum(item.size for item in done))}")
        for item in kept:
            print(f"kept, a process uses it: {item.path}")
