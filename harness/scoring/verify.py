"""Compares our scores with the original packages', one pair at a time, with the same weights."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from harness import metrics
from harness.metrics import Score, concepts
from harness.metrics.base import Inputs
from harness.models.remarks import quieten

TOLERANCE = 1e-5
SEED = 0


@dataclass(frozen=True)
class Verified:
    """One metric compared with its original `package`: the largest `difference` over `rows` rows.

    If there is no package or no comparison, the difference is None and `why` has the reason.
    """

    package: str | None
    rows: int
    difference: float | None
    why: str | None = None

    @property
    def fails(self) -> bool:
        """Whether the scores differ by more than `TOLERANCE`, or one of them is not a number."""
        return self.difference is not None and not self.difference <= TOLERANCE


def chosen(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` rows, the same at every call."""
    return sorted(np.random.default_rng(SEED).permutation(count)[:wanted].tolist())


def captions(inputs: Inputs, scores: Mapping[str, Score], wanted: int) -> dict[str, Verified]:
    """Each score of captions compared with its original package, on at most `wanted` rows of the `inputs`.

    Rows with a blank side are left out: each edition has its own rule for them, and packages have none.
    """
    quieten()
    metrics.unload()  # to free memory, since the original loads the weights too
    return {name: _verified(name, score, inputs, wanted) for name, score in scores.items()}


def _verified(name: str, score: Score, inputs: Inputs, wanted: int) -> Verified:
    metric = metrics.named(name)
    if score.value is None or score.per_image is None:
        return Verified(None, 0, None, f"absent: {score.reason}")
    original = metric and metric.original
    if original is None:
        return Verified(None, 0, None, "no package to compare with")
    if inputs.config.precision != "fp32" and metric.neural:
        return Verified(original.package, 0, None, "not compared: the package computes in fp32")
    pairs = inputs.pairs if original.raw else inputs.clean_pairs
    rows = [row for row in chosen(len(pairs), wanted) if all(side.strip() for side in pairs[row])]
    if not rows:
        return Verified(original.package, 0, None, "not compared: a side of each chosen row is blank")
    ours = _again(name, inputs, rows) if original.corpus else score.per_image[rows]
    try:
        theirs = original.scores(inputs, [pairs[row] for row in rows])
    except Exception as error:  # any error of a package is its answer to these captions
        why = f"not compared: it stops at {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Verified(original.package, 0, None, why)
    return Verified(original.package, len(rows), float(np.abs(np.asarray(theirs) - ours).max()))


def _again(name: str, inputs: Inputs, rows: Sequence[int]) -> np.ndarray:
    """Our scores of some rows, scored as a corpus of their own."""
    some = [[side[row] for row in rows] for side in (inputs.predictions, inputs.references)]
    config = inputs.config.model_copy(update={"metrics": (metrics.READINGS.get(name, name),), "bootstrap": 0})
    return metrics.score(*some, None, config, inputs.edition, inputs.device)[0][name].per_image


def concept_lists(
    predictions: Sequence[Set[str]],
    references: Sequence[Set[str]],
    manual: Sequence[Set[str]] | None,
    scores: Mapping[str, Score],
    edition: int,
    wanted: int,
) -> dict[str, Verified]:
    """The scores of concept detection compared with sklearn's F1.

    Images with two empty sets are left out. For `f1_secondary`, images whose manual set has none of its
    concepts are left out too, as the organisers do.
    """
    only = concepts.SECONDARY
    whole = list(zip(predictions, references, strict=True))
    given = {"f1": (whole, [bool(p or r) for p, r in whole])}
    if manual is not None:
        some = [(p & only, r & only) for p, r in zip(predictions, manual, strict=True)]
        given["f1_secondary"] = (some, [bool(r) for _, r in some])

    def verified(name: str, score: Score) -> Verified:
        if score.value is None:
            return Verified(None, 0, None, f"absent: {score.reason}")
        pairs, counted = given[name]
        rows = [row for row in chosen(len(pairs), wanted) if counted[row]]
        if not rows:
            return Verified("scikit-learn", 0, None, "not compared: none of the chosen rows counts")
        sides = ([side[row] for row in rows] for side in (predictions, references, manual or references))
        ours = metrics.score_concepts(*sides, edition, 0)[name].per_image
        theirs = [_concept_f1(*pairs[row]) for row in rows]
        return Verified("scikit-learn", len(rows), float(np.abs(np.asarray(theirs) - ours).max()))

    return {name: verified(name, score) for name, score in scores.items()}


def _concept_f1(prediction: Set[str], reference: Set[str]) -> float:
    from sklearn.metrics import f1_score

    union = sorted(prediction | reference)
    sides = ([cui in side for cui in union] for side in (reference, prediction))
    return float(f1_score(*sides, average="binary", zero_division=0))
