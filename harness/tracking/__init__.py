"""The MLflow mirror of what runs write to disk (sole mlflow import).

Disk is the truth: a run never talks to MLflow. A separate process, the follower, mirrors new data every few
seconds. `sync` mirrors at any later time and to any server. Both can be killed at any moment: a point has the
step and the time of its row on disk, and a store that receives a point twice keeps one.
"""

import contextlib
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import records
from harness.errors import Problem, UserError
from harness.output.masking import masked
from harness.records.status import alive
from harness.store import fingerprint
from harness.tracking.bookkeeping import LOCK, State, mark
from harness.tracking.server import Mirror, read_study
from harness.tracking.stores import (
    HURRIED,
    failures,
    first_line,
    opened,
    refuse_broken,
    set_environment,
    tracking_uri,
)

NEEDS = ("variant", "seed", "started", "ended", "parameters", "git", "environment", "data", "steps", "scores")
NEEDS += ("artifacts", "submissions")
"""The keys of a record that the mirror shows."""
_log = logging.getLogger(__name__)
_PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
_ANEW = " anew, since the names of its metrics have changed; MLflow keeps the earlier one among deleted runs"
_SLOW = 2.0  # seconds; a failure that took longer means that no server answers, so other runs are not tried


def mirror(run_directory: Path, owner: int | None = None) -> bool:
    """Bring MLflow up to date with a run's `run.json` and its training step's `losses.jsonl`.

    The server is MLFLOW_TRACKING_URI, by default `mlflow.db` in the current folder. Each experiment name is
    an MLflow experiment. It has one parent run, with a child run per variant and seed. `mlflow.json` in the
    experiment's folder records what each server has. A RUNNING run is shown as KILLED if its process (`pid`
    in run.json, else `owner`) is gone. Returns whether a run of an earlier
    version, whose metrics have other names, was made anew. Raises one of `failures()` if the server fails.
    """
    from filelock import FileLock

    run_directory = Path(run_directory).resolve()
    record = records.read(run_directory, NEEDS)
    with FileLock(run_directory.parent / LOCK, timeout=60):
        state = State.load(run_directory.parent)
        mirrored = Mirror(run_directory, record, owner, state)
        mirrored.bring_up_to_date()
    return mirrored.replaced is not None


def sync(root: Path) -> list[str]:
    """Mirror every run in or under `root`; returns a line for each.

    A record that can't be read is left out and named. Raises `UserError` (exit code 1) with the runs that
    were not mirrored and the reasons, within seconds if the server does not answer.
    """
    server = masked(tracking_uri())
    if not (files := records.below(root)):
        records.read(root)  # raises, and names the runs that there are
    found, left_out = records.read_all(files, NEEDS)
    done, problems = [f"left out: {problem}" for problem in left_out], []
    done += [f"left out: {folder}: archived" for folder, record in found if record.get("archived")]
    found = [one for one in found if not one[1].get("archived")]
    if found:
        _look_for(server, found[0][0] if len(found) == 1 else root)
    set_environment(_PATIENT)
    for folder, _ in found:
        began = time.monotonic()
        try:
            anew = mirror(folder)
            done.append(f"{folder}: mirrored to {server}" + (_ANEW if anew else ""))
        except failures() as error:
            refuse_broken(error)
            problems.append(Problem(f"not mirrored to {server}: {first_line(error)}", folder))
            if time.monotonic() - began > _SLOW:
                break
    if problems:
        raise UserError(problems, hint="Nothing is lost. Try again: harness sync", exit_code=1)
    return done


def _look_for(server: str, waiting: Path) -> None:
    """Raise `UserError` (exit code 1), within seconds, if the server does not answer or refuses."""
    set_environment({})
    unset = {key: value for key, value in HURRIED.items() if key not in os.environ}
    os.environ.update(unset)
    try:
        opened(tracking_uri())
    except failures() as error:
        what = f"not mirrored to {server}: {first_line(error)}"
        hint = "Nothing is lost. Try again: harness sync"
        raise UserError([Problem(what, waiting, hint=hint)], exit_code=1) from None
    finally:
        for key in unset:
            os.environ.pop(key)


@dataclass(frozen=True)
class Follower:
    """The process that mirrors an experiment's runs while they run."""

    experiment_directory: Path
    process: subprocess.Popen[bytes]

    def finish(self, patience: float = 20.0) -> str | None:
        """Let it mirror the rest, for at most `patience` seconds; returns a message if that failed."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        found, _ = records.read_all(self.experiment_directory.glob(f"*/{records.FILE}"), NEEDS)
        if all(_is_mirrored(*one) for one in found if one[1]["status"] != "RUNNING"):
            return None
        log, server = self.experiment_directory / "mlflow.log", masked(tracking_uri())
        return f"MLflow at {server} was not reached (see {log}). Try again: harness sync"


def start(experiment_directory: Path) -> Follower:
    """Start to mirror every run of an experiment's folder in the background.

    The follower has its own session, so Ctrl-C ends the run but not the mirror of its last state. Its
    standard input is a pipe from this process: when the pipe closes, the run is over.
    """
    experiment_directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "harness", "sync", "--follow", str(experiment_directory)]
    with (experiment_directory / "mlflow.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Follower(experiment_directory, process)


@contextlib.contextmanager
def mirroring(experiment_directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Mirror an experiment's folder while the block runs; `say` gets a message if something is missing."""
    follower = start(experiment_directory)
    try:
        yield
    finally:
        if late := follower.finish():
            say(late)


def follow(experiment_directory: Path, parent: int, every: float = 3.0) -> None:
    """Mirror the runs of a folder every few seconds until `parent` is gone or standard input closes."""
    os.nice(10)  # the run needs the cores
    set_environment({})
    os.environ.update(HURRIED)  # not the user's limits: the follower retries, and the run waits for its end
    logging.basicConfig(level=logging.INFO, force=True)
    logging.getLogger().handlers[0].setFormatter(_Masking("%(asctime)s %(message)s"))
    ended = False
    while True:
        ended = ended or not alive(parent)
        _mirror_all(experiment_directory, parent)
        if ended:
            return
        ended = _input_closes(every)


class _Masking(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def _mirror_all(experiment_directory: Path, parent: int) -> None:
    files = sorted(experiment_directory.glob(f"*/{records.FILE}"))
    found, left_out = records.read_all(files, NEEDS)
    for problem in left_out:
        _log.warning("left out: %s", problem)
    for folder, record in found:
        began = time.monotonic()
        try:
            behind = folder == found[-1][0] and not _study_is_mirrored(experiment_directory)
            if behind or record["status"] == "RUNNING" or not _is_mirrored(folder, record):
                mirror(folder, parent)
        except (*failures(), UserError) as error:
            _log.warning("%s: %s", folder.name, first_line(error))
            if time.monotonic() - began > _SLOW:
                return


def _input_closes(seconds: float) -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


def _study_is_mirrored(experiment_directory: Path) -> bool:
    """Whether the record of a study is on the server; true if the experiment is not a study."""
    study = read_study(experiment_directory)
    return study is None or State.load(experiment_directory).parent.get("study") == fingerprint(study)


def _is_mirrored(folder: Path, record: records.Record) -> bool:
    """Whether a run's record is on the server as it is on disk."""
    entry = State.load(folder.parent).runs.get(folder.name, {})
    return entry.get("mirrored") == mark(record)
