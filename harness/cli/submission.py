"""`harness submission`: make an official file, or check one."""

import json
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.terminal import Report, ReportFormat, Task
from harness.errors import Problem, UserError
from harness.masking import masked

app = typer.Typer(help="Make official submission files, and check them.", no_args_is_help=True)

Edition = Annotated[int, typer.Option("--edition", help="Year of the edition, 2022 to 2026.")]
IDS_HELP = "The ids to submit, in order: one a line, or the first column of a label file."


class Split(StrEnum):
    """The two splits that are submitted."""

    valid = "valid"
    test = "test"


@app.command("make")
def make(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|PREDICTIONS", help="A run's folder, or a file of captions or concepts."),
    ],
    edition: Annotated[
        int | None, typer.Option(help="Year of the edition, 2022 to 2026; by default the run's.")
    ] = None,
    ids: Annotated[Path | None, typer.Option(help=f"{IDS_HELP} By default the run's.")] = None,
    task: Task = Task.caption,
    split: Annotated[Split, typer.Option(help="Which of a run's predictions; part of the file's name.")] = (
        Split.test
    ),
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Which folder; by default one under submissions/.")
    ] = None,
) -> None:
    """Write an official file with its manifest; exit code 3 where none can be made that would be accepted."""
    from harness import submission
    from harness.records import artifact as run_artifact
    from harness.records import read as run_record
    from harness.submission.inputs import read_ids, read_predictions

    record = run_record(source, ("variant", "seed", "standin_model", "git")) if source.is_dir() else None
    if record is None:
        _require(edition, ids, source)
    elif task is Task.concept:
        raise UserError([Problem("a run predicts captions; give a file of concepts", source, key="--task")])
    file = source
    if record is not None:
        file = run_artifact(source, record, f"predictions/{split.value}_after.csv")
    values = read_predictions(file, task.value)
    year = edition if edition is not None else record["edition"]
    wanted = read_ids(ids) if ids else list(values)
    manifest = _manifest(file, record)
    upload = submission.make(
        values, wanted, year, out or _folder(source, record, year), manifest, split.value, task.value
    )
    print(upload)


def _require(edition: int | None, ids: Path | None, source: Path) -> None:
    if not source.exists():
        hint = "Give the folder of a run, runs/<experiment>/<variant>-s<seed>, or a file of predictions."
        raise UserError([Problem("no such file or folder", source, hint=hint)])
    missing = [key for key, value in (("--edition", edition), ("--ids", ids)) if value is None]
    if missing:
        raise UserError([Problem("is needed for a file of predictions", key=key) for key in missing])


def _manifest(file: Path, record: dict[str, Any] | None) -> dict[str, Any]:
    import hashlib

    from harness.run import git_state

    found: dict[str, Any] = {
        "predictions": os.path.relpath(file),
        "predictions_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "command": masked(f"python -m harness {shlex.join(sys.argv[1:])}"),
        "commit": git_state(),
    }
    if record is None:
        return found
    return found | {
        "run": _run_name(record),
        "standin_model": record["standin_model"],
        "run_command": record["command"],
        "commit": record["git"],
        "config": record["config"],
    }


def _run_name(record: dict[str, Any]) -> str:
    return f"{record['name']}/{record['variant']}-s{record['seed']}"


def _folder(source: Path, record: dict[str, Any] | None, edition: int) -> Path:
    """Beside what the run itself submitted; a folder of its own for an edition that is not the run's."""
    from harness.run import SUBMISSIONS

    if record is None:
        return SUBMISSIONS / source.stem
    folder = SUBMISSIONS / _run_name(record)
    return folder if edition == record["edition"] else folder / str(edition)


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="The submission: text file or zip.")],
    edition: Edition,
    ids: Annotated[Path, typer.Option(help=IDS_HELP)],
    task: Task = Task.caption,
    fix: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT", dir_okay=False, help="Write the file with all mended that needs no new word."
        ),
    ] = None,
    output: ReportFormat = Report.table,
) -> None:
    """Print every reason for which a file would be refused or misread; exit code 3 if there are any.

    With --fix the exit code says whether OUT is valid.
    """
    from harness import submission
    from harness.submission.inputs import read_ids

    wanted = read_ids(ids)
    problems = submission.check(file, wanted, edition, task.value)
    mended = submission.fix(file, fix, wanted, edition, task.value) if fix else []
    left = submission.check(fix, wanted, edition, task.value) if fix else problems
    if output is Report.json:
        result: dict[str, Any] = {"file": str(file), "valid": not problems, "problems": _plain(problems)}
        if fix:
            result |= {"out": str(fix), "mended": mended, "out_valid": not left, "left": _plain(left)}
        print(json.dumps(result, indent=1, ensure_ascii=False))
        if left:
            sys.exit(3)
        return
    for line in mended:
        print(f"mended: {line}")
    if fix:
        print(f"wrote {fix}")
    if left:
        raise UserError(left, exit_code=3)
    print(f"ok: {len(wanted)} rows, valid for {edition}")


def _plain(problems: list[Problem]) -> list[dict[str, Any]]:
    return [{"line": p.line, "what": p.what, "fix": p.hint} for p in problems]
