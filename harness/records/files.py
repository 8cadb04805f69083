"""Files of captions, and of lists of concepts, that steps pass to each other."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.store import bytes_of, write

PREDICTIONS, CANDIDATES, LISTS = "predictions.csv", "candidates.csv", "concepts.csv"
ATTENTION = "attention.npy"
"""Where the model looks in each image, uint8 (N, h, w) in the order of `PREDICTIONS`; all 0: unknown."""
_MOSTLY = 0.9  # share of the captions; in human captions the most common one has 1 %
_SHOWN = 80  # characters


@dataclass(frozen=True)
class Candidate:
    """A caption that an image may get.

    `weight` is its share in the mean of utilities. `log_probability` breaks ties: the natural logarithm, -inf
    if it is not known. `source` says where it is from.
    """

    caption: str
    weight: float = 1.0
    log_probability: float = -math.inf
    source: str = ""


def write_captions(path: Path, captions: Mapping[str, str]) -> Path:
    """Write `ID,caption` as CSV, whole or nothing."""
    return write_table(path, [("ID", "caption"), *captions.items()])


def write_table(path: Path, rows: Iterable[Sequence[str]]) -> Path:
    """Write rows as CSV (RFC 4180, with CRLF), whole or nothing."""
    text = io.StringIO()
    # with "\n" as line end, the writer would not quote a "\r" in a caption, which also ends lines
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return write(path, text.getvalue())


def read_table(path: Path) -> list[list[str]]:
    """The rows of a CSV file; a field may have any length.

    Raises `OSError`, `ValueError` or `csv.Error` if it can't be read.
    """
    text = bytes_of(path).decode()
    before = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # of the whole process
    try:
        return list(csv.reader(io.StringIO(text, newline=""), strict=True))
    finally:
        csv.field_size_limit(before)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its first row.

    Raises `ValueError` if a row has more or fewer columns; see `read_table`.
    """
    header, *rows = read_table(path) or [[]]
    if any(len(row) != len(header) for row in rows):
        raise ValueError("a row has more or fewer columns than the header")
    return [dict(zip(header, row, strict=True)) for row in rows]


def read_captions(path: Path) -> dict[str, str]:
    """Read what `write_captions` wrote. Raises `ValueError` or `csv.Error` for anything else."""
    rows = read_table(path)
    if rows[:1] != [["ID", "caption"]] or any(len(row) != 2 for row in rows):
        raise ValueError("not every row has an ID and a caption")
    found = dict(rows[1:])
    if len(found) < len(rows) - 1:
        raise ValueError("an id occurs twice")
    return found


def write_lists(path: Path, lists: Mapping[str, Sequence[str]]) -> Path:
    """Write `ID,CUIs` as CSV, the concepts of each image as `C1;C2`, whole or nothing."""
    return write_table(path, [("ID", "CUIs"), *((image, ";".join(cuis)) for image, cuis in lists.items())])


def read_lists(path: Path) -> dict[str, tuple[str, ...]]:
    """Read what `write_lists` wrote. Raises `ValueError` or `csv.Error` for anything else."""
    rows = read_table(path)
    if rows[:1] != [["ID", "CUIs"]] or any(len(row) != 2 for row in rows):
        raise ValueError("not every row has an ID and concepts")
    found = {image: tuple(filter(None, cuis.split(";"))) for image, cuis in rows[1:]}
    if len(found) < len(rows) - 1:
        raise ValueError("an id occurs twice")
    return found


_COLUMNS = ("ID", "source", "log_probability", "caption")


def write_candidates(path: Path, candidates: Mapping[str, Sequence[Candidate]]) -> Path:
    """Write the candidates of each image as CSV, whole or nothing; weights are not written."""
    rows = [
        (image, one.source, f"{one.log_probability:.4f}", one.caption)
        for image, given in candidates.items()
        for one in given
    ]
    return write_table(path, [_COLUMNS, *rows])


def read_candidates(path: Path) -> dict[str, list[Candidate]]:
    """Read what `write_candidates` or `write_captions` wrote.

    Raises `ValueError` or `csv.Error` for anything else.
    """
    first, *rows = read_table(path) or [[]]
    if first == ["ID", "caption"]:
        return {image: [Candidate(caption)] for image, caption in read_captions(path).items()}
    if tuple(first) != _COLUMNS or any(len(row) != len(_COLUMNS) for row in rows):
        raise ValueError(f"not every row has {', '.join(_COLUMNS)}")
    found: dict[str, list[Candidate]] = {}
    for image, source, log_probability, caption in rows:
        one = Candidate(caption, log_probability=float(log_probability), source=source)
        found.setdefault(image, []).append(one)
    return found


def sameness(values: Iterable[str], name: str = "captions") -> str | None:
    """A warning if more than 90 % of the captions (or concept lists) are empty or the same, else None."""
    texts = [" ".join(text.split()) for text in values]
    if not texts or (len(texts) == 1 and texts[0]):
        return None
    (text, count), *_ = Counter(texts).most_common(1)
    if count <= _MOSTLY * len(texts):
        return None
    share = f"all {count:,} {name}" if count > 1 else f"the only one of the {name}"
    if count < len(texts):
        share = f"{count:,} of {len(texts):,} {name} ({100 * count / len(texts):.1f} %)"
    if not text:
        return f"{share} {'are' if count > 1 else 'is'} empty"
    return f"{share} are the same: {text[:_SHOWN]!r}{'...' if len(text) > _SHOWN else ''}"


def same_in(split: str, captions: Mapping[str, str], name: str = "captions") -> list[str]:
    """The warning of `sameness` for a split, if there is one."""
    found = sameness(captions.values(), name)
    return [f"{split}: {found}"] if found else []
