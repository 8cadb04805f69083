"""What a submission is made from: files of ids, and files of captions or concepts."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from harness import submission
from harness.errors import Problem, UserError
from harness.submission.form import Task

_HINT = "Give the organisers' list of ids, a label file of the split, or a file with one id a line."


def read_ids(path: Path) -> list[str]:
    """The ids of a split in the order of the file: one a line, or the first column of a label file.

    Label files are those of any layout, tab-separated without quoting or CSV, with or without a header.
    Raises `UserError` with every line that holds no id, or an id that was there before.
    """
    lines = list(_first_column(_text(path, _HINT), path))
    if lines and lines[0][1].strip().lower() == "id":
        lines = lines[1:]
    problems = [
        Problem(f"got {key!r}; an id has no white space and is not empty", path, line, hint=_HINT)
        for line, key in lines
        if key.split() != [key]
    ]
    times = Counter(key for _, key in lines)
    seen: set[str] = set()
    for line, key in lines:
        if times[key] > 1 and key in seen:
            problems.append(Problem(f"{key} is there already", path, line, hint="Give each id once."))
        seen.add(key)
    if not lines:
        problems.append(Problem("holds no ids", path, hint=_HINT))
    if problems:
        raise UserError(problems)
    return [key for _, key in lines]


def read_predictions(path: Path, task: Task = "caption") -> dict[str, str] | dict[str, list[str]]:
    """Captions, or lists of CUIs, by id: from a run's `predictions.csv` or a submission of any edition.

    Raises `UserError` with every row that can't be read.
    """
    is_ours = path.is_file() and path.read_bytes()[:10].lower() == b"id,caption"
    found = _csv(path) if is_ours else submission.read(path)
    if task == "caption":
        return found
    return {key: [cui for cui in value.split(";") if cui] for key, value in found.items()}


def _text(path: Path, hint: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError([Problem(f"can't be read: {error.strerror}", path, hint=hint)]) from None
    except UnicodeDecodeError as error:
        raise UserError([Problem(f"not UTF-8 at byte {error.start}", path, hint=hint)]) from None


def _first_column(text: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line number and first field of each row that is not blank."""
    first = text.partition("\n")[0]
    if "," in first and "\t" not in first:
        yield from ((line, row[0]) for line, row in _rows(text, path))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.partition("\t")[0]


def _csv(path: Path) -> dict[str, str]:
    values: dict[str, str] = {}
    problems = []
    for line, row in list(_rows(_text(path, "Save it as UTF-8."), path))[1:]:
        if len(row) != 2:
            problems.append(Problem(f"has {len(row)} columns, not 2", path, line))
        elif row[0] in values:
            problems.append(Problem(f"{row[0]} is there already", path, line))
        else:
            values[row[0]] = row[1]
    if problems:
        raise UserError(problems)
    return values


def _rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each CSV row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""))
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError([Problem(f"can't be read as CSV: {error}", path, line)]) from None
