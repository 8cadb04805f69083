"""The file of captions that steps hand to each other."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from harness.store import write

PREDICTIONS = "predictions.csv"


def write_captions(path: Path, captions: Mapping[str, str]) -> Path:
    """Write `ID,caption` as CSV, whole or nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ID", "caption"])
    writer.writerows(captions.items())
    return write(path, text.getvalue())


def read_captions(path: Path) -> dict[str, str]:
    """Read what `write_captions` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return {row["ID"]: row["caption"] for row in csv.DictReader(file)}
