"""The labels of concept detection: which concepts are predicted, and which of them an image has."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.data.concepts import frequencies
from harness.data.listing import Example


def labels_of(examples: Iterable[Example], min_images: int) -> tuple[str, ...]:
    """The concepts of at least `min_images` of the training images: the most frequent first, ties by CUI."""
    found = frequencies(examples)
    return tuple(cui for cui, images in found.items() if images >= min_images)


@dataclass(frozen=True)
class Truth:
    """What images have: `has` (N, L) bool by label, and `counts` (N,) of all concepts, labels or not."""

    has: np.ndarray
    counts: np.ndarray


def truth_of(references: Sequence[Collection[str]], labels: Sequence[str]) -> Truth:
    """The truth of N lists of CUIs; a CUI that is listed twice counts once."""
    counts = np.array([len(set(cuis)) for cuis in references], dtype=np.int64)
    return Truth(indicators(references, labels), counts)


def indicators(lists: Sequence[Collection[str]], labels: Sequence[str]) -> np.ndarray:
    """Which labels each list has, (N, L) bool; other CUIs are passed over."""
    column = {cui: place for place, cui in enumerate(labels)}
    found = np.zeros((len(lists), len(labels)), dtype=bool)
    for row, cuis in enumerate(lists):
        found[row, [column[cui] for cui in cuis if cui in column]] = True
    return found
