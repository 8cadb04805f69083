"""Files of captions that steps pass to each other."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from harness.store import bytes_of, write

PREDICTIONS = "predictions.csv"
_MOSTLY = 0.9  # share of the captions; in human captions the most common one has 1 %
_SHOWN = 80  # characters


def write_captions(path: Path, captions: Mapping[str, str]) -> Path:
    """Write `ID,caption` as CSV, whole or nothing."""
    return write_table(path, [("ID", "caption"), *captions.items()])


def write_table(path: Path, rows: Iterable[Sequence[str]]) -> Path:
    """Write rows as CSV (RFC 4180, with CRLF), whole or nothing."""
    text = io.StringIO()
    # with "\n" as line end, the writer would not quote a "\r" in a caption, which also ends lines
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return write(path, text.getvalue())


def read_captions(path: Path) -> dict[str, str]:
    """Read what `write_captions` wrote. Raises `ValueError` or `csv.Error` for anything else."""
    rows = list(csv.reader(io.StringIO(bytes_of(path).decode(), newline=""), strict=True))
    if rows[:1] != [["ID", "caption"]] or any(len(row) != 2 for row in rows):
        raise ValueError("not every row has an ID and a caption")
    found = dict(rows[1:])
    if len(found) < len(rows) - 1:
        raise ValueError("an id occurs twice")
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


def same_in(split: str, captions: Mapping[str, str]) -> list[str]:
    """The warning of `sameness` for a split, if there is one."""
    found = sameness(captions.values())
    return [f"{split}: {found}"] if found else []
