"""The captions or concepts of a run, checked against the images of its splits."""

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import records
from harness.data.captionfiles import as_predictions, read
from harness.data.forms import INVALID, Task, plural
from harness.errors import Problem, UserError
from harness.records.files import read_rows
from harness.submission.checks import some


def predictions(
    folder: Path,
    record: Mapping[str, Any],
    split: str,
    ids: Sequence[str] | None = None,
    task: Task = "caption",
) -> dict[str, Any]:
    """What the run in `folder` submits for a split, by id, in the order of the split.

    These are its post-processed captions, or lists of CUIs.

    They are compared with the size of the split in the run's record, with the ids of the run's other files
    and, unless `ids` are given to submit, with the ids of its data folder. Raises `UserError`, with exit code
    3 if captions are missing, altered, cut short or of other images, and with 2 if the run has none yet.
    """
    file = records.place_of(folder, record, records.FINAL[task].format(split=split))
    again = records.again(record)
    try:
        found = as_predictions(read(records.checked(file, record)), task)
    except UserError as error:
        problems = [Problem(p.what, p.file, p.line, hint=again) for p in error.problems]
        raise UserError(problems, exit_code=INVALID) from None
    problems = list(_against_the_run(found, file, folder, record, split, task))
    if ids is None and not problems:
        problems = list(_against_the_data(found, file, folder, record, split))
    if problems:
        raise UserError(problems, exit_code=INVALID)
    return found


def _against_the_run(
    found: Mapping[str, Any], file: Path, folder: Path, record: Mapping[str, Any], split: str, task: Task
) -> Iterator[Problem]:
    again = records.again(record)
    size = record.get("data", {}).get("splits", {}).get(split)
    if size is not None and len(found) != size:
        yield Problem(
            f"holds {len(found):,} {plural(task)}; the {split} split of the run has {size:,}",
            file,
            hint=again,
        )
    before = [f"predictions/{split}_before.csv"] if task == "caption" else []
    for name in (*before, records.PER_IMAGE[task].format(split=split)):
        if name not in record["artifacts"]:
            continue
        other = records.place_of(folder, record, name)
        known = _ids_in(other)
        whole = known and (size is None or len(known) == size)  # else that other file is the damaged one
        if whole and (wrong := list(_differences(found, known))):
            yield from (Problem(f"{what}, compared with {other}", file, hint=again) for what in wrong)
            return


def _ids_in(table: Path) -> Collection[str]:
    """The ids of a CSV file from a step of the run; none if it can't be read."""
    try:
        return dict.fromkeys(row["ID"] for row in read_rows(table))
    except (OSError, ValueError, KeyError, csv.Error):
        return ()


def _against_the_data(
    found: Mapping[str, Any], file: Path, folder: Path, record: Mapping[str, Any], split: str
) -> Iterator[Problem]:
    from harness.data.readers import read as listed

    data = record.get("data", {})
    roots = [Path(data["root"]), records.root(folder, record).parent / data["root"]] if "root" in data else []
    root = next((root for root in roots if root.is_dir()), None)
    examples = listed(root, data.get("layout", "imageclef2023")).splits.get(split) if root else None
    hint = "Predict them all, or give the ids to submit: --ids FILE"
    for what in _differences(found, [example.id for example in examples or ()]) if examples else ():
        yield Problem(f"{what}, compared with the {split} split in {root}", file, hint=hint)


def _differences(found: Mapping[str, Any], ids: Collection[str]) -> Iterator[str]:
    known = set(ids)
    if missing := [key for key in ids if key not in found]:
        yield f"{some(missing)}: missing"
    if foreign := [key for key in found if known and key not in known]:
        yield f"{some(foreign)}: not of the split"
