"""Concept detection: F1 per image over the concepts of prediction and reference, averaged over images."""

from collections.abc import Mapping, Set

import numpy as np

_SECONDARY = """
C0002978 C0040405 C0024485 C0032743 C0041618 C1306645 C1140618 C0037949 C0030797 C0023216 C0037303 C0817096
C0006141 C0000726 C0920367
"""
SECONDARY = frozenset(_SECONDARY.split())
"""The concepts of the secondary score: modalities and body parts, against manually validated references."""


def f1(prediction: Set[str], reference: Set[str]) -> float:
    """F1 of one image's concepts, as sklearn's binary F1 over their union; two empty sets are 1."""
    if not prediction and not reference:
        return 1.0
    return 2 * len(prediction & reference) / (len(prediction) + len(reference))


def scores(predictions: Mapping[str, Set[str]], references: Mapping[str, Set[str]]) -> np.ndarray:
    """F1 (n,) per image in the order of `references`; the primary score is its mean."""
    return np.array([f1(predictions[image], concepts) for image, concepts in references.items()])


def secondary_scores(predictions: Mapping[str, Set[str]], manual: Mapping[str, Set[str]]) -> np.ndarray:
    """F1 (n,) per image over the concepts of `SECONDARY` alone, against the manual references."""
    return scores(
        {image: concepts & SECONDARY for image, concepts in predictions.items()},
        {image: concepts & SECONDARY for image, concepts in manual.items()},
    )
