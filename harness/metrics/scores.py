"""A score: the aggregate of numbers per image, with its interval and signature."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.config.editions import EDITIONS
from harness.metrics import bootstrap
from harness.metrics.base import Absent, Measured
from harness.metrics.table import READINGS, aggregate


@dataclass(frozen=True)
class Score:
    """One metric over one set of captions.

    `value` has a 95 % row bootstrap interval [`low`, `high`]. It is None, with a `reason`, if it could not be
    computed. `n` images count. `official` is true only if the edition's own checkpoint computed the score.
    `per_image` (n,) has NaN for an image that does not count. `aggregate(name)` turns `statistics` (n, k)
    into the value.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    signature: str
    official: bool
    seconds: float
    reason: str | None = None
    per_image: np.ndarray | None = field(default=None, repr=False)
    statistics: np.ndarray | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The score as JSON-like values, without its arrays; `reason` only if there is one."""
        arrays = ("per_image", "statistics")
        values = {key: value for key, value in vars(self).items() if key not in arrays}
        return values if self.reason else {key: v for key, v in values.items() if key != "reason"}


@dataclass(frozen=True)
class Found:
    """The result of one metric: a measurement, or the reason why there is none."""

    measured: Measured | None
    seconds: float
    reason: str | None = None


def finite(measured: Measured) -> Measured:
    """The measurement; raises `Absent` if a number is not finite."""
    arrays = [measured.per_image, *([] if measured.statistics is None else [measured.statistics])]
    rows = sorted({int(row) for array in arrays for row in np.argwhere(~np.isfinite(array))[:, 0]})
    if rows:
        raise Absent(f"gave no finite number for {len(rows)} captions, the first in row {rows[0] + 1}")
    if measured.value is not None and not math.isfinite(measured.value):
        raise Absent("gave no finite number for all captions together")
    return measured


def on_rows(scores: Mapping[str, Score], rows: np.ndarray, resamples: int = 1000) -> dict[str, Score]:
    """The scores of some of their `rows` (n,) bool, from the arrays that scoring left.

    Nothing is measured again, so CIDEr's document frequencies stay those of all references. A score that has
    no arrays, or no rows that count, is absent with a reason.
    """
    found = {name: _kept(score, rows) for name, score in scores.items()}
    return with_intervals(found, int(rows.sum()), resamples, None)


def _kept(score: Score, rows: np.ndarray) -> Found:
    values = score.per_image if score.statistics is None else score.statistics
    if score.value is None or values is None or not rows.any():
        lacking = "its scoring left no number for each image" if rows.any() else "there are no images"
        return Found(None, 0.0, score.reason or lacking)
    kept, corpus = np.asarray(values, dtype=float)[rows], aggregate(score.name)
    if np.isnan(kept).all():
        return Found(None, 0.0, "none of these images counts for this score")
    if corpus is None:
        return Found(Measured(kept, score.signature, score.official), 0.0)
    value = float(corpus(kept.sum(0)))
    return Found(Measured(corpus(kept), score.signature, score.official, value, kept), 0.0)


def with_intervals(
    found: Mapping[str, Found], n: int, resamples: int, edition: int | None
) -> dict[str, Score]:
    """The scores; `edition` says which of them can be official, None leaves that to the metric.

    Only rows that count are resampled. Scores of the same rows are resampled together.
    """
    arrays = {
        name: one.measured.per_image if one.measured.statistics is None else one.measured.statistics
        for name, one in found.items()
        if one.measured
    }
    counted = {name: values[np.isfinite(values.reshape(n, -1)).all(1)] for name, values in arrays.items()}
    intervals = {}
    for rows in {len(values) for values in counted.values()} - {1} if resamples else ():
        same = {name: values for name, values in counted.items() if len(values) == rows}
        resampled = bootstrap.resample(same, {name: aggregate(name) for name in same}, resamples)
        intervals |= {name: bootstrap.interval(scores) for name, scores in resampled.items()}
    return {
        name: _score(
            name,
            result.measured,
            *intervals.get(name, (None, None)),
            len(counted[name]),
            result.seconds,
            result.measured.official and _is_official(name, edition),
        )
        if result.measured
        else Score(name, None, None, None, n, "", False, result.seconds, result.reason)
        for name, result in found.items()
    }


def _score(
    name: str,
    measured: Measured,
    low: float | None,
    high: float | None,
    n: int,
    seconds: float,
    official: bool,
) -> Score:
    return Score(
        name,
        float(np.nanmean(measured.per_image)) if measured.value is None else measured.value,
        low,
        high,
        n,
        measured.signature,
        official,
        seconds,
        per_image=measured.per_image,
        statistics=measured.statistics,
    )


def _is_official(name: str, edition: int | None) -> bool:
    """Whether the organisers of an edition are known to score by a metric of that name and definition."""
    if edition is None:
        return True
    year = EDITIONS[edition]
    return year.primary is not None and name in {*year.metrics, *year.aggregates} - {*READINGS.values()}
