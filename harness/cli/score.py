"""`harness score`: score captions or concepts, from a file or a run, against references."""

import csv
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli import outputs
from harness.cli import verified as verification
from harness.cli.terminal import DeviceOption, Format, OfTask, Output, ScoreSets, Task, Terminal, run_by_name
from harness.config.editions import DEFAULT, SPAN
from harness.errors import Problem, UserError
from harness.output.visible import is_terminal, json_text, print_csv

if TYPE_CHECKING:
    from harness.metrics import Score

_KEYS = ("value", "low", "high", "n", "signature", "official", "seconds")


def score(
    predictions: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTIONS", help="A submission of any edition, or a run.", callback=run_by_name
        ),
    ],
    references: Annotated[
        Path | None, typer.Option(help="A label file or submission; by default those of the run.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of {ID}.jpg or .png; CLIPScore needs it.")
    ] = None,
    edition: Annotated[
        int | None,
        typer.Option(help=f"Edition of the metrics, {SPAN}; by default the run's, else {DEFAULT}."),
    ] = None,
    names: Annotated[
        str | None, typer.Option("--metrics", metavar="A,B", help="By default those of the edition.")
    ] = None,
    standins: Annotated[
        bool, typer.Option("--standins", help="Use stand-ins if official weights are missing.")
    ] = False,
    of: OfTask = None,
    manual: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Manually validated concepts, for the secondary concept score."),
    ] = None,
    sets: ScoreSets = None,
    device: DeviceOption = None,
    per_image: Annotated[
        Path | None, typer.Option(metavar="OUT.csv", help="Write the score of each image.")
    ] = None,
    verify: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Compare N rows with the original packages; 1e-5 is allowed."),
    ] = None,
    output: Output = Format.table,
) -> None:
    """Score captions, or concepts, as the organisers do, each score with its interval and signature.

    The format of each file is detected. A score that can't be computed here is absent, with its reason.

    Example: harness score run.csv --references valid_labels.csv
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from harness import scoring
    from harness.machine.device import rank
    from harness.records import root as run_root

    run = scoring.find_run(predictions)
    task = task_of(of, run and run[1])
    of_captions = {"--metrics": names is not None, "--images": images is not None, "--standins": standins}
    _check_task(task, [option for option, given in of_captions.items() if given], manual)
    year = edition_of(edition, run)
    if per_image is not None:
        read = [file for file in (predictions, references, manual) if file is not None]
        read += [run_root(*run) / name for name in run[1]["artifacts"].values()] if run else []
        outputs.check({"--per-image": per_image}, read)
    config = scoring.settings(year, metric_names(names), standins, sets or (), run)
    rows = scoring.rows(predictions, references, images, task.value)
    say = Terminal().say
    for line in (*rows.inputs, *scoring.passed_over(run, config)) if rank() == 0 else ():
        say(line)
    if task is Task.concept:
        validated = scoring.rows(predictions, manual, task=task.value) if manual else None
        scores, warnings = scoring.score_concepts(rows, validated, year, config.bootstrap)
    else:
        on = device.value if device else "auto"
        scores, warnings = scoring.score(rows, config, year, on)
    if rank():
        return
    verified = None
    if verify and task is Task.concept:
        verified = scoring.verified_concepts(rows, validated, year, scores, verify)
    elif verify:
        say(f"verifying {min(verify, len(rows.ids)):,} rows by the original packages, one pair at a time")
        verified = scoring.verified(rows, config, year, scores, verify, on)
    if output is Format.json:
        found = {name: _plain(score) for name, score in scores.items()}
        result = {"edition": year, "n": len(rows.ids), "scores": found, "warnings": warnings}
        result |= {"inputs": rows.inputs} | ({"verified": verification.plain(verified)} if verified else {})
        print(json_text(result, allow_nan=False))
    else:
        _print_csv(scores) if output is Format.csv else _print_table(scores)
        for warning in warnings:
            say(f"warning: {warning}")
        if verified:
            table = verification.lines(verified, verify or 0, len(rows.ids))
            print("\n".join(table), file=sys.stderr if output is Format.csv else sys.stdout)
    if per_image is not None:
        from harness.metrics import write_per_image

        say(f"per image: {write_per_image(per_image, rows.ids, rows.references, rows.predictions, scores)}")
    if verified:
        verification.judge(verified)


def edition_of(edition: int | None, run: tuple[Path, Mapping[str, Any]] | None) -> int:
    """The edition of the option, else the run's, else `DEFAULT`; raises `UserError` for an unknown one."""
    from harness.config.editions import EDITIONS

    if edition is None:
        return run[1]["edition"] if run else DEFAULT
    if edition not in EDITIONS:
        allowed = ", ".join(map(str, EDITIONS))
        raise UserError([Problem(f"got {edition}; there are {allowed}", key="--edition")])
    return edition


def task_of(task: Task | None, record: Mapping[str, Any] | None) -> Task:
    """The task of the option, else the run's, else captions."""
    from harness import records

    return task or (Task.concept if record and records.task_of(record) == "concepts" else Task.caption)


def metric_names(names: str | None) -> list[str] | None:
    """The names in `--metrics A,B`, with or without blanks between them."""
    return None if names is None else [name.strip() for name in names.split(",")]


def _check_task(task: Task, of_captions: Sequence[str], manual: Path | None) -> None:
    """Raise `UserError` for every given option that belongs to the other task."""
    problems = []
    if task is Task.concept:
        problems = [Problem("is for captions; leave it out", key=option) for option in of_captions]
    elif manual is not None:
        problems = [Problem("is for concepts; add --task concept", key="--manual")]
    if problems:
        raise UserError(problems)


def _plain(score: "Score") -> dict[str, Any]:
    values = {key: getattr(score, key) for key in _KEYS} | {"seconds": round(score.seconds, 3)}
    return values | ({"reason": score.reason} if score.reason else {})


def _print_csv(scores: Mapping[str, "Score"]) -> None:
    columns = ("value", "low", "high", "n", "official", "signature", "reason")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["metric", *columns])
    for name, score in scores.items():
        found = [getattr(score, column) for column in columns]
        table.writerow([name, *("" if value is None else value for value in found)])
    print_csv(text.getvalue())


def _print_table(scores: Mapping[str, "Score"]) -> None:
    """Print one line per metric; on a narrow terminal the signature goes below."""
    columns = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
    width = max(map(len, scores), default=0)
    shown = max((len(_number(score)) for score in scores.values()), default=0)
    for name, score in scores.items():
        if score.value is None:
            head, tail = f"{name:<{width}}", f"absent: {score.reason}"
        else:
            head, tail = f"{name:<{width}}  {_number(score):<{shown}}  n={score.n}", score.signature
        if columns is None or len(head) + 2 + len(tail) <= columns:
            print(f"{head}  {tail}")
        else:
            print("\n".join([head, *_folded(tail, columns, " " * (width + 2))]))
    if any(score.value is not None and not score.official for score in scores.values()):
        from harness.cli.tables import NOT_COMPARABLE

        print(NOT_COMPARABLE)


def _number(score: "Score") -> str:
    if score.value is None:
        return ""
    star = "" if score.official else "*"
    interval = f" [{score.low:.4f}, {score.high:.4f}]" if score.low is not None else ""
    return f"{score.value:.4f}{interval}{star}"


def _folded(text: str, columns: int, indent: str) -> Iterator[str]:
    """A signature broken after a `|`, or other text broken between words, in indented lines."""
    if " " in text and "|" not in text:
        yield from textwrap.wrap(text, columns, initial_indent=indent, subsequent_indent=indent)
        return
    line = indent
    for part in text.replace("|", "|\n").split("\n"):
        if len(line) + len(part) > columns and line.strip():
            yield line
            line = indent
        line += part
    yield line
