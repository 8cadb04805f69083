"""N-grams of words as numbers, and how many captions of a collection hold each of them."""

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

ORDERS = 4
"""CIDEr compares n-grams of one to this many words."""


class Frequencies:
    """The document frequencies of a collection of captions: counted once, for any number of other captions.

    `size` is the number of captions in the collection.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        self.size = len(captions)
        self._words: dict[str, int] = {}
        self._held = [np.arange(0)] * ORDERS
        numbered = list(self._numbered(captions, self._words))
        self._held = [_distinct(keys) for _, keys, _ in numbered]
        self._counts = [
            np.bincount(_distinct(document * len(held) + grams) % len(held)) if len(held) else held
            for held, (document, _, grams) in zip(self._held, numbered, strict=True)
        ]

    def of(self, captions: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each order: the caption and the n-gram of each occurrence, and the frequency by n-gram.

        The collection alone decides the order of the n-grams that it holds; others have higher numbers.
        """
        numbered = self._numbered(captions, dict(self._words))
        for counts, (document, _, grams) in zip(self._counts, numbered, strict=True):
            others = max(int(grams.max(initial=-1)) + 1 - len(counts), 0)
            yield document, grams, np.concatenate([counts, np.zeros(others, dtype=counts.dtype)])

    def _numbered(
        self, captions: Sequence[str], known: dict[str, int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each order: caption, key and number of each n-gram; `known` gets the words that it lacks.

        A key is the number of the n-gram without its last word, and the last word.
        """
        words, document = _words(captions, known)
        starts, grams = np.arange(len(words)), np.zeros(len(words), dtype=np.int64)
        for order, held in enumerate(self._held):
            inside = starts + order < len(words)
            starts, grams = starts[inside], grams[inside]
            inside = document[starts] == document[starts + order]
            starts, grams = starts[inside], grams[inside]
            keys = (grams << 32) + words[starts + order]
            grams = _numbers(keys, held)
            yield document[starts], keys, grams


def _words(captions: Sequence[str], known: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """For each word of all captions, in order: the number of the word, and the number of its caption."""
    numbers, counts = array("q"), []
    for caption in captions:
        split = caption.split()
        counts.append(len(split))
        numbers.extend(known.setdefault(word, len(known)) for word in split)
    return np.array(numbers, dtype=np.int64), np.repeat(np.arange(len(captions)), counts)


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """The distinct numbers, sorted; numpy's hashing, which counts avoid, is slow for numbers such as keys."""
    return np.unique(numbers, return_counts=True)[0]


def _numbers(keys: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The place of each key in `held`, which is sorted; keys that are not there are numbered after it."""
    places = np.searchsorted(held, keys)
    lacking = places == len(held)
    lacking[~lacking] = held[places[~lacking]] != keys[~lacking]
    places[lacking] = len(held) + np.unique(keys[lacking], return_inverse=True)[1]
    return places
