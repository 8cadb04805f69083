"""What needs no image: the concepts that fit most training images."""

from collections import Counter
from collections.abc import Iterable

from harness.data.concepts import frequencies
from harness.data.listing import Example


def most_frequent_concept(training: Iterable[Example]) -> tuple[str, ...]:
    """The concept of most training images, ties by CUI; empty if none has a concept."""
    return tuple(frequencies(training))[:1]


def most_frequent_set(training: Iterable[Example]) -> tuple[str, ...]:
    """The set of concepts that most training images have, sorted; of several, the first in order of CUIs.

    Images without concepts do not count.
    """
    sets = Counter(tuple(sorted(set(example.cuis))) for example in training if example.cuis)
    return min(sets, key=lambda one: (-sets[one], one), default=())


BASELINES = {"most frequent concept": most_frequent_concept, "most frequent set": most_frequent_set}
"""By the name in tables: a function from the training rows to the concepts that every image gets."""
