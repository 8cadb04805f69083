"""What the commands share: output formats, progress on a terminal, options."""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.output import visible
from harness.output.masking import masked
from harness.output.program import spelled


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"
    csv = "csv"


class Report(StrEnum):
    """How findings are printed; they do not fit CSV."""

    table = "table"
    json = "json"


class Task(StrEnum):
    """The two tasks of ImageCLEFmedical Caption."""

    caption = "caption"
    concept = "concept"


def command_line() -> str:
    """The command as the user gave it, for records; passwords are masked."""
    return masked(f"harness {shlex.join(sys.argv[1:])}")


class DeviceName(StrEnum):
    """Which device a run uses."""

    auto = "auto"
    npu = "npu"
    cuda = "cuda"
    cpu = "cpu"


class Half(StrEnum):
    """A half of the validation images; an image's half depends on its id."""

    tune = "tune"
    held = "held"


def by_name(given: Path | None) -> Path | None:
    """The file of an experiment or a study that is given by its name alone; any other path as it is."""
    if given is None or given.suffix or given.exists():
        return given
    found = Path("experiments", f"{given}.yaml")  # a copy of config.experiment.EXPERIMENTS, which is slow
    return found if found.is_file() else given


def all_by_name(given: list[Path] | None) -> list[Path] | None:
    """`by_name` of each."""
    return given and [by_name(one) for one in given]


def run_by_name(given: Path | None) -> Path | None:
    """The folder under runs/ of a run that is given as `ls` prints it; any other path as it is."""
    if given is None or given.exists():
        return given
    found = Path("runs", given)  # a copy of store.RUNS, which is slow
    return found if found.is_dir() else given


def runs_by_name(given: list[Path] | None) -> list[Path] | None:
    """`run_by_name` of each."""
    return given and [run_by_name(one) for one in given]


OfRun = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="A run, such as quickstart/opt_364-s42, or its folder.", callback=run_by_name
    ),
]
Experiment = Annotated[
    Path, typer.Argument(help="The experiment's YAML file, or its name in experiments/.", callback=by_name)
]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variant", metavar="NAME", help="Only this variant; may be given several times."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as train.batch_size=32."),
]
ScoreSets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of score, such as score.bootstrap=0."),
]
Output = Annotated[Format, typer.Option("--format", help="How the results are printed.")]
OfTask = Annotated[Task | None, typer.Option("--task", help="By default that of the run, else captions.")]
ReportFormat = Annotated[Report, typer.Option("--format", help="How the findings are printed.")]
HalfOption = Annotated[
    Half | None,
    typer.Option("--half", help="Only half of the images: tune, to choose by, or held, to report."),
]
Replace = Annotated[
    bool,
    typer.Option("--replace", help="Let a run take the name of a finished one, which goes into the archive."),
]
DeviceOption = Annotated[
    DeviceName | None, typer.Option("--device", help="Overrides the device of the experiment.")
]


def configs_of(
    experiment: Path, sets: list[str] | None, device: DeviceName | None, variants: list[str] | None = None
) -> list[Any]:
    """The configs of an experiment file, a variant and seed each; raises `UserError`."""
    from harness.config.experiment import load

    extra = [f"device={device}"] if device else []
    return load(experiment, [*(sets or ()), *extra], only=variants or ())


class _Minutes:
    """Says each minute how far something is, and the time that is left at the speed so far.

    `of_all` has the words for the time that is left of the whole command, from the seconds left of this part.
    """

    EVERY = 60.0

    def __init__(self, label: str, say: Callable[[str], None], of_all: Callable[[float], str]) -> None:
        self.label, self.say, self.of_all = label, say, of_all
        self.begun: tuple[float, int] | None = None
        """When the first part was done here, and how many were done then; others were done before."""
        self.said = 0.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if self.begun is None:
            self.begun, self.said = (now, done), now
        if now - self.said < self.EVERY:
            return
        self.said = now
        start, before = self.begun
        parts = [f"{done:,} of {total:,}", *([" ".join(note.split())] if note else [])]
        if done > before:
            from harness.training.speed import duration

            left = (total - done) * (now - start) / (done - before)
            parts.append(f"{duration(left)} left")
            parts += filter(None, [self.of_all(left)])
        self.say(f"{self.label}: {', '.join(parts)}")


class Terminal:
    """Reports progress on stderr: lines, and bars if stderr is a terminal; nothing if `silent`.

    `ahead` tells, for a run and its step, the seconds of what the command does after it (see `cli.ahead`).
    """

    def __init__(self, silent: bool = False):
        self.silent = silent
        self.ahead: Callable[[str, str], tuple[float, bool]] | None = None
        self.after: tuple[float, bool] = (0.0, True)

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.silent:
            print(visible.one_line(spelled(text)), file=sys.stderr, flush=True)

    def begin(self, run: str, step: str) -> None:
        """Print that a step of a run begins."""
        self.say(f"{run}: {step}")
        if self.ahead and not self.silent:
            self.after = self.ahead(run, step)

    def _of_all(self, left: float | None) -> str:
        """The time left of the whole command, if it is known to take more than these `left` seconds."""
        from harness.training.speed import duration

        seconds, whole = self.after
        if left is None or not seconds:
            return ""
        time = duration(left + seconds)
        return f"whole command {time if whole else time.replace('about', 'at least')}"

    def _clock_of_all(self, left: float | None) -> str:
        """The same for a bar, which has less room, as hours, minutes and seconds."""
        seconds, whole = self.after
        if left is None or not seconds:
            return ""
        return f"all {'' if whole else 'over '}{timedelta(seconds=round(left + seconds))}"

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Callable[..., None]]:
        """A progress bar with an ETA; it appears at the first `advance(done, total, note)`.

        In a log, where no terminal shows bars, it is a line each minute.
        """
        if self.silent:
            yield lambda done, total, note="": None
            return
        if not visible.is_terminal(sys.stderr):
            yield _Minutes(label, self.say, self._of_all)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        columns += [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("all", "note")]
        bars = Progress(*columns, console=visible.console(stderr=True), transient=True)
        task: Any = None

        def advance(done: int, total: int, note: str = "") -> None:
            nonlocal task
            if task is None:
                task = bars.add_task(label, total=total, note=note, all="")
                bars.start()
            bars.update(task, completed=done, total=total, **({"note": note} if note else {}))
            bars.update(task, all=self._clock_of_all(bars.tasks[0].time_remaining))

        try:
            yield advance
        finally:
            if task is not None:
                bars.stop()
