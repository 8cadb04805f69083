"""The commands; the only room that prints and sets exit codes."""

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.errors import UserError

app = typer.Typer(
    name="harness",
    help="ImageCLEFmedical Caption: one YAML in; scores, official file and MLflow run out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at a data set, check it, or draw a made-up one.", no_args_is_help=True)
app.add_typer(data_app, name="data")


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"
    csv = "csv"


Experiment = Annotated[Path, typer.Argument(help="The experiment's YAML file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the file, e.g. train.batch_size=32."),
]
Output = Annotated[Format, typer.Option("--format", help="How the results are printed.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, npu, cuda or cpu.")]


def main() -> None:
    """Run the command line; user errors are printed without a traceback. Exit codes: 0 ok, 1 failed run,
    2 usage, config or data, 3 invalid submission, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(standalone_mode=False)
    except UserError as error:
        _fail(str(error), error.exit_code, len(error.problems))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command goes on where this one stopped", 130)
    except Exception as error:
        if not _is_usage(error):
            raise
        error.show()
        sys.exit(2)


def _is_usage(error: Exception) -> bool:
    """Whether click raised it: a wrong option or argument."""
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _fail(text: str, code: int, problems: int = 0) -> None:
    print(text, file=sys.stderr)
    if problems and code == 2:
        noun = "problem" if problems == 1 else "problems"
        print(f"{problems} {noun}; nothing was run.", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(code)


class Terminal:
    """Says what a run does: lines and bars on stderr, no bars where that is no terminal."""

    def say(self, text: str) -> None:
        """Print one line."""
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Callable[..., None]]:
        """A bar with an ETA that appears at the first `advance(done, total, note)`."""
        if not sys.stderr.isatty():
            yield lambda done, total, note="": None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        columns.append(TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task: Any = None

            def advance(done: int, total: int, note: str = "") -> None:
                nonlocal task
                if task is None:
                    task = bars.add_task(label, total=total, note=note)
                bars.update(task, completed=done, total=total, **({"note": note} if note else {}))

            yield advance


def _configs(experiment: Path, sets: list[str] | None, device: str | None) -> list[Any]:
    from harness.experiment import load

    extra = [f"device={device}"] if device else []
    return load(experiment, [*(sets or ()), *extra])


def _command() -> str:
    return f"python -m harness {shlex.join(sys.argv[1:])}"


@app.command()
def run(
    experiment: Experiment,
    sets: Sets = None,
    device: DeviceOption = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the runs and which steps are done; start nothing.")
    ] = False,
    output: Output = Format.table,
) -> None:
    """Train, predict, post-process, score, write the submission, and mirror it all to MLflow.

    The same command after an interruption goes on where it stopped; steps that are done are not repeated.
    """
    configs = _configs(experiment, sets, device)
    if dry_run:
        _print_plans(configs, output)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from harness import device as devices

    for wanted in {config.device for config in configs}:
        devices.probe(wanted)
    from harness import run as runs
    from harness import tracking
    from harness.plan import RUNS, prepare

    terminal = Terminal()
    plans = prepare(configs, terminal)
    follower = tracking.start(RUNS / configs[0].name)
    try:
        records = [runs.run(plan, terminal, _command()) for plan in plans]
    finally:
        late = follower.finish()
        if late:
            terminal.say(late)
    _print_records(records, output)


def _print_plans(configs: list[Any], output: Format) -> None:
    from harness.plan import dry

    rows = []
    for config in configs:
        steps = dry(config)
        rows.append(
            {
                "run": f"{config.name}/{config.run_name}",
                "steps": steps,
                "config": json.loads(config.model_dump_json()),
            }
        )
    if output is not Format.table:
        print(json.dumps(rows, indent=1))
        return
    import yaml

    for row in rows:
        print(f"# {row['run']}")
        print(yaml.safe_dump(row["config"], sort_keys=False, allow_unicode=True).rstrip())
        print("# steps")
        for name, state in row["steps"].items():
            print(f"#   {name:24} {state}")
        print()


def _print_records(records: list[dict[str, Any]], output: Format) -> None:
    from harness import tables

    if output is Format.json:
        print(json.dumps(records, indent=1, ensure_ascii=False))
    elif output is Format.csv:
        print(tables.csv(records), end="")
    else:
        tables.show(records)


@app.command()
def sync(
    run: Annotated[Path | None, typer.Argument(help="A run's folder; all runs when left out.")] = None,
    follow: Annotated[Path | None, typer.Option(hidden=True)] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Mirror runs to MLflow (MLFLOW_TRACKING_URI, by default mlflow.db here)."""
    from harness import tracking
    from harness.plan import RUNS

    if follow is not None:
        tracking.follow(follow, parent or os.getppid())
    elif run is not None:
        tracking.mirror(run)
        print(f"mirrored {run}")
    else:
        for line in tracking.sync(RUNS):
            print(line)


@app.command()
def doctor(
    experiments: Annotated[
        list[Path] | None, typer.Argument(help="Experiments to check this machine for.")
    ] = None,
    sets: Sets = None,
    device: DeviceOption = None,
    output: Output = Format.table,
) -> None:
    """Say what this machine has and lacks: device, versions, weights, Java, disk and memory."""
    from harness import doctor as diagnosis

    configs = [config for file in experiments or () for config in _configs(file, sets, device)]
    checks = diagnosis.examine(configs, device or "auto")
    if output is Format.json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        from harness import tables

        tables.show_checks(checks)
    if not all(check.ok for check in checks):
        sys.exit(1)


Root = Annotated[Path, typer.Argument(help="Folder of the data set.")]
LayoutOption = Annotated[
    str, typer.Option("--layout", help="imageclef2023, imageclef2024 (2024-2026) or rocov2.")
]


def _data_config(root: Path, layout: str, **more: Any) -> Any:
    from pydantic import ValidationError

    from harness.config import DataConfig
    from harness.errors import Problem

    try:
        return DataConfig(root=root, layout=layout, **more)
    except ValidationError as error:
        raise UserError(
            [Problem(f"got {layout!r}; {error.errors()[0]['msg'].lower()}", key="--layout")]
        ) from None


@data_app.command("phantom")
def data_phantom(
    folder: Annotated[Path, typer.Argument(help="Where to draw it; must not exist yet.")],
    train: Annotated[int, typer.Option(min=1)] = 700,
    valid: Annotated[int, typer.Option(min=1)] = 150,
    test: Annotated[int, typer.Option(min=1)] = 150,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw a made-up radiology set in the 2023 layout; the same seed draws the same bytes."""
    from harness.config import PhantomConfig
    from harness.data import phantom

    phantom.ensure(folder, PhantomConfig(train=train, valid=valid, test=test, seed=seed))
    print(f"drew {train} + {valid} + {test} images into {folder}")


@data_app.command("check")
def data_check(root: Root, layout: LayoutOption = "imageclef2023", output: Output = Format.table) -> None:
    """Verify labels and images, and print every problem with file and line; exit code 2 if there are any."""
    from harness.data import check
    from harness.plan import RUNS

    with Terminal().progress("Checking images") as advance:
        problems = check(_data_config(root, layout), RUNS, advance)
    if output is Format.json:
        print(
            json.dumps(
                [{k: v if v is None else str(v) for k, v in vars(p).items()} for p in problems], indent=1
            )
        )
        if problems:
            sys.exit(2)
    elif problems:
        raise UserError(problems, "Mend them, or leave these rows out: --set data.skip_bad=true")
    else:
        print("ok: no problems")


@data_app.command("stats")
def data_stats(
    root: Root,
    layout: LayoutOption = "imageclef2023",
    plot: Annotated[Path, typer.Option(help="Where the histogram of caption lengths goes.")] = Path(
        "caption_lengths.png"
    ),
    output: Output = Format.table,
) -> None:
    """Images per modality (the paper's Table 1) and caption lengths (Figure 2, as PNG)."""
    from harness import tables
    from harness.data import load, statistics
    from harness.plan import RUNS

    with Terminal().progress("Checking images") as advance:
        dataset = load(_data_config(root, layout, skip_bad=True), RUNS, advance)
    modalities, lengths = statistics.modalities(dataset), statistics.caption_lengths(dataset)
    statistics.plot_lengths(dataset, plot)
    tables.show_statistics(modalities, lengths, output.value)
    print(f"histogram: {plot}", file=sys.stderr)
