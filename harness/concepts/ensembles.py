"""Several predictors, seeds or runs together: the mean of probabilities, or votes for decided concepts."""

from collections.abc import Collection, Sequence

import numpy as np

from harness.concepts.labels import indicators
from harness.concepts.thresholds import Thresholds, decide

_ROUNDED = 1e-6  # more than float32 rounds a share of the weights


def mean(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted mean float32 (N, L) of probabilities (N, L) of several runs; weights need not sum to 1."""
    total = np.zeros(values[0].shape)
    for one, weight in zip(values, weights, strict=True):
        total += weight * one
    total /= sum(weights)
    return np.clip(total, 0, 1).astype(np.float32)


def votes(
    decided: Sequence[Sequence[Collection[str]]],
    weights: Sequence[float],
    labels: Sequence[str],
    share: float,
    fallback: str,
) -> list[tuple[str, ...]]:
    """The concepts that at least a `share` of the weights gives, for each image, those of most weight first.

    `decided` are the CUIs that each run gives each image, all of them among `labels`, whose order breaks
    ties. Where no concept has the share, the fallback top1 gives the one of most weight.
    """
    found = mean([indicators(one, labels) for one in decided], weights)
    limit = np.full(len(labels), share - _ROUNDED, dtype=np.float32)
    return decide(found, Thresholds(tuple(labels), limit, fallback))
