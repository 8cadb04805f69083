"""Row bootstrap: how far a score would move had other images been drawn."""

from collections.abc import Callable

import numpy as np


def weights(rows: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each row is drawn in each resample: counts (resamples, rows) that sum to `rows`."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples)


def interval(
    values: np.ndarray,
    resamples: int,
    aggregate: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % percentile interval of a score over resampled rows.

    `values` is (n,) scores whose mean is the score, or with `aggregate` (n, k) statistics whose sums it turns
    into one. The same seed and n draw the same rows for every metric, so scores of one set move together.
    """
    drawn = np.concatenate([_totals(values, size, seed + start) for start, size in _blocks(resamples)])
    scores = aggregate(drawn) if aggregate else drawn / len(values)
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def _blocks(resamples: int, size: int = 100) -> list[tuple[int, int]]:
    # counts of all resamples at once would be 1000 x 10,000 integers
    return [(start, min(size, resamples - start)) for start in range(0, resamples, size)]


def _totals(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    return weights(len(values), resamples, seed).astype(float) @ values.astype(float)
