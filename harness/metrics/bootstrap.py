"""Row bootstrap: how much a score would change with another sample of images."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

Aggregate = Callable[[np.ndarray], np.ndarray]
_BLOCK = 100


def weights(rows: int, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each resample draws each row: blocks of counts (b, rows), b <= 100, that sum to `rows`.

    The same seed draws the same rows, so all scores of one set of images use the same resamples.
    """
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        drawn = random.integers(rows, size=(size, rows)) + np.arange(size)[:, None] * rows
        yield np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)


def resample(
    values: Mapping[str, np.ndarray],
    aggregates: Mapping[str, Aggregate | None],
    resamples: int,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Each score over the same resampled rows, (resamples,).

    `values` are (n,) scores whose mean is the score. For a metric with an aggregate they are (n, k)
    statistics, and the aggregate turns their sums into the score.
    """
    names = list(values)
    columns = [np.reshape(values[name], (len(values[name]), -1)) for name in names]
    together = np.hstack(columns).astype(float)
    totals = np.vstack(
        [counts.astype(float) @ together for counts in weights(len(together), resamples, seed)]
    )
    parts = np.split(totals, np.cumsum([column.shape[1] for column in columns])[:-1], axis=1)
    found = {}
    for name, part in zip(names, parts, strict=True):
        aggregate = aggregates[name]
        found[name] = aggregate(part) if aggregate else part[:, 0] / len(together)
    return found


def interval(scores: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resampled scores (resamples,)."""
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
