"""Reads a run's record: its folder, `run.json` and the files of its steps. No other room reads them.

Files on disk may be cut short, altered or of another kind. An unreadable file is a `UserError` that names the
file and says how to make it again. Readers of many runs leave such a record out and name it.

`files` has the forms in which steps write captions and concepts and read them again, `form` has that of
`run.json`, and `status` says whether a run's process still lives.
"""

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from harness.errors import Problem, UserError
from harness.records.files import Candidate, read_candidates, read_captions, read_lists, read_rows
from harness.records.form import SCORES, Run
from harness.store import DONE, GONE, RUNS, bytes_of, damage, damage_of, parsed, run_name

FILE, CONFIG = "run.json", "config.yaml"
ARCHIVE = "archive"
"""The folder in an experiment's folder with the runs that others replaced; see `keeping.replacing`."""
CAPTIONS, CONCEPTS = "captions", "concepts"
ON_VALID = "trained on validation images"
"""Why a run with `data.fit_on: [train, valid]` has no score on validation, under `unscored` in its record."""
Record = Mapping[str, Any]
FINAL = {"caption": "predictions/{split}_after.csv", "concept": "concepts/{split}.csv"}
"""The artifact with what a run submits, by task."""
PER_IMAGE = {
    "caption": "scores/{split}_after_per_image.csv",
    "concept": "scores/{split}_concepts_per_image.csv",
}
"""The artifact with the scores of each image, by task."""


def read(folder: Path, needs: Iterable[str] = (), key: str | None = None) -> dict[str, Any]:
    """The record of the run in a folder, which the config names by `key`.

    Raises `UserError` if there is none, if it can't be read, or if it lacks a key that its reader `needs`
    besides name, status, edition, command and config.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError([Problem("not a run: it has no run.json", folder, key=key, hint=_runs_near(folder))])
    problem = _problem(file, needs)
    if isinstance(problem, Problem):
        raise UserError([problem])
    return problem


def below(root: Path) -> list[Path]:
    """The `run.json` of every run in a folder; also a missing one, if the run's config is still there.

    Archived runs are not among them, unless `root` is a folder of archived runs.
    """
    found = {file.with_name(FILE) for name in (FILE, CONFIG) for file in root.rglob(name)}
    return sorted(file for file in found if file.relative_to(root).parts[-3:-2] != (ARCHIVE,))


def archived(root: Path) -> list[Path]:
    """The `run.json` of every archived run in a folder."""
    return sorted(root.rglob(f"{ARCHIVE}/*/{FILE}"))


def read_all(
    files: Iterable[Path], needs: Iterable[str] = ()
) -> tuple[list[tuple[Path, dict[str, Any]]], list[Problem]]:
    """Folder and record of each `run.json`, and the problems of those that are left out."""
    found, left_out = [], []
    for file in files:
        record = _problem(file, needs)
        if isinstance(record, Problem):
            left_out.append(record)
        else:
            found.append((file.parent, record))
    return found, left_out


def _problem(file: Path, needs: Iterable[str]) -> dict[str, Any] | Problem:
    """A record, or what is wrong with it."""
    hint = "Run the same command to write it again, or delete this folder. Finished steps are kept."
    try:
        if not file.is_file():
            raise ValueError("not a file" if os.path.lexists(file) else GONE)
        record = parsed(file.read_bytes())
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair can't be written to any file
        Run.model_validate(record)
        if missing := [key for key in needs if key not in record]:
            raise ValueError(f"{', '.join(missing)} is missing")
        above = len(PurePosixPath(record["name"]).parts) + (file.resolve().parts[-3:-2] == (ARCHIVE,))
        if above + 1 >= len(file.resolve().parts):
            raise ValueError("name has more parts than the path of this folder")
    except (OSError, ValueError, RecursionError) as error:
        return Problem(f"is not what a run writes: {_said(error)}", file, hint=hint)
    return record


def _said(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "model_type":  # its message has the name of our class
            return f"{place}: not a mapping" if place else "it is no mapping of names to values"
        return f"{place}: {first['msg']}" if place else first["msg"]
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


def _runs_near(folder: Path) -> str:
    """A hint with the runs below the folder, or else below runs/."""
    for place in (folder, RUNS):
        files = (file for file in below(place) if "mlartifacts" not in file.parts)  # copies, by MLflow
        if found := sorted(str(file.parent) for file in files):
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            return f"Runs: {', '.join(found[:8])}{more}"
    return "There are no runs yet; make some: harness run experiments/quickstart.yaml"


def nearest_image(record: Record, runs: Path) -> dict[str, Any] | None:
    """The record of the newest other run whose captions are those of the nearest training images.

    None if no such run has finished with the same edition, training and validation data.
    """
    data = [record["data"].get("fingerprints", {}).get(split) for split in ("train", "valid")]

    def is_one(other: Record) -> bool:
        config, theirs = other["config"], other.get("data", {}).get("fingerprints", {})
        return (
            full_name(other) != full_name(record)
            and (config.get("retrieval") or {}).get("neighbours") == 1
            and not config.get("consensus")
            and (other["status"], other["edition"]) == ("FINISHED", record["edition"])
            and [theirs.get(split) for split in ("train", "valid")] == data
        )

    found = [
        one for _, one in read_all(below(runs), ("variant", "seed", "scores", "ended"))[0] if is_one(one)
    ]
    return max(found, key=lambda one: (one["ended"] or "", full_name(one))) if all(data) and found else None


def task_of(record: Record) -> str:
    """The task of a run, captions or concepts; runs of earlier versions have captions."""
    return record["config"].get("task", CAPTIONS)


def tasks_of(record: Record) -> list[str]:
    """The tasks of a run: captions, concepts, or captions with concepts beside them."""
    if task_of(record) == CONCEPTS:
        return [CONCEPTS]
    beside = record["config"].get("concepts") or record.get("concepts")
    return [CAPTIONS, CONCEPTS] if beside else [CAPTIONS]


def on_valid(record: Record) -> dict[str, Any]:
    """The validation scores of what a run submits: captions after post-processing, or else concepts.

    Those of concepts are called `concept_f1` and `concept_f1_secondary`, as in MLflow.
    """
    if task_of(record) == CONCEPTS:
        found = (record.get("concepts") or {}).get("scores", {}).get("valid", {})
        return {f"concept_{name}": score for name, score in found.items()}
    return record["scores"].get("valid", {}).get("after", {})


def comparable(score: Record | None, own: Record | None) -> bool:
    """Whether two scores have values that were computed in the same way over as many images."""
    if not score or not own or score["value"] is None or own["value"] is None:
        return False
    return (score["signature"], score.get("n")) == (own["signature"], own.get("n"))


def name_of(record: Record) -> str:
    """The name of a run within its experiment, such as `base-s42`."""
    if record.get("archived"):
        return f"{ARCHIVE}/{record['archived']}"
    return run_name(record["variant"], record["seed"])


def full_name(record: Record) -> str:
    """The name of a run with its experiment's name, as under runs/ and submissions/."""
    return f"{record['name']}/{name_of(record)}"


def root(folder: Path, record: Record) -> Path:
    """The folder that a run's paths start from: `runs`, even if it was moved."""
    folder = folder.resolve()
    experiment = folder.parent.parent if folder.parent.name == ARCHIVE else folder.parent
    return experiment.parents[len(PurePosixPath(record["name"]).parts) - 1]


def artifact(folder: Path, record: Record, name: str) -> Path:
    """A file of a run by its name in the record, unchanged since its step wrote it.

    Raises `UserError` if the run has no such file yet, or if the file is gone or altered.
    """
    return checked(place_of(folder, record, name), record)


def place_of(folder: Path, record: Record, name: str) -> Path:
    """The path of a file of a run. Raises `UserError` if the run has no such file yet."""
    if name not in record.get("artifacts", {}):
        kind = name.partition("/")[0]
        has = [other for other in record.get("artifacts", {}) if other.startswith(f"{kind}/")]
        what = f"the run (status {record['status']}) has no {name}; it has {', '.join(has) or 'no ' + kind}"
        raise UserError([Problem(what, folder, hint=_next(record, name))])
    return root(folder, record) / record["artifacts"][name]


def _next(record: Record, name: str) -> str:
    """A hint with the command that makes a missing file; a finished run has not captioned this split."""
    command = record["command"]
    if record.get("trial"):
        return "A trial captions only valid: run the experiment that study best, or best, wrote for it."
    split = name.partition("/")[2].partition("_")[0].removesuffix(".csv")
    if why := record.get("unscored", {}).get(split):
        return f"It was {why}, so use it for test alone: --set 'predict.splits=[test]'"
    kinds = {"predictions": task_of(record) == CAPTIONS, "concepts": bool(record.get("concepts"))}
    if record["status"] == "FINISHED" and kinds.get(name.partition("/")[0]):
        verb = "Caption" if name.startswith("predictions/") else "Predict"
        return f"{verb} this split too: {command} --set 'predict.splits=[valid,test]'"
    if record["status"] == "FINISHED" and name.partition("/")[0] in kinds:
        return f"It is a run of task: {task_of(record)}; the section concepts adds concepts to captions."
    return finish(record)


def finish(record: Record) -> str:
    """How to finish a run: its command, and first why it failed, since the same command may fail again."""
    failure = record.get("failure") or {}
    if record["status"] != "FAILED" or not failure.get("reason"):
        return f"Finish it: {record['command']}"
    hint = failure.get("hint") or ""
    return f"It failed: {failure['reason']}. {hint} Its command: {record['command']}".replace("  ", " ")


def step_file(folder: Path, record: Record, step: str, name: str) -> Path | None:
    """A file from a step of the run; None if there is no step or no file yet.

    Raises `UserError` if the file has changed since the step wrote it.
    """
    place = record.get("steps", {}).get(step)
    file = root(folder, record) / place / name if place else None
    if file is None or not (file.exists() or damage_of(file)):
        return None
    return checked(file, record)


def checked(file: Path, record: Record) -> Path:
    """The file of a step. Raises `UserError` if it is gone or altered since the step wrote it."""
    wrong = damage_of(file) or (None if file.is_file() else GONE)
    if wrong:
        raise damaged(file, record, f"not what the step left: {wrong}")
    return file


def check_step(step: Path, record: Record) -> None:
    """Raises `UserError` if a file of a step of weights is gone or altered since the step wrote it."""
    found = damage(step) if (step / DONE).exists() else {DONE: GONE}
    hint = again(record, weights=True)
    wrong = [
        Problem(f"not what the step left: {what}", step / file, hint=hint) for file, what in found.items()
    ]
    if wrong:
        raise UserError(wrong)


def damaged(file: Path, record: Record, what: str) -> UserError:
    """The error for a file of a step that can't be used."""
    return UserError([Problem(what, file, hint=again(record, file.suffix == ".safetensors"))])


def again(record: Record, weights: bool = False) -> str:
    """What to do about an unusable file of a step: the run notices it and builds the step again.

    `weights` alone are made again only on request, since captions and scores do not need them any more.
    """
    command = record["command"]
    if not weights:
        return f"The run makes it again: {command}"
    if " run " in command:
        return f"The run makes it again: {command} --weights"
    return "Run the experiment of this run with --weights: harness run EXPERIMENT.yaml --weights"


def captions(file: Path, record: Record) -> dict[str, str]:
    """The captions by id from a step. Raises `UserError` if they can't be read."""
    try:
        return read_captions(file)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise damaged(file, record, f"can't be read as captions: {error}") from None


def lists(file: Path, record: Record) -> dict[str, tuple[str, ...]]:
    """The concepts by id from a step. Raises `UserError` if they can't be read."""
    try:
        return read_lists(file)
    except (OSError, ValueError, csv.Error) as error:
        raise damaged(file, record, f"can't be read as concepts: {error}") from None


def candidates(file: Path, record: Record) -> dict[str, list[Candidate]]:
    """The candidates by id from a step, or its captions. Raises `UserError` if they can't be read."""
    try:
        return read_candidates(file)
    except (OSError, ValueError, csv.Error) as error:
        raise damaged(file, record, f"can't be read as candidates: {error}") from None


def candidates_file(folder: Path, record: Record, split: str) -> Path:
    """The file with all candidates of a split from a run, or else with its captions before post-processing.

    Raises `UserError` if the run has neither yet, or if the file is gone or altered.
    """
    name = f"predictions/{split}_candidates.csv"
    made = name in record.get("artifacts", {})
    return artifact(folder, record, name if made else f"predictions/{split}_before.csv")


def per_image(file: Path, record: Record) -> dict[str, dict[str, str]]:
    """The rows of a `per_image.csv` by id. Raises `UserError` if they can't be read."""
    try:
        rows = {row["ID"]: row for row in read_rows(file)}
        if any("reference" not in row for row in rows.values()):
            raise ValueError("it has no column reference")
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise damaged(file, record, f"can't be read: {error}") from None
    return rows


def per_concept_image(
    file: Path, record: Record
) -> dict[str, tuple[tuple[str, ...], tuple[str, ...], float]]:
    """By id, the predicted and the true concepts of an image and its F1, as scoring concepts wrote them.

    Raises `UserError` if they can't be read.
    """
    try:
        return {row["ID"]: _detected(row) for row in read_rows(file)}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, csv.Error) as error:
        raise damaged(file, record, f"can't be read as scores of concepts: {error}") from None


def _detected(row: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...], float]:
    predicted, true = (
        tuple(dict.fromkeys(filter(None, row[name].split(";")))) for name in ("prediction", "reference")
    )
    if not 0 <= (f1 := float(row["f1"])) <= 1:
        raise ValueError(f"an F1 of {row['f1']}")
    return predicted, true, round(f1, 4)


def scores(file: Path, record: Record) -> dict[str, Any]:
    """The content of a score step's `scores.json`. Raises `UserError` if it can't be read."""
    try:
        content = parsed(bytes_of(file))
        SCORES.validate_python(content["scores"])
        if not isinstance(content["references"], str):
            raise ValueError("references is not text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(file, record, f"is not what a score step writes: {_said(error)}") from None
    return content
