"""`harness compare`: which of the differences between runs or files are real."""

import contextlib
import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.terminal import (
    DeviceName,
    DeviceOption,
    Format,
    Half,
    HalfOption,
    OfTask,
    Output,
    ScoreSets,
    Task,
    Terminal,
    runs_by_name,
)
from harness.cli.widths import Column, Row, Sheet
from harness.config.editions import DEFAULT
from harness.errors import Problem, UserError
from harness.output.program import spelled
from harness.output.visible import console, json_text, print_csv

if TYPE_CHECKING:
    from harness.metrics.settings import ScoreConfig
    from harness.scoring import Rows
    from harness.scoring.compare import Difference, System

_OF_EXPERIMENTS = (".json", ".lock", ".log", ".db", ".yaml", ".html", ".png", ".jsonl")
"""The endings of files that MLflow's mirror and studies keep beside runs."""


def compare(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_FILE...",
            help="Runs, or files of captions or concepts; two or more.",
            callback=runs_by_name,
        ),
    ],
    references: Annotated[
        Path | None, typer.Option(help="A label file or submission; needed if a file is compared.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of {ID}.jpg or .png; CLIPScore of files needs it."),
    ] = None,
    edition: Annotated[
        int | None,
        typer.Option(help=f"Edition of the metrics for files; by default the first run's, else {DEFAULT}."),
    ] = None,
    names: Annotated[
        str | None, typer.Option("--metrics", metavar="A,B", help="By default all available.")
    ] = None,
    standins: Annotated[
        bool,
        typer.Option("--standins", help="Score files with stand-ins if official weights are missing."),
    ] = False,
    of: OfTask = None,
    sets: ScoreSets = None,
    device: DeviceOption = None,
    half: HalfOption = None,
    resamples: Annotated[int, typer.Option(min=99, help="Number of random swaps for each p value.")] = 9_999,
    output: Output = Format.table,
) -> None:
    """Show which differences between runs or files are real at 95 %, metric by metric.

    A difference is real if p < 0.05 (Holm-corrected for more than two) and its interval does not contain 0.

    p comes from paired approximate randomisation, the interval from a paired bootstrap.

    The exit code is 1 if nothing can be compared.

    Example: harness compare runs/quickstart/opt_224-s42 runs/quickstart/opt_364-s42
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from harness.cli.score import metric_names
    from harness.machine.device import world_size
    from harness.scoring import compare as comparison

    if world_size() > 1:
        raise UserError("one process compares; start it without torchrun or srun -n")
    sources = _without_others(sources)
    _check(sources, references)
    task = _task(sources, of)
    metrics = metric_names(names)
    systems, files = _read(sources, references, images, task)
    comparison.check_rows(systems)
    comparison.check_resamples(systems, resamples)
    if files:
        year, config = _settings(sources, edition, metrics, standins, sets or ())
        systems = [_scored(system, files, config, year, device, task) for system in systems]
    if half:
        systems = [comparison.on_half(system, half) for system in systems]
    found = comparison.compare(systems, metrics, resamples)
    if output is Format.json:
        result = _as_dict(systems, found, resamples) | {"half": half}
        print(json_text(result, allow_nan=False))
    elif output is Format.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(_csv(systems, found, half))
        print_csv(text.getvalue())
    else:
        _print(systems, found, resamples, half)


def _without_others(sources: Sequence[Path]) -> list[Path]:
    """The sources without what else lies beside runs, so that `runs/x/*` can be given; says what it skips."""
    from harness.records import CONFIG, FILE

    beside = {source.resolve().parent for source in sources if (source / FILE).is_file()}
    skipped = [
        source
        for source in sources
        if source.resolve().parent in beside
        and (source.suffix in _OF_EXPERIMENTS if source.is_file() else not _has(source, FILE, CONFIG))
        and source.exists()
    ]
    if skipped:
        Terminal().say(f"skipped, since they are not runs: {', '.join(map(str, skipped))}")
    return [source for source in sources if source not in skipped]


def _has(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)


def _check(sources: Sequence[Path], references: Path | None) -> None:
    problems = [Problem("no such file or folder", source) for source in sources if not source.exists()]
    hint = spelled("Your runs: harness ls") if problems else None
    resolved = [source.resolve() for source in sources]
    twice = dict.fromkeys(s for s, path in zip(sources, resolved, strict=True) if resolved.count(path) > 1)
    problems += [Problem("given more than once", source) for source in twice]
    if len(sources) < 2 and not problems:
        problems.append(Problem("a comparison needs at least two runs or files", *sources))
    if references is None and any(source.is_file() for source in sources):
        problems.append(Problem("is needed for files of captions", key="--references"))
    if problems:
        raise UserError(problems, hint)


def _task(sources: Sequence[Path], given: Task | None) -> Task:
    """The task to compare: that of the option, else that of all runs, else captions."""
    from harness.cli.score import task_of
    from harness.records import read

    tasks = {}
    for source in filter(Path.is_dir, sources):
        with contextlib.suppress(UserError):  # told later, with all other mistakes
            tasks[source] = task_of(given, read(source))
    if len(set(tasks.values())) > 1:
        problems = [Problem(f"a run of {task}s", source) for source, task in tasks.items()]
        raise UserError(
            problems, "Compare runs of one task; --task concept compares concepts beside captions."
        )
    return next(iter(tasks.values()), task_of(given, None))


def _labels(sources: Sequence[Path]) -> list[str]:
    """Short names without duplicates: the last part of each path, or whole paths if two are the same."""
    names = [source.resolve().name for source in sources]
    return names if len(set(names)) == len(names) else [str(source) for source in sources]


def _read(
    sources: Sequence[Path], references: Path | None, images: Path | None, task: Task
) -> tuple[list["System"], dict[str, "Rows"]]:
    """The systems, and the rows of each file by its label; systems of files have no scores yet."""
    from harness.scoring import rows
    from harness.scoring.compare import of_rows, read_run

    systems, files, problems = [], {}, []
    for source, label in zip(sources, _labels(sources), strict=True):
        try:
            if source.is_dir():
                systems.append(read_run(source, label, f"{task}s"))
            else:
                files[label] = rows(source, references, images, task.value)
                systems.append(of_rows(files[label], label))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return systems, files


def _settings(
    sources: Sequence[Path],
    edition: int | None,
    metrics: Sequence[str] | None,
    standins: bool,
    sets: Sequence[str],
) -> tuple[int, "ScoreConfig"]:
    """Edition and settings for scoring the files: those of the first run, if there is one."""
    from harness.cli.score import edition_of
    from harness.scoring import find_run, passed_over, settings

    run = next((found for source in sources if (found := find_run(source))), None)
    year = edition_of(edition, run)
    config = settings(year, metrics, standins, sets, run)
    for line in passed_over(run, config):
        Terminal().say(line)
    return year, config


def _scored(
    system: "System",
    files: Mapping[str, "Rows"],
    config: "ScoreConfig",
    edition: int,
    device: DeviceName | None,
    task: Task,
) -> "System":
    """A file's system with its scores; a run's system unchanged."""
    from harness.scoring import score, score_concepts

    if system.label not in files:
        return system
    say = Terminal().say
    say(f"{system.label}: scoring {len(system.ids):,} rows of {task}s")
    rows = files[system.label]
    if task is Task.concept:
        scores, warnings = score_concepts(rows, None, edition, config.bootstrap)
    else:
        scores, warnings = score(rows, config, edition, device.value if device else "auto")
    for warning in warnings:
        say(f"warning: {system.label}: {warning.removeprefix(f'{system.label}: ')}")
    return replace(system, scores=scores)


def _rule(found: Sequence["Difference"], resamples: int) -> str:
    from harness.scoring.compare import DRAWS

    pairs = len({(one.a, one.b) for one in found})
    corrected = ", by Holm over the pairs of a metric" if pairs > 1 else ""
    return (
        f"higher, lower: two-sided p < 0.05 ({resamples} paired random swaps{corrected}) and a 95 % interval "
        f"({DRAWS} paired draws of the images) without 0"
    )


def _as_dict(systems: Sequence["System"], found: Sequence["Difference"], resamples: int) -> dict[str, Any]:
    return {
        "n": len(systems[0].ids),
        "systems": [system.label for system in systems],
        "scores": {s.label: {name: score.as_dict() for name, score in s.scores.items()} for s in systems},
        "differences": [vars(one) | {"verdict": one.verdict} for one in found],
        "rule": _rule(found, resamples),
    }


def _csv(systems: Sequence["System"], found: Sequence["Difference"], half: Half | None) -> list[list[Any]]:
    """One row per metric and pair; absent numbers are empty."""
    scores = {system.label: system.scores for system in systems}
    numbers = ("difference", "low", "high", "p", "adjusted_p", "real")
    rows: list[list[Any]] = [
        ["metric", "a", "b", "a_value", "b_value", *numbers, "verdict", "official", "reason", "half"]
    ]
    for one in found:
        sides = [scores[label].get(one.metric) for label in (one.a, one.b)]
        official = all(side is not None and side.official for side in sides)
        cells = [*(side and side.value for side in sides), *(getattr(one, key) for key in numbers)]
        cells += [one.verdict, official, one.reason, half]
        rows.append([one.metric, one.a, one.b, *("" if cell is None else cell for cell in cells)])
    return rows


def _print(
    systems: Sequence["System"], found: Sequence["Difference"], resamples: int, half: Half | None
) -> None:
    from harness.scoring.compare import few_images

    screen = console()
    several, n = len(systems) > 2, len(systems[0].ids)
    images = f"{n} images" + (f" of the {half} half" if half else "")
    title = f"{len(systems)} systems, {images}: scores and differences [95 % interval]"
    columns = [Column("metric"), Column("system"), Column("score", 0), Column("p", 3)]
    columns += [Column("p, Holm", 2)] if several else []
    columns.append(Column("at 95 %", 1, text=True))
    rows = [
        Row(cells, section=number == 0)
        for metric in dict.fromkeys(one.metric for one in found)
        for number, cells in enumerate(_section(metric, systems, found, several))
    ]
    Sheet(title, columns, rows, labels=2, grouped=True).show(screen)
    for line in _notes(systems, found, resamples):
        screen.print(line)
    if half and (few := few_images(n, half)):
        screen.print(f"warning: {few}")


def _section(
    metric: str, systems: Sequence["System"], found: Sequence["Difference"], several: bool
) -> list[list[str]]:
    """The rows of one metric: each system's score, then each difference."""
    blank = [""] * (3 if several else 2)
    rows = [[metric, system.label, _value(system.scores.get(metric)), *blank] for system in systems]
    for one in found:
        if one.metric == metric:
            ps = (one.p, one.adjusted_p) if several else (one.p,)
            rows.append([metric, f"{one.b} - {one.a}", _gap(one), *map(_p, ps), one.side])
    return rows


def _value(score: Any) -> str:
    from harness.cli.tables import cell

    shown = cell(score and score.as_dict())
    return shown if score is None or score.low is None else f"{shown} [{score.low:.4f}, {score.high:.4f}]"


def _gap(one: "Difference") -> str:
    if one.reason:
        return "-"
    interval = f" [{one.low:+.4f}, {one.high:+.4f}]" if one.low is not None else ""
    return f"{one.difference:+.4f}{interval}"


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}"


def _notes(systems: Sequence["System"], found: Sequence["Difference"], resamples: int) -> list[str]:
    from harness.cli.tables import NOT_COMPARABLE

    metrics = {one.metric for one in found}
    shown = [score for s in systems for name, score in s.scores.items() if name in metrics]
    apart: dict[tuple[str, str, str], list[str]] = {}
    for one in found:
        if one.reason:
            apart.setdefault((one.a, one.b, one.reason), []).append(one.metric)
    notes = [f"{a} and {b} not compared by {', '.join(by)}: {why}" for (a, b, why), by in apart.items()]
    if any(score.value is not None and not score.official for score in shown):
        notes.append(NOT_COMPARABLE)
    notes.append(_rule(found, resamples))
    if any(one.real is False for one in found):
        notes.append("not shown: these images do not show a difference, which does not make the two equal")
    return notes
