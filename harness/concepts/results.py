"""What a prediction of concepts got right: by concept, by image, and against another prediction."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from harness.metrics import bootstrap, concepts
from harness.metrics.swaps import PERMUTATIONS, p_value, swapped
from harness.records.files import write_table

Lists = Sequence[Collection[str]]
"""The CUIs of each image."""
DRAWS = 1_000


@dataclass(frozen=True)
class Concept:
    """One concept over N images: in how many references (`support`), predicted lists, and in both.

    A ratio whose denominator is 0 is None: precision if the concept is never predicted, recall if no
    reference has it. F1 always has a number here, since a concept in neither is not listed.
    """

    COLUMNS: ClassVar = ("CUI", "name", "support", "predicted", "correct", "precision", "recall", "f1")

    cui: str
    name: str
    support: int
    predicted: int
    correct: int

    @property
    def precision(self) -> float | None:
        """The share of the images with the prediction that have the concept."""
        return self.correct / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """The share of the images with the concept that have the prediction."""
        return self.correct / self.support if self.support else None

    @property
    def f1(self) -> float:
        """2 TP / (predicted + true), over images."""
        return 2 * self.correct / (self.predicted + self.support)

    @property
    def wrong(self) -> int:
        """In how many images it is missed or invented."""
        return self.predicted + self.support - 2 * self.correct

    @property
    def row(self) -> tuple[str, ...]:
        """The values of `COLUMNS`, for tables; an absent number is empty."""
        ratios = ("" if one is None else f"{one:.6f}" for one in (self.precision, self.recall, self.f1))
        counts = map(str, (self.support, self.predicted, self.correct))
        return (self.cui, self.name, *counts, *ratios)


def per_concept(predictions: Lists, references: Lists, names: Mapping[str, str]) -> list[Concept]:
    """Every concept that is predicted or true in some image: that of most references first, ties by CUI."""
    pairs = [(set(ours), set(theirs)) for ours, theirs in zip(predictions, references, strict=True)]
    predicted = Counter(cui for ours, _ in pairs for cui in ours)
    support = Counter(cui for _, theirs in pairs for cui in theirs)
    correct = Counter(cui for ours, theirs in pairs for cui in ours & theirs)
    order = sorted(predicted.keys() | support.keys(), key=lambda cui: (-support[cui], cui))
    return [Concept(c, names.get(c, ""), support[c], predicted[c], correct[c]) for c in order]


def worst_first(found: Sequence[Concept]) -> list[Concept]:
    """The concepts by the number of images in which they are missed or invented, then by F1, support, CUI."""
    return sorted(found, key=lambda one: (-one.wrong, one.f1, -one.support, one.cui))


def write_per_concept(path: Path, found: Sequence[Concept]) -> Path:
    """Write the concepts as CSV, whole or nothing."""
    return write_table(path, [Concept.COLUMNS, *(one.row for one in found)])


@dataclass(frozen=True)
class Image:
    """One image: its F1, and its predicted concepts, those missed and those invented, each in given order."""

    COLUMNS: ClassVar = ("ID", "f1", "reference", "prediction", "missed", "invented")

    id: str
    f1: float
    reference: tuple[str, ...]
    prediction: tuple[str, ...]

    @property
    def missed(self) -> tuple[str, ...]:
        """Concepts of the reference that are not predicted."""
        return tuple(cui for cui in self.reference if cui not in self.prediction)

    @property
    def invented(self) -> tuple[str, ...]:
        """Predicted concepts that the reference lacks."""
        return tuple(cui for cui in self.prediction if cui not in self.reference)

    @property
    def row(self) -> tuple[str, ...]:
        """The values of `COLUMNS`, lists as `C1;C2`."""
        lists = (self.reference, self.prediction, self.missed, self.invented)
        return (self.id, f"{self.f1:.6f}", *map(";".join, lists))


def per_image(ids: Sequence[str], predictions: Lists, references: Lists) -> list[Image]:
    """The images in the given order; a CUI that is listed twice counts once."""
    scores = concepts.scores(*[[set(cuis) for cuis in lists] for lists in (predictions, references)])
    return [
        Image(image, float(f1), tuple(dict.fromkeys(theirs)), tuple(dict.fromkeys(ours)))
        for image, f1, ours, theirs in zip(ids, scores, predictions, references, strict=True)
    ]


def write_per_image(path: Path, found: Sequence[Image]) -> Path:
    """Write the images as CSV, whole or nothing."""
    return write_table(path, [Image.COLUMNS, *(one.row for one in found)])


def paired(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> dict[str, float | None]:
    """The mean of `ours` minus that of `theirs`, two F1 (n,) of the same images, with interval and p.

    `{"difference", "low", "high", "p"}` by the tests of `harness compare`: the 95 % interval of the paired
    bootstrap, which one image does not have, and the two-sided p of random swaps. Without images, all four
    are None.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} and {len(theirs)} images can't be paired")
    if not len(ours):
        return dict.fromkeys(("difference", "low", "high", "p"))
    excess = (ours - theirs)[:, None]
    difference = float(excess.mean())
    drawn = bootstrap.resample({"f1": excess}, {"f1": None}, DRAWS, seed)["f1"]
    low, high = bootstrap.interval(drawn) if len(excess) > 1 else (None, None)
    (moved,) = swapped([excess], PERMUTATIONS, seed)
    null = difference - 2 * moved[:, 0] / len(excess)
    p = p_value(null, difference, exact=2 ** len(excess) <= PERMUTATIONS)
    return {"difference": difference, "low": low, "high": high, "p": p}
