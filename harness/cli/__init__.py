"""The commands; the only room that prints and sets exit codes."""

import contextlib
import csv
import errno
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException as ClickException

from harness.cli import (
    best,
    caption,
    compare,
    consensus,
    data,
    export,
    init,
    leaderboard,
    reference,
    report,
    score,
    study,
    submission,
)
from harness.cli.terminal import (
    DeviceName,
    DeviceOption,
    Experiment,
    Format,
    Output,
    Report,
    ReportFormat,
    Sets,
    Terminal,
    command_line,
)
from harness.errors import UserError
from harness.machine import launch, ranks
from harness.machine.launch import INTERRUPTED
from harness.masking import masked
from harness.visible import STANDARD_OUTPUT, guard, json_text, one_line, print_csv

_INTERRUPTED = "interrupted; the same command continues where this one stopped"
_heard = threading.Event()
_PATIENCE = 2.0
"""Seconds for threads to end by themselves after an interruption."""
REPAIRABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
"""Errors that a user can repair: a full or read-only disk, a path that can't be written to."""

_PANELS = ("Run and study", "Score and compare", "Submit", "Data", "Keep house")
_RUN, _SCORE, _SUBMIT, _DATA, _HOUSE = _PANELS


class _InPanels(TyperGroup):
    """Lists the commands in the order of their panels."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: _PANELS.index(self.commands[name].rich_help_panel))


app = typer.Typer(
    name="harness",
    cls=_InPanels,
    help="From one YAML file to a trained captioner, its scores and an official submission file.\n\n"
    "Example: python -m harness run experiments/quickstart.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(study.app, name="study", rich_help_panel=_RUN)
app.command("init", rich_help_panel=_DATA)(init.init)
app.command("caption", rich_help_panel=_RUN)(caption.caption)
app.command("score", rich_help_panel=_SCORE)(score.score)
app.command("compare", rich_help_panel=_SCORE)(compare.compare)
app.command("consensus", rich_help_panel=_SCORE)(consensus.consensus)
app.command("best", rich_help_panel=_SCORE)(best.best)
app.command("report", rich_help_panel=_SCORE)(report.report)
app.command("leaderboard", rich_help_panel=_SCORE)(leaderboard.leaderboard)
app.add_typer(submission.app, name="submission", rich_help_panel=_SUBMIT)
app.add_typer(data.app, name="data", rich_help_panel=_DATA)
app.command("export", rich_help_panel=_HOUSE)(export.export)
app.command("reference", rich_help_panel=_HOUSE)(reference.reference)


def main() -> None:
    """Run the command line and exit with its code; user errors are printed without a traceback.

    Exit codes: 0 ok, 1 failed run, 2 usage, config or data, 3 invalid submission, 130 interrupted.
    """
    code = 0
    try:
        guard()
        _hear_signals()
        launch.adopt_slurm(os.environ)
        launch.share_host()
        _run_command()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # a second one, while the first was reported
        code = INTERRUPTED
    except Exception:
        if _heard.is_set():  # a library turned the KeyboardInterrupt into another error
            print(_INTERRUPTED, file=sys.stderr)
            code = INTERRUPTED
        else:
            if ranks.rank():
                ranks.say_why(traceback.format_exc().splitlines()[-1])
            print(masked(traceback.format_exc()), file=sys.stderr, end="")
            code = 1
    code = _all_written(code)
    if code == INTERRUPTED:
        _end_children()
    if not code:
        ranks.end()
    if ranks.world_size() > 1 or code == INTERRUPTED:
        ranks.leave(code)
    sys.exit(code)


def _hear_signals() -> None:
    sys.unraisablehook = _interrupt_again
    signal.signal(signal.SIGTERM, _interrupt)
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and a shell's & set SIG_IGN
            signal.signal(number, _interrupt)


def _run_command() -> None:
    try:
        if gone := _without_folder():
            _fail(gone, 2)
        launch.end_with_parent()
        if app(standalone_mode=False) == INTERRUPTED:  # typer returns this after a KeyboardInterrupt
            _fail(_INTERRUPTED, INTERRUPTED)
    except UserError as error:
        _fail(str(error), error.exit_code, len(error.problems))
    except typer.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # a file is cut short; nobody interrupted
            raise abort.__cause__ from None
        _fail(_INTERRUPTED, INTERRUPTED)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, INTERRUPTED)
    except ClickException as error:
        error.show()
        sys.exit(2)
    except RuntimeError as error:
        if not ranks.cut_off(error):
            raise
        if ranks.rank():  # rank 0 reports it, unless rank 0 is the one that ended
            sys.exit(1)
        _fail("error: another rank of this launch has ended; the same command continues", 1)
    except OSError as error:
        if gone := _without_folder():
            _fail(gone, 1)
        if error.errno not in REPAIRABLE and error.filename != STANDARD_OUTPUT:
            raise
        _fail(_not_written(error.filename or "writing", error), 1)


def _not_written(what: str | bytes | int, error: OSError) -> str:
    return f"error: {what}: {error.strerror}; fix it and run the same command again"


def _without_folder() -> str | None:
    """The error if the working directory is gone: torch and others crash there without a message."""
    try:
        os.getcwd()
    except OSError as error:
        return f"error: the working directory can't be used: {error.strerror}; cd to a folder that exists"
    return None


def _all_written(code: int) -> int:
    """The exit code; 0 becomes 1 if standard output can't be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        print(_not_written(STANDARD_OUTPUT, error), file=sys.stderr)
        return code or 1
    return code


def _end_children() -> None:
    """End the child processes (Java, MedCAT), and wait up to `_PATIENCE` for the threads that use them.

    Processes with their own session keep running: they notice by themselves that this one ends.
    """
    import psutil

    session = os.getsid(0)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(child.pid) == session:
                child.kill()
    until = time.monotonic() + _PATIENCE
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, until - time.monotonic()))


def _interrupt(*_: Any) -> None:
    _heard.set()
    raise KeyboardInterrupt


def _interrupt_again(swallowed: Any) -> None:
    """Repeat an interruption that Python dropped in a finaliser or a weak reference's callback."""
    if issubclass(swallowed.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(swallowed)


def _fail(text: str, code: int, problems: int = 0) -> None:
    # this rank is ending already; the launcher signals all ranks when one exits
    if ranks.world_size() > 1 or code == INTERRUPTED:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if ranks.rank():  # rank 0 prints it, or the launcher if this rank fails alone
        if code != INTERRUPTED:
            ranks.say_why(text.removeprefix("error: "))
            if not launch.report(text):
                signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
                if not ranks.first_fails_too():
                    print(f"rank {ranks.rank()}: {text}", file=sys.stderr)
        sys.exit(code)
    print(masked(text), file=sys.stderr)
    if problems and code == 2:
        noun = "problem" if problems == 1 else "problems"
        print(f"{problems} {noun}; nothing was run.", file=sys.stderr)
    sys.stderr.flush()
    ranks.say_failed()
    sys.exit(code)


def _configs(experiment: Path, sets: list[str] | None, device: DeviceName | None) -> list[Any]:
    from harness.config.experiment import load

    extra = [f"device={device}"] if device else []
    return load(experiment, [*(sets or ()), *extra])


@app.command(rich_help_panel=_RUN)
def run(
    experiment: Experiment,
    sets: Sets = None,
    device: DeviceOption = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Devices (or processes, on CPUs) of this machine to train on.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="File with a line `name slots=8` for each host, as for DeepSpeed.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the runs and which steps are done; start nothing.")
    ] = False,
    output: Output = Format.table,
) -> None:
    """Train, caption, post-process, score, write the submission, and mirror it all to MLflow.

    After an interruption the same command continues where it stopped. Finished steps are not repeated.

    Example: python -m harness run experiments/quickstart.yaml --dry-run
    """
    configs = _configs(experiment, sets, device)
    if dry_run:
        _print_plans(configs, output)
        return
    if (hostfile or (nproc or 1) > 1) and not launch.is_rank():
        sys.exit(_launched(configs, nproc, hostfile))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _run_all(experiment, configs, output)


@app.command(rich_help_panel=_RUN)
def soup(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN ...", help="Finished runs of one initialisation.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="EXPERIMENT.yaml", help="Where to write the experiment; by default runs/soup/."),
    ] = None,
    half: Annotated[
        bool, typer.Option("--half/--all", help="Choose on one half of the validation images, or on all.")
    ] = True,
    sets: Sets = None,
    device: DeviceOption = None,
    output: Output = Format.table,
) -> None:
    """Average the weights of runs if that scores better, and run what it gives: captions, scores, submission.

    It starts from the best weights and adds the others one by one. It keeps one if the score does not fall.

    All weights that train.keep_best kept are candidates. At the end it compares the soup with the best run.

    Example: python -m harness soup quickstart/opt_224-s42 quickstart/opt_224-s43
    """
    from harness.cli import soups
    from harness.store import RUNS

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    file = soups.experiment(runs, out, half)
    configs = _configs(file, sets, device)
    records = _run_all(file, configs, output)
    print(f"the experiment: {file}", file=sys.stderr)
    if records and output is Format.table and not launch.is_rank():
        member = soups.best_member(records[0])
        if len(records[0]["soup"]["members"]) == 1:
            print(f"No average scored better than {member} alone: the soup has its weights.")
            return
        compare.compare([RUNS / member, RUNS / configs[0].name / configs[0].run_name])


def _launched(configs: list[Any], nproc: int | None, hostfile: Path | None) -> int:
    from harness.machine import device
    from harness.training.schedule import indivisible

    if hostfile:
        return launch.on_hosts(sys.argv[1:], hostfile, nproc)
    count = nproc or 1
    found = [device.shortage(config.device, count) for config in configs]
    found += [indivisible(config.train, count) for config in configs if config.trains]
    if problems := list(dict.fromkeys(filter(None, found))):
        raise UserError(problems)
    return launch.here(sys.argv[1:], count)


def _run_all(experiment: Path, configs: list[Any], output: Format) -> list[dict[str, Any]]:
    """Run all configs, in this process or as one of several ranks -> their records.

    Only rank 0 writes and prints; others get no records.
    """
    from harness.machine import device as devices

    kinds = {devices.probe(config.device).kind for config in configs}
    ranks.start(kinds.pop())
    if ranks.rank():
        _assist(configs)
        return []
    from harness import report as reports
    from harness import run as runs
    from harness import tracking
    from harness.config.experiment import base_of
    from harness.steps.plan import prepare
    from harness.store import RUNS

    terminal = Terminal()
    plans = prepare(configs, terminal)
    ranks.agree(None)  # the data is drawn and checked now, so the other ranks may read it
    follower = tracking.start(RUNS / configs[0].name)
    records: list[dict[str, Any]] = []
    try:
        for plan in plans:
            try:
                base = base_of(experiment, plan.config.variant)
                records.append(runs.run(plan, terminal, command_line(), base))
            except Exception:
                with contextlib.suppress(Exception):  # the run's own error matters more than the page's
                    reports.write(plan.folder)
                raise
            reports.write(plan.folder)
    except UserError:
        if records:
            _print_records(records, output)
        raise
    finally:
        late = follower.finish()
        if late:
            terminal.say(late)
    _print_records(records, output)
    return records


def _assist(configs: list[Any]) -> None:
    from harness import run
    from harness.steps.plan import prepare

    silent = Terminal(silent=True)
    ranks.agree(None)
    for plan in prepare(configs, silent):
        run.assist(plan, silent)


def _print_plans(configs: list[Any], output: Format) -> None:
    from harness.steps.plan import dry, problems
    from harness.training.forecast import forecast

    rows = []
    for config in configs:
        resolved = json.loads(config.model_dump_json())
        missing = [str(problem) for problem in problems(config)]
        run = f"{config.name}/{config.run_name}"
        rows.append({"run": run, "steps": dry(config), "missing": missing, "config": resolved})
        rows[-1]["training"] = forecast(config)
    if output is Format.json:
        print(json_text(rows))
    elif output is Format.csv:
        lines = [["run", "step", "state"], *([r["run"], *item] for r in rows for item in r["steps"].items())]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        print_csv(text.getvalue())
    else:
        for row in rows:
            _print_plan(row)


def _print_plan(row: dict[str, Any]) -> None:
    import yaml

    from harness.training.forecast import lines

    print(f"# {row['run']}")
    print(yaml.safe_dump(row["config"], sort_keys=False, allow_unicode=True).rstrip())
    print("# steps")
    for name, state in row["steps"].items():
        print(f"#   {name:24} {state}")
    print("# training")
    for line in lines(row["training"]):
        print(f"#   {line}")
    for problem in row["missing"]:
        print(f"#   missing: {problem}")
    print()


def _print_records(records: list[dict[str, Any]], output: Format) -> None:
    from harness.cli import tables

    if output is Format.json:
        print(json_text(records))
    elif output is Format.csv:
        print_csv(tables.csv(records))
    else:
        tables.show(records)


@app.command(rich_help_panel=_HOUSE)
def sync(
    run: Annotated[Path | None, typer.Argument(help="A run's folder; by default all runs.")] = None,
    follow: Annotated[Path | None, typer.Option(hidden=True)] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Mirror runs to MLflow at MLFLOW_TRACKING_URI, by default mlflow.db in this folder.

    Example: python -m harness sync runs/quickstart
    """
    from harness import tracking
    from harness.store import RUNS

    if follow is not None:
        tracking.follow(follow, parent or os.getppid())
    else:
        for line in tracking.sync(run or RUNS):
            print(one_line(line))


@app.command(rich_help_panel=_HOUSE)
def doctor(
    experiments: Annotated[
        list[Path] | None, typer.Argument(help="Experiments to check this machine for.")
    ] = None,
    sets: Sets = None,
    device: DeviceOption = None,
    selftest: Annotated[
        bool,
        typer.Option("--selftest", help="Also compare the device's results with the CPU's (a minute)."),
    ] = False,
    output: ReportFormat = Report.table,
) -> None:
    """Show what this machine has and lacks: device, versions, weights, Java, disk and memory.

    Example: python -m harness doctor experiments/ablation_364.yaml
    """
    from harness import doctor as diagnosis

    configs = [config for file in experiments or () for config in _configs(file, sets, device)]
    checks = diagnosis.examine(configs, device or "auto", selftest)
    if output is Report.json:
        print(json_text([vars(check) for check in checks]))
    else:
        from harness.cli import tables

        tables.show_checks(checks)
    if not all(check.ok for check in checks):
        sys.exit(1)
