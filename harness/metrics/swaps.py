"""Paired approximate randomisation (Noreen 1989): how often random swaps differ as much as two systems do."""

from collections.abc import Iterator, Sequence

import numpy as np

PERMUTATIONS = 9_999
_BLOCK = 100  # rows of swaps that stay in memory at a time
_TIE = 1e-12  # smaller differences between scores of order 1 are rounding errors


def swapped(excess: Sequence[np.ndarray], resamples: int, seed: int) -> list[np.ndarray]:
    """The sums of the swapped rows in each contrast's excess (n, k), each (resamples, k)."""
    together = np.hstack(excess)
    totals = [swaps.astype(float) @ together for swaps in _swaps(len(together), resamples, seed)]
    ends = np.cumsum([part.shape[1] for part in excess])
    return np.split(np.vstack(totals), ends[:-1], axis=1)


def _swaps(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of swaps, 1 for a swapped row, (at most `_BLOCK`, rows): random, or all 2^rows if few enough."""
    if 2**rows <= resamples:
        yield np.arange(2**rows)[:, None] >> np.arange(rows) & 1
        return
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        yield random.integers(2, size=(min(_BLOCK, resamples - start), rows), dtype=np.uint8)


def p_value(null: np.ndarray, observed: float, exact: bool) -> float:
    """The two-sided p of a difference against those of swapped rows (r,), as scipy's `permutation_test`.

    Random swaps do not include the observed difference, so it is added. Raises `ValueError` for numbers that
    are not finite, because they would count as extreme.
    """
    if not (np.isfinite(null).all() and np.isfinite(observed)):
        raise ValueError("no p value of differences that are not finite")
    added = 0 if exact else 1
    tail = min((null <= observed + _TIE).sum(), (null >= observed - _TIE).sum())
    return min(1.0, 2 * float(tail + added) / (len(null) + added))
