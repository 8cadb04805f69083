"""`harness best`: which finished run or ensemble to submit."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.terminal import Report, ReportFormat, Terminal, all_by_name, command_line
from harness.cli.widths import Column, Row, Sheet
from harness.errors import UserError
from harness.output.program import spelled
from harness.output.visible import console, json_text

if TYPE_CHECKING:
    from harness.best import Choice
    from harness.best.candidates import Candidates, Option
    from harness.scoring.compare import Difference


def best(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="EXPERIMENT_OR_RUN...",
            callback=all_by_name,
            help="Experiment files, or names of runs such as table3/opt_364-s42. Only finished runs count.",
        ),
    ],
    metric: Annotated[
        str | None, typer.Option(help="The score to choose by; by default the edition's primary one.")
    ] = None,
    few: Annotated[int, typer.Option(min=1, help="The most runs of one ensemble; 1: no ensembles.")] = 5,
    soup: Annotated[
        bool, typer.Option(help="Also average the weights of the best few runs of one initialisation.")
    ] = True,
    name: Annotated[
        str | None,
        typer.Option(help="Ensembles and soup: runs/best/NAME; by default the first experiment's name."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", help="The file to write; by default X_best.yaml beside the file X.yaml."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the runs and the cost; start nothing.")] = False,
    output: ReportFormat = Report.table,
) -> None:
    """Choose what to submit: a run, a soup or an ensemble of several, and de-duplication on or off.

    All pairs and the best few runs become ensembles by consensus; the best few also become a soup.

    The choice is made on the tune half of validation and reported on the held half.

    If the tune half does not show a difference, the simpler option is taken.

    It writes an experiment that makes the test submission.

    Example: harness best experiments/quickstart.yaml
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from harness import best as choosing
    from harness.best import candidates
    from harness.machine.device import world_size
    from harness.store import RUNS, write, write_json

    if world_size() > 1:
        raise UserError("one process chooses; start it without torchrun or srun -n")
    terminal = Terminal()
    given = candidates.find(sources, name, metric)
    for line in (*given.notes, *(f"left out: {run}: {why}" for run, why in given.left_out.items())):
        terminal.say(line)
    if dry_run:
        _print_plan(given, few, soup, terminal, output)
        return
    choice = _decided(given, few, soup, terminal)
    place = out or _beside(sources[0], given.name)
    write(place, choosing.as_experiment(choice, place, command_line()))
    found = _as_dict(choice, place)
    write_json(RUNS / "best" / given.name / choosing.RECORD, found)
    if output is Report.json:
        print(json_text(found, allow_nan=False))
    else:
        _print(choice, place)


def _decided(given: "Candidates", few: int, soup: bool, terminal: Terminal) -> "Choice":
    """The choice; its runs are mirrored to MLflow."""
    from harness import best as choosing
    from harness import tracking
    from harness.store import RUNS

    with tracking.mirroring(RUNS / "best" / given.name, terminal.say):
        return choosing.decide(given, few, terminal, command_line(), soup)


def _beside(source: Path, name: str) -> Path:
    is_file = source.suffix in (".yaml", ".yml")
    return (
        source.with_name(f"{source.stem}_best.yaml")
        if is_file
        else Path(f"{name.replace('/', '_')}_best.yaml")
    )


def _run_command(place: Path) -> str:
    return f"harness run {place}"


def _print_plan(given: "Candidates", few: int, soup: bool, terminal: Terminal, output: Report) -> None:
    from harness.best import options

    plans, notes = options.planned(given, few, terminal, soup)
    states = {
        one.label: f"{'done ' if options.is_captioned(plan) else 'to do'}  {plan.folder}"
        for one, plan in plans
    }
    if output is Report.json:
        left_out = given.left_out
        print(json_text({"runs": _runs(given), "left_out": left_out, "options": states, "notes": notes}))
        return
    for label, run in (_runs(given) | states).items():
        print(f"{label:>12}  {run}")
    print("\n".join(notes) or "all options are done")


def _runs(given: "Candidates") -> dict[str, str]:
    return {label: one.runs[0] for label, one in given.singles.items()}


def _as_dict(choice: "Choice", place: Path) -> dict[str, Any]:
    metric = choice.given.metric
    held = {one.b: vars(one) | {"verdict": one.verdict} for one in choice.held}
    return {
        "edition": choice.winner.config.edition,
        "metric": metric,
        "runs": _runs(choice.given),
        "left_out": choice.given.left_out,
        "options": [
            {
                "label": one.label,
                "kind": one.kind,
                "runs": one.runs,
                "same_captions_as": one.same,
                "scores": {half: system.scores[metric].as_dict() for half, system in one.systems.items()},
                "image_gap": one.gaps,
                "difference": held.get(one.label),
                "folder": str(one.folder),
            }
            for one in choice.options
        ],
        "best_single": choice.single.label,
        "winner": choice.winner.label,
        "chosen_by": [vars(test) | {"decided": decided} for test, decided in choice.tuned],
        "notes": choice.notes,
        "experiment": str(place),
        "command": _run_command(place),
    }


def _print(choice: "Choice", place: Path) -> None:
    from harness.cli.tables import NOT_COMPARABLE

    screen, metric = console(), choice.given.metric
    for label, run in _runs(choice.given).items():
        screen.print(f"{label:>3}  {run}")
    tune, held = (len(system.ids) for system in choice.single.systems.values())
    title = f"{metric} on halves of validation: tune {tune} images, held {held}"
    columns = [
        Column("option"),
        Column("tune", 1),
        Column("held [95 %]", 0),
        Column("image gap, held [95 %]", 2),
    ]
    rows = [Row(_row(one, metric), "bold" if one is choice.winner else "") for one in choice.options]
    Sheet(title, columns, rows).show(screen)
    _print_tests(screen, choice)
    for line in _conclusions(choice):
        screen.print(line)
    if not all(one.systems["held"].scores[metric].official for one in choice.options):
        screen.print(NOT_COMPARABLE)
    screen.print(f"Written: {place}")
    screen.print(spelled(f"The test submission: {_run_command(place)}"), soft_wrap=True)


def _row(one: "Option", metric: str) -> list[str]:
    from harness.cli.tables import cell

    tune, held = (one.systems[half].scores[metric] for half in ("tune", "held"))
    gap = one.gaps["held"]
    value = "-" if gap.get("gap") is None else f"{gap['gap']:+.4f}"
    shown = f"{cell(held.as_dict())}{_interval(held.low, held.high)}"
    return [one.label, cell(tune.as_dict()), shown, value + _interval(gap.get("low"), gap.get("high"), "+")]


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "" if low is None else f" [{low:{sign}.4f}, {high:{sign}.4f}]"


def _print_tests(screen: Any, choice: "Choice") -> None:
    """Print the tests on the held half against the best single run."""
    if not choice.held:
        return
    title = f"Differences from the best single run, {choice.single.label}, on the held half"
    columns = [Column("option"), Column("difference [95 %]", 0), Column("p", 3), Column("p, Holm", 1)]
    columns.append(Column("at 95 %", 2, text=True))
    rows = [Row([one.b, _difference(one), _p(one.p), _p(one.adjusted_p), one.verdict]) for one in choice.held]
    Sheet(title, columns, rows).show(screen)


def _difference(one: "Difference") -> str:
    if one.reason:
        return "-"
    return f"{one.difference:+.4f}{_interval(one.low, one.high, '+')}"


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}"


def _conclusions(choice: "Choice") -> list[str]:
    """How the winner was chosen, which options are no options of their own, and warnings."""
    same: dict[str, list[str]] = {}
    for one in choice.options:
        if one.same is not None:
            same.setdefault(one.same, []).append(one.label)
    lines = [f"{', '.join(labels)}: the same captions as {label}" for label, labels in same.items()]
    for test, decided in choice.tuned:
        shown = "shown" if test.real else "not shown"
        p = f"p {_p(test.p)}" if test.reason is None else test.reason
        lines.append(f"tune half: {test.b} - {test.a} {_difference(test)}, {p}, {shown}: {decided}")
    lines.append(f"chosen on the tune half: {choice.winner.label}")
    lines += [f"note: {note}" for note in choice.notes]
    return lines
