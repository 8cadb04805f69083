"""Concept detection: F1 of predicted and reference concepts per image, averaged over images."""

from collections.abc import Sequence, Set

import numpy as np

_SECONDARY = """
C0002978 C0040405 C0024485 C0032743 C0041618 C1306645 C1140618 C0037949 C0030797 C0023216 C0037303 C0817096
C0006141 C0000726 C0920367
"""
SECONDARY = frozenset(_SECONDARY.split())
"""The concepts of the secondary score: modalities and body parts, against manually validated references."""


def f1(prediction: Set[str], reference: Set[str]) -> float:
    """F1 of one image's concepts, equal to sklearn's binary F1 over their union; 1 for two empty sets."""
    if not prediction and not reference:
        return 1.0
    return 2 * len(prediction & reference) / (len(prediction) + len(reference))


def scores(predictions: Sequence[Set[str]], references: Sequence[Set[str]]) -> np.ndarray:
    """F1 (n,) per image; the primary score is its mean."""
    pairs = zip(predictions, references, strict=True)
    return np.array([f1(prediction, reference) for prediction, reference in pairs])


def secondary_scores(predictions: Sequence[Set[str]], manual: Sequence[Set[str]]) -> np.ndarray:
    """F1 (n,) per image over the concepts of `SECONDARY` only, against the manual references.

    NaN for an image whose manual list has none of them: the organisers leave it out of the mean.
    """
    wanted = [found & SECONDARY for found in manual]
    found = scores([found & SECONDARY for found in predictions], wanted)
    return np.where([bool(one) for one in wanted], found, np.nan)
