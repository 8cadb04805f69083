"""What scoring leaves on disk: a table per image for people, and full numbers for `compare`."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.records.files import write_table
from harness.store import fingerprint, write

if TYPE_CHECKING:
    from harness.metrics import Score


def write_per_image(
    path: Path,
    ids: Sequence[str],
    references: Sequence[str],
    predictions: Sequence[str],
    scores: Mapping[str, "Score"],
) -> Path:
    """Write a CSV file with ID, reference, prediction and a column of scores for each metric that has them.

    The cell is empty if an image does not count.
    """
    named = {name: score.per_image for name, score in scores.items() if score.per_image is not None}
    columns = [["" if math.isnan(value) else f"{value:.6f}" for value in values] for values in named.values()]
    rows = zip(ids, references, predictions, *columns, strict=True)
    return write_table(path, [("ID", "reference", "prediction", *named), *rows])


def write_arrays(path: Path, ids: Sequence[str], scores: Mapping[str, "Score"]) -> Path:
    """Write `ids` (n,) and, under the name of each metric that has a value, what resampling needs.

    This is (n, k) statistics if the metric has an aggregate, else (n,) scores, with NaN for a row that does
    not count.
    """
    arrays = {
        name: score.per_image if score.statistics is None else score.statistics
        for name, score in scores.items()
        if score.value is not None
    }
    content = io.BytesIO()
    np.savez_compressed(content, ids=np.array(ids, dtype=str), **arrays)
    return write(path, content.getvalue())


def read_arrays(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The ids and arrays that `write_arrays` wrote."""
    with np.load(path, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}
    return arrays.pop("ids").tolist(), arrays


def references_fingerprint(ids: Sequence[str], references: Sequence[str]) -> str:
    """The fingerprint of a set of references, whatever the order of its rows."""
    return fingerprint(sorted(zip(ids, references, strict=True)))
