"""`harness submission`: make an official file, or check one."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli import outputs
from harness.cli.terminal import OfTask, Report, ReportFormat, Task, command_line, run_by_name
from harness.config.editions import FORMATS
from harness.errors import Problem, UserError
from harness.output.visible import json_text, one_line

app = typer.Typer(
    help="Make official submission files, and check them.\n\n"
    "Example: harness submission make runs/quickstart/opt_364-s42",
    no_args_is_help=True,
)

Edition = Annotated[int, typer.Option("--edition", help=f"Year of the edition: {FORMATS}.")]
IDS_HELP = "The ids to submit, in order: one a line, or the first column of a label file."


class Split(StrEnum):
    """The two splits that are submitted."""

    valid = "valid"
    test = "test"


@app.command("make")
def make(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|PREDICTIONS", help="A run, or a file of captions or concepts.", callback=run_by_name
        ),
    ],
    edition: Annotated[
        int | None, typer.Option(help=f"Year of the edition: {FORMATS}; by default the run's.")
    ] = None,
    ids: Annotated[Path | None, typer.Option(help=f"{IDS_HELP} By default the run's.")] = None,
    of: OfTask = None,
    split: Annotated[Split, typer.Option(help="Which of a run's predictions; part of the file's name.")] = (
        Split.test
    ),
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder to write to; by default one under submissions/."),
    ] = None,
) -> None:
    """Write an official file with its manifest; exit code 3 if the organisers would refuse it.

    Example: harness submission make runs/quickstart/opt_364-s42 --edition 2026
    """
    from harness import submission
    from harness.cli.score import task_of
    from harness.data.captionfiles import read_ids
    from harness.records import FINAL, place_of
    from harness.records import read as run_record
    from harness.records.files import sameness
    from harness.submission.runs import predictions

    record = run_record(source, ("variant", "seed", "standin_model", "git")) if source.is_dir() else None
    if record is None:
        _require(edition, ids, source)
    task = task_of(of, record)
    year = edition if edition is not None else record["edition"]
    submission.rules(year, task.value)
    wanted = read_ids(ids) if ids else None
    if record is None:
        file, values = source, _of_file(source, task, wanted)
    else:
        values = predictions(source, record, split.value, wanted, task.value)
        file = place_of(source, record, FINAL[task.value].format(split=split.value))
    manifest = _manifest(file, record, split.value)
    folder = out or _folder(source, record, year)
    outputs.check_folder(folder, "--out")
    upload = submission.make(values, wanted or list(values), year, folder, manifest, split.value, task.value)
    if same := sameness(map(submission.joined, values.values()), submission.plural(task.value)):
        print(f"warning: {same}", file=sys.stderr)
    print(upload)


def _of_file(source: Path, task: Task, ids: Sequence[str]) -> Mapping[str, Any]:
    """The captions or concepts of a file; prints to stderr how the file was read."""
    from harness.data.captionfiles import as_predictions, read, with_ids
    from harness.submission import plural

    found = with_ids(read(source), ids)
    values = as_predictions(found, task.value)
    print(found.described(plural(task.value)), file=sys.stderr)
    for warning in found.warnings:
        print(f"warning: {source.name}: {warning}", file=sys.stderr)
    return values


def _require(edition: int | None, ids: Path | None, source: Path) -> None:
    if not source.exists():
        hint = "Give the folder of a run, runs/<experiment>/<variant>-s<seed>, or a file of predictions."
        raise UserError([Problem("no such file or folder", source, hint=hint)])
    missing = [key for key, value in (("--edition", edition), ("--ids", ids)) if value is None]
    if missing:
        raise UserError([Problem("is needed for a file of predictions", key=key) for key in missing])


def _manifest(file: Path, record: dict[str, Any] | None, split: str) -> dict[str, Any]:
    import hashlib

    from harness.machine.environment import git_state
    from harness.records import full_name

    found: dict[str, Any] = {
        "predictions": os.path.relpath(file),
        # a FIFO can't be read a second time to hash it
        "predictions_sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
        "command": command_line(),
        "commit": git_state(),
    }
    if record is None:
        return found
    return found | {
        "run": full_name(record),
        "standin_model": record["standin_model"],
        "run_command": record["command"],
        "commit": record["git"],
        "config": record["config"],
        "fallback": record.get("fallback", {}).get(split),
    }


def _folder(source: Path, record: dict[str, Any] | None, edition: int) -> Path:
    """The folder of the run's own submission, or a subfolder by year for another edition."""
    from harness.records import full_name
    from harness.run import SUBMISSIONS

    if record is None:
        return SUBMISSIONS / source.stem
    folder = SUBMISSIONS / full_name(record)
    return folder if edition == record["edition"] else folder / str(edition)


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="The submission: text file or zip.")],
    edition: Edition,
    ids: Annotated[Path, typer.Option(help=IDS_HELP)],
    task: Task = Task.caption,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="OUT", dir_okay=False, help="Write a repaired file; no word is added."),
    ] = None,
    output: ReportFormat = Report.table,
) -> None:
    """Print every reason to refuse or misread a file; exit code 3 if there are any.

    With --fix the exit code says whether OUT is valid.

    Example: harness submission check run.zip --edition 2026 --ids ids.csv --fix fixed.zip
    """
    from harness import submission
    from harness.config.yamlfile import no_file
    from harness.data.captionfiles import read_ids

    if what := no_file(file):
        raise UserError([Problem(what, file)])
    outputs.check({"--fix": fix}, [file, ids])
    wanted = read_ids(ids)
    problems = submission.check(file, wanted, edition, task.value)
    repaired = submission.fix(file, fix, wanted, edition, task.value) if fix else []
    left = _by_hand(submission.check(fix, wanted, edition, task.value)) if fix else problems
    doubt = None if left else _doubt(fix or file, task)
    if output is Report.json:
        result: dict[str, Any] = {"file": str(file), "valid": not problems, "problems": _plain(problems)}
        if fix:
            result |= {"out": str(fix), "repaired": repaired, "out_valid": not left, "left": _plain(left)}
        print(json_text(result | {"warnings": [doubt] if doubt else []}))
        if left:
            sys.exit(3)
        return
    for line in repaired:
        print(f"repaired: {one_line(line)}")
    if fix:
        print(f"wrote {one_line(str(fix))}")
    if left:
        raise UserError(left, exit_code=3)
    if doubt:
        print(f"warning: {doubt}", file=sys.stderr)
    print(f"ok: {len(wanted)} rows, valid for {edition}")


def _doubt(file: Path, task: Task) -> str | None:
    """The warning for a valid file whose captions are lists of concepts, or nearly all the same."""
    from harness.data.forms import are_concepts
    from harness.records.files import sameness
    from harness.submission import plural, read

    values = read(file).values()
    if task is Task.caption and are_concepts(values):
        return "the captions are lists of concepts; to check them as such: --task concept"
    return sameness(values, plural(task.value))


def _by_hand(problems: Sequence[Problem]) -> list[Problem]:
    """The problems that --fix could not repair, without the advice to use --fix."""
    from harness.data.forms import REPAIR

    return [replace(p, hint="Repair it by hand.") if p.hint == REPAIR else p for p in problems]


def _plain(problems: list[Problem]) -> list[dict[str, Any]]:
    return [{"line": p.line, "what": p.what, "fix": p.hint} for p in problems]
