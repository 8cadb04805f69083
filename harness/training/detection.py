"""How good a classifier of concepts is while it trains."""

from collections.abc import Collection, Sequence

import numpy as np

from harness.concepts.labels import truth_of
from harness.concepts.thresholds import best_global, floor_of


def best_f1(probabilities: np.ndarray, labels: Sequence[str], references: Sequence[Collection[str]]) -> float:
    """The F1 of concepts, averaged over images, at the best of all thresholds that are one for all labels.

    `probabilities` (N, L); an image without a probability above the threshold gets its most probable label.
    The threshold is chosen on the same images, so this is more than a test would give.
    """
    truth = truth_of(references, labels)
    floor = floor_of(probabilities, truth, "top1")
    given = probabilities > best_global(probabilities, truth, floor)
    # not the sum of the search, whose rounding could tell equal epochs apart
    counts, hits = given.sum(1), (given & truth.has).sum(1)
    return float(np.where(counts > 0, 2 * hits / np.maximum(counts + truth.counts, 1), floor).mean())
