"""The files of captions that steps hand to each other."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from harness.store import write

PREDICTIONS = "predictions.csv"


def write_captions(path: Path, captions: Mapping[str, str]) -> Path:
    """Write `ID,caption` as CSV, whole or nothing."""
    return write_table(path, [("ID", "caption"), *captions.items()])


def write_table(path: Path, rows: Iterable[Sequence[str]]) -> Path:
    """Write rows as CSV (RFC 4180, with CRLF), whole or nothing."""
    text = io.StringIO()
    # with "\n" as its end of line, the writer would leave a "\r" in a caption unquoted, which ends lines too
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return write(path, text.getvalue())


def read_captions(path: Path) -> dict[str, str]:
    """Read what `write_captions` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return {row["ID"]: row["caption"] for row in csv.DictReader(file)}
