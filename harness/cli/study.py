"""`harness study`: run a study, show its trials, write the best as an experiment."""

import csv
import io
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from harness.cli.terminal import (
    DeviceName,
    DeviceOption,
    Format,
    Output,
    Sets,
    Terminal,
    by_name,
    command_line,
)
from harness.cli.widths import Column, Row, Sheet
from harness.errors import Problem, UserError
from harness.output.program import spelled
from harness.output.visible import console, json_text, print_csv

if TYPE_CHECKING:
    from harness.study.spec import Study


class _FileFirst(TyperGroup):
    """Reads `study FILE` as `study run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_FileFirst,
    no_args_is_help=True,
    help="Search an experiment's keys for the best validation score.\n\n"
    "Example: harness study experiments/study_lr.yaml",
)

StudyFile = Annotated[
    Path, typer.Argument(help="The study's YAML file, or its name in experiments/.", callback=by_name)
]
Base = Annotated[
    Path | None, typer.Option(help="An experiment file that replaces the study's base.", callback=by_name)
]
Variant = Annotated[str | None, typer.Option(help="Variant of the base.")]


@app.command()
def run(
    file: StudyFile,
    trials: Annotated[int | None, typer.Option(min=1, help="Number of trials over all calls.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trials at the same time on this machine.")] = 1,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Start no trial after this time.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Devices (or processes, on CPUs) for each trial.")] = 1,
    base: Base = None,
    variant: Variant = None,
    sets: Sets = None,
    device: DeviceOption = None,
    output: Output = Format.table,
) -> None:
    """Run trials until the study has the number in its file; `study FILE` does the same.

    After an interruption the same command continues with the trials that were not finished.

    Example: harness study run experiments/study_lr.yaml --workers 4
    """
    from harness.machine import launch
    from harness.study import storage
    from harness.study import workers as processes

    spec = _load(file, sets, device, base, variant, trials)
    chosen = storage.choose(spec, _folder(spec), workers)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if spec.trials < spec.config.trials and not processes.is_worker() and not launch.is_rank():
        wanted, points = spec.config.trials, spec.trials
        Terminal().say(f"the space has {points} points, so the study runs {points} trials, not {wanted}")
    if workers > 1 and not processes.is_worker():
        _run_workers(spec, chosen, workers, nproc)
    elif nproc > 1 and not launch.is_rank():
        sys.exit(_run_ranks(spec, nproc))
    else:
        _work(spec, chosen, timeout)
    if not processes.is_worker() and not int(os.environ.get("RANK", "0")):
        _print(spec, chosen, output)
        _end_without_scores(spec)


def _end_without_scores(spec: "Study") -> None:
    from harness.study import storage

    record = storage.read_record(_folder(spec))
    if record.get("ended") and not record["trials"].get("COMPLETE"):
        what = f"the study {spec.name} ended, and no trial has scores"
        hint = "The table says why each failed. Fix the cause and run more trials: --trials NUMBER"
        raise UserError([Problem(what, spec.file, hint=hint)], exit_code=1)


def _load(
    file: Path,
    sets: list[str] | None,
    device: DeviceName | None,
    base: Path | None,
    variant: str | None,
    trials: int | None = None,
) -> "Study":
    from harness.study.spec import load

    extra = [f"device={device}"] if device else []
    return load(file, [*(sets or ()), *extra], base, variant, {"trials": trials})


def _folder(spec: "Study") -> Path:
    from harness.store import RUNS

    return RUNS / spec.name


def _work(spec: "Study", chosen: str, timeout: float | None) -> None:
    """Run trials in this process, or as one of several ranks; mirror them unless another process does."""
    from harness import tracking
    from harness.machine import ranks
    from harness.study import work, workers

    terminal, silent = Terminal(), Terminal(silent=True)
    if workers.is_worker() or ranks.rank():
        work.work(spec, chosen, terminal, silent, command_line(), timeout)
        return
    with tracking.mirroring(_folder(spec), terminal.say):
        work.work(spec, chosen, terminal, silent, command_line(), timeout)


def _run_workers(spec: "Study", chosen: str, count: int, ranks: int) -> None:
    """Start workers and mirror their trials; raises `UserError` if trials are left."""
    from harness import tracking
    from harness.machine import device
    from harness.steps.plan import prepare
    from harness.study import storage, workers

    terminal = Terminal()
    (plan,) = prepare([spec.base], terminal)  # draws and checks the data once, before the workers start
    storage.open_study(spec, _folder(spec), chosen, plan.data.fingerprints)
    with tracking.mirroring(_folder(spec), terminal.say):
        codes = workers.start(sys.argv[1:], count, device.probe(spec.base.device), ranks)
    if any(codes):
        ended = ", ".join(str(code) for code in codes)
        if not storage.read_record(_folder(spec)).get("ended"):
            what = f"workers ended with exit codes {ended}, and trials are left; the same command runs them"
            raise UserError([Problem(what, spec.file)], exit_code=1)
        terminal.say(f"workers ended with exit codes {ended}; the others finished their trials")


def _run_ranks(spec: "Study", ranks: int) -> int:
    """Start the ranks of one worker, again after a trial that failed or lost a rank -> their exit code."""
    from harness.machine import device, launch
    from harness.steps.plan import prepare
    from harness.study.storage import read_record
    from harness.training.schedule import indivisible

    found = [device.shortage(spec.base.device, ranks)]
    found += [indivisible(spec.base.train, ranks)] if spec.base.trains else []
    if problems := list(filter(None, found)):
        raise UserError(problems)
    prepare([spec.base], Terminal())  # reports problems of the base once, not once per rank
    known, idle = read_record(_folder(spec)).get("trials"), 0
    while True:
        failure = None
        try:
            code = launch.here(sys.argv[1:], ranks)
        except UserError as error:  # one rank failed alone
            code, failure = error.exit_code, error
        record = read_record(_folder(spec))
        before, known = known, record.get("trials")
        idle = 0 if known != before else idle + 1
        ended = record.get("failed_alike") or (record.get("ended") and idle)
        if code in (0, launch.INTERRUPTED) or ended or idle > spec.config.retries:
            break
    if failure is not None:
        raise failure
    return code


@app.command()
def show(
    file: StudyFile,
    base: Base = None,
    variant: Variant = None,
    sets: Sets = None,
    output: Output = Format.table,
) -> None:
    """List the trials of a study.

    Example: harness study show experiments/study_lr.yaml
    """
    spec = _load(file, sets, None, base, variant)
    _print(spec, _begun(spec), output)


@app.command()
def best(
    file: StudyFile,
    out: Annotated[
        Path | None, typer.Option("--output", help="File to write; by default beside the study's file.")
    ] = None,
    trial: Annotated[int | None, typer.Option(min=0, help="Number of a trial other than the best.")] = None,
    base: Base = None,
    variant: Variant = None,
    sets: Sets = None,
) -> None:
    """Write the config of the best trial as an experiment that `harness run` takes.

    Example: harness study best experiments/study_lr.yaml --output experiments/best_lr.yaml
    """
    from harness.store import write
    from harness.study import against, results, storage

    spec = _load(file, sets, None, base, variant)
    study, _ = storage.open_study(spec, _folder(spec), _begun(spec))
    out = out or file.with_name(f"{file.stem}_best.yaml")
    won = results.winner(study, spec, trial)
    write(out, results.as_experiment(won, spec, out, command_line()))
    print(f"{out}: trial {won.number} of {spec.name}")
    if found := against.against_base(spec, won, _folder(spec)):
        print(f"trial {won.number} {against.described(found, len(study.get_trials(deepcopy=False)))}")
    else:
        print("Trial 0 is the base itself.")
    print(spelled(f"Run it: harness run {shlex.quote(str(out))}"))


def _begun(spec: "Study") -> str:
    """The storage of a study that has trials."""
    from harness.study import storage

    if not storage.read_record(_folder(spec)):
        hint = f"Start it: harness study {_words(spec)}"
        raise UserError([Problem(f"the study {spec.name} has no trials yet", spec.file, hint=hint)])
    return storage.choose(spec, _folder(spec), 1)


def _print(spec: "Study", chosen: str, output: Format) -> None:
    from harness.study import results, storage

    study, _ = storage.open_study(spec, _folder(spec), chosen)
    rows = results.rows(study, spec)
    keys = [parameter.key for parameter in spec.space]
    if output is Format.json:
        print(json_text(rows))
    elif output is Format.csv:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["number", "state", *spec.objective, *keys, "seconds", "retry_of", "reason"])
        for row in rows:
            values = [*row["values"].values(), *(row["params"].get(key) for key in keys)]
            writer.writerow(
                [row["number"], row["state"], *values, row["seconds"], row["retry_of"], row["reason"]]
            )
        print_csv(text.getvalue())
    else:
        _table(spec, rows, storage.address(_folder(spec), chosen))


def _table(spec: "Study", rows: list[dict[str, Any]], address: str) -> None:
    from harness.cli import tables
    from harness.scoring.compare import few_images
    from harness.study import against, results, storage

    screen = console()
    keys = [parameter.key for parameter in spec.space]
    where = f", the {spec.config.half} half" if spec.config.half else ""
    names = [*spec.objective, *(key.rpartition(".")[2] for key in keys)]
    columns = [Column("trial"), *(Column(name, number) for number, name in enumerate(names))]
    columns += [Column("s"), Column("note", text=True)]
    table = []
    for row in rows:
        scores = [tables.cell({"value": v, "official": row["official"]}) for v in row["values"].values()]
        values = [_short(row["params"].get(key)) for key in keys]
        spent = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        note = _note(row)
        cells = [str(row["number"]), *scores, *values, spent, note]
        table.append(Row(cells, style="bold" if row["best"] else ""))
    Sheet(f"{spec.name}: validation scores{where}", columns, table).show(screen)
    if any(row["official"] is False for row in rows):
        screen.print(tables.NOT_COMPARABLE)
    for row in rows:
        if "held" in row:
            screen.print(f"trial {row['number']} {results.on_held(row['held'])}")
            few = [few_images(one["n"], "held") for one in row["held"].get("scores", {}).values()]
            screen.print(*(f"warning: {warning}" for warning in dict.fromkeys(filter(None, few))))
        if "against_base" in row:
            screen.print(f"trial {row['number']} {against.described(row['against_base'], len(rows))}")
    if rows and rows[0]["best"]:
        screen.print("No trial is better than the base (trial 0).")
    screen.print(*(f"{note}\n" for note in storage.read_record(_folder(spec)).get("notes", ())), end="")
    screen.print(f"Plots and records: runs/{spec.name}/")
    screen.print(spelled(f"The best as an experiment: harness study best {_words(spec)}"), soft_wrap=True)
    screen.print(f"In a browser: optuna-dashboard {address}")


def _words(spec: "Study") -> str:
    """The arguments that name this study on the command line."""
    base = [] if spec.base_file == spec.file.parent / spec.config.base else ["--base", str(spec.base_file)]
    variant = ["--variant", spec.config.variant] if spec.config.variant else []
    sets = [word for text in spec.sets for word in ("--set", text) if not text.startswith("device=")]
    return shlex.join([str(spec.file), *base, *variant, *sets])


def _short(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _note(row: dict[str, Any]) -> str:
    notes = ["best"] if row["best"] else []
    notes += [] if row["state"] == "COMPLETE" else [row["state"].lower()]
    notes += [] if row["retry_of"] is None else [f"trial {row['retry_of']} again"]
    notes += [row["reason"]] if row["reason"] else []
    return "; ".join(notes)
