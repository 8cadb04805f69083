"""Thresholds of probabilities, chosen for the F1 that is averaged over images.

A concept is given if its probability is above its threshold, so one of probability 0 is never given. The F1
of an image is 2 TP / (predicted + true), as `metrics.concepts.f1`; it is not the micro F1 of all decisions.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.concepts.labels import Truth, truth_of
from harness.concepts.settings import ThresholdsConfig
from harness.config.sections import AUTO
from harness.errors import Problem, UserError

TIE = 1e-9
"""Sums of the F1 of all images that differ by less are equal: sums round."""
_ROWS = 4096  # images that are compared with thresholds at a time
_LABELS = 64  # columns that are copied at a time, since reading one column of a matrix is slow
_LARGEST = 32  # probabilities an image that the search for a global threshold looks at first


@dataclass(frozen=True)
class Thresholds:
    """What decides: `values` float32 (L,) from 0 to 1 of `labels` (L), and the config's `fallback`."""

    labels: tuple[str, ...]
    values: np.ndarray
    fallback: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON: `fallback`, and `thresholds` by CUI, each as the shortest number that is this float32."""
        values = (float(str(value)) for value in self.values)
        return {"fallback": self.fallback, "thresholds": dict(zip(self.labels, values, strict=True))}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Thresholds":
        """What `as_dict` gave."""
        found = given["thresholds"]
        return cls(tuple(found), np.array(list(found.values()), dtype=np.float32), given["fallback"])


def choose(
    values: np.ndarray,
    labels: Sequence[str],
    references: Sequence[Collection[str]],
    config: ThresholdsConfig,
) -> Thresholds:
    """The thresholds for probabilities (N, L) of images with these references (N lists of CUIs).

    Labels are in the order of the pass: the most frequent first. Raises `UserError` without images.
    """
    if not len(references):
        what = "no image of the half tune of valid has probabilities; thresholds are chosen on this half"
        raise UserError([Problem(what, key="concepts.thresholds", hint="Use more validation images.")])
    truth = truth_of(references, labels)
    floor = floor_of(values, truth, config.fallback)
    if config.kind == "global":
        start = best_global(values, truth, floor)
        return Thresholds(tuple(labels), np.full(len(labels), start, np.float32), config.fallback)
    start = best_global(values, truth, floor) if config.start == AUTO else np.float32(config.start)
    found = one_pass(values, truth, floor, np.full(len(labels), start, np.float32))
    return Thresholds(tuple(labels), found, config.fallback)


def decide(values: np.ndarray, thresholds: Thresholds, most: int | None = None) -> list[tuple[str, ...]]:
    """The concepts of images with probabilities (N, L), each the most probable first, ties by label.

    Without a concept above its threshold, the fallback top1 gives the most probable one. `most` is the
    largest number that an image gets.
    """
    found = []
    for row in values:
        (given,) = np.nonzero(row > thresholds.values)
        if not len(given) and thresholds.fallback == "top1" and len(row):
            given = np.array([row.argmax()])
        ranked = given[np.argsort(-row[given], kind="stable")][:most]
        found.append(tuple(thresholds.labels[place] for place in ranked))
    return found


def floor_of(values: np.ndarray, truth: Truth, fallback: str) -> np.ndarray:
    """The F1 (N,) of images without a concept above its threshold: that of the fallback."""
    if fallback != "top1" or not values.shape[1]:
        return (truth.counts == 0).astype(float)
    hits = truth.has[np.arange(len(values)), values.argmax(axis=1)]
    return 2 * hits / (1 + truth.counts)


def best_global(values: np.ndarray, truth: Truth, floor: np.ndarray) -> np.float32:
    """The one threshold with the highest F1 averaged over images; of several, the highest.

    The search is exact over all distinct probabilities. It begins with the largest ones, and ends where no
    lower threshold can be better: with further concepts, the F1 of an image is at most that of a reader who
    adds all its true ones and nothing else.
    """
    wanted = _LARGEST * len(values)
    while True:
        every = wanted >= values.size
        cut = np.float32(0) if every else np.partition(values, values.size - wanted, axis=None)[-wanted]
        total, threshold, bound = _swept(values, truth, floor, cut)
        if every or cut <= 0 or bound < total:
            return threshold
        wanted *= 4


def _swept(
    values: np.ndarray, truth: Truth, floor: np.ndarray, cut: np.float32
) -> tuple[float, np.float32, float]:
    """The best sum of F1 with a threshold among probabilities from `cut` on, the threshold, and the highest
    sum that a lower threshold could reach."""
    rows, columns = np.nonzero((values >= cut) & (values > 0))
    found = values[rows, columns]
    order = np.lexsort((-found, rows))
    rows, found, hits = rows[order], found[order], truth.has[rows[order], columns[order]]
    given = np.bincount(rows, minlength=len(values))
    first = np.cumsum(given) - given
    number = np.arange(len(rows)) - first[rows] + 1
    so_far = np.cumsum(hits)
    right = so_far - (so_far - hits)[first[rows]] if len(rows) else so_far
    score = 2 * right / (number + truth.counts[rows])
    gain = score - np.where(number == 1, floor[rows], np.roll(score, 1))
    lower = np.max(values, where=values < cut, initial=0) if cut > 0 else np.float32(0)
    order = np.argsort(-found, kind="stable")
    sums, thresholds, _ = _cuts(found[order], gain[order], lower)
    best = np.flatnonzero(sums >= sums.max() - TIE)[0]
    reachable, correct = truth.has.sum(axis=1), np.bincount(rows, weights=hits, minlength=len(values))
    highest = 2 * reachable / np.maximum(given + reachable - correct + truth.counts, 1)
    bound = np.where(given > 0, highest, np.maximum(highest, floor)).sum()
    return floor.sum() + sums[best], thresholds[best], bound


def one_pass(values: np.ndarray, truth: Truth, floor: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The thresholds (L,) after one pass over the labels, in their order, from `start` (L,).

    Each threshold moves to where the F1 averaged over images is highest while the others stay, if it rises.
    Such a place is just below an image that has the concept, halfway to the next probability, or above all
    images; of equal ones the nearest, and of two as near the higher one. Only the counts of images are kept,
    and of a label only the images that some such threshold would give it.
    """
    thresholds = start.astype(np.float32)
    given, right = _counts(values, truth, thresholds)
    for first in range(0, values.shape[1], _LABELS):
        part = slice(first, first + _LABELS)
        columns = zip(*(np.ascontiguousarray(one[:, part].T) for one in (values, truth.has)), strict=True)
        for place, (column, has) in enumerate(columns, first):
            has = has & (column > 0)
            above = column > thresholds[place]
            (rows,) = np.nonzero(above | (column >= np.min(column, where=has, initial=2)))
            if not len(rows):
                continue
            now = above[rows]
            others, correct = given[rows] - now, right[rows] - (now & has[rows])
            gain = _gain(others, correct, has[rows], truth.counts[rows], floor[rows])
            found = _moved(column, rows, has, gain, thresholds[place])
            if found is not None:
                thresholds[place] = found
                then = column[rows] > found
                given[rows], right[rows] = others + then, correct + (then & has[rows])
    return thresholds


def _gain(
    others: np.ndarray, correct: np.ndarray, has: np.ndarray, wanted: np.ndarray, floor: np.ndarray
) -> np.ndarray:
    """What the F1 of images (n,) gains by one more concept, which they have or not, beside `others`."""
    without = np.where(others > 0, 2 * correct / np.maximum(others + wanted, 1), floor)
    return 2 * (correct + has) / (others + 1 + wanted) - without


def _moved(
    column: np.ndarray, rows: np.ndarray, has: np.ndarray, gain: np.ndarray, now: np.float32
) -> np.float32 | None:
    """The better threshold of a label with probabilities `column` (N,); None if `now` is as good as any."""
    order = np.argsort(-column[rows])  # the order of equal ones changes no sum of whole groups
    found = column[rows][order]
    lower = np.max(column, where=column < found[-1], initial=0)
    sums, places, ends = _cuts(found, gain[order], lower)
    hits = np.append(0, np.cumsum(has[rows][order])[ends])
    sums[1:][np.diff(hits) == 0] = -np.inf
    if sums.max() <= gain[column[rows] > now].sum() + TIE:
        return None
    best = np.flatnonzero(sums >= sums.max() - TIE)
    return places[best[np.abs(places[best].astype(float) - now).argmin()]]


def _cuts(
    found: np.ndarray, gain: np.ndarray, lower: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sums of gains (k,) for each place of a threshold, these thresholds (k,), the highest first, and the
    last index in `found` that each of them gives, but for the first, which gives none (k - 1).

    `found` are positive probabilities, the highest first, each with what it gains if it is given. A threshold
    lies halfway between two distinct ones: 1 and the highest, and so on, down to the lowest and `lower`.
    """
    ends = np.flatnonzero(np.append(found[1:] != found[:-1], True)) if len(found) else np.array([], int)
    sums = np.append(0.0, np.cumsum(gain)[ends])
    upper = np.append(np.float32(1), found[ends])
    below = np.append(found[ends], np.float32(lower))
    halfway = ((upper.astype(float) + below) / 2).astype(np.float32)
    return sums, np.where((halfway < upper) | (upper == below), halfway, below), ends


def _counts(values: np.ndarray, truth: Truth, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many concepts each image gets, and how many of them are right, (N,) each."""
    given, right = np.zeros((2, len(values)), dtype=np.int64)
    for start in range(0, len(values), _ROWS):
        part = slice(start, start + _ROWS)
        above = values[part] > thresholds
        given[part], right[part] = above.sum(axis=1), (above & truth.has[part]).sum(axis=1)
    return given, right
