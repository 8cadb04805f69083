"""The golden pairs of captions, also as another program would write them to a file."""

import csv
import io
from pathlib import Path

with (Path(__file__).parents[1] / "golden" / "pairs.csv").open(encoding="utf-8", newline="") as table:
    GOLDEN = list(csv.DictReader(table))
PREDICTIONS = {row["ID"]: row["prediction"] for row in GOLDEN}
REFERENCES = {row["ID"]: row["reference"] for row in GOLDEN}


def written(values: dict[str, str], separator: str, header: bool, end: str, quoted: bool = False) -> str:
    """The captions as another program would write them."""
    rows = [*([("ID", "Caption")] if header else []), *values.items()]
    if separator != ",":
        return "".join(f"{key}{separator}{value}{end}" for key, value in rows)
    text = io.StringIO()
    how = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator=end, quoting=how).writerows(rows)
    return text.getvalue()
