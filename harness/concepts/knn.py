"""Concepts of the training images with the most similar features: a baseline without training."""

from collections.abc import Collection, Sequence

import numpy as np

from harness.concepts.labels import indicators
from harness.concepts.settings import KnnConfig
from harness.decoding.retrieval import nearest
from harness.errors import Problem, UserError

_ROUNDED = 1e-6
"""More than float32 rounds shares; shares of at most 1,000 neighbours differ from each limit by more."""


def probabilities(
    queries: np.ndarray,
    database: np.ndarray,
    training: Sequence[Collection[str]],
    labels: Sequence[str],
    config: KnnConfig,
) -> np.ndarray:
    """The share of its neighbours that have a concept, float32 (N, L), for images with features (N, D).

    `database` (M, D) are the features of the training images, and `training` (M) their CUIs. The search
    compares 256 images with all others at a time, which takes 2 x 256 x M x 4 bytes besides the arrays.
    Raises `UserError` if a feature is not finite, and without training images.
    """
    if not len(database):
        raise UserError([Problem("train has no image; knn needs neighbours", key="concepts.predictor")])
    queries, database = _unit(queries, "images"), _unit(database, "training images")
    found = nearest(queries, database, config.neighbours)
    weights = np.maximum(found.cosines, 0) if config.weighted else np.ones(found.cosines.shape)
    has = indicators(training, labels)
    values = np.zeros((len(queries), len(labels)), dtype=np.float32)
    for row, (rows, weight) in enumerate(zip(found.rows, weights, strict=True)):
        values[row] = weight @ has[rows] / max(weight.sum(), np.finfo(float).tiny)
    return np.minimum(values, 1)


def decide(values: np.ndarray, labels: Sequence[str], limits: Sequence[float]) -> list[tuple[str, ...]]:
    """The concepts of images by the rule `votes`, from shares of neighbours (N, L), the most frequent first.

    The first one is always given, and each further one if (c1 - c) / c1 is below its limit; the first that is
    not given ends the list. Ties are by label. Where no neighbour has a concept, the first label is given.
    """
    found = []
    for row in values.astype(float):
        (most,) = np.nonzero(row)
        ranked = most[np.argsort(-row[most], kind="stable")][: len(limits) + 1]
        if not len(ranked):
            found.append(tuple(labels[:1]))
            continue
        shares = row[ranked]
        fails = (shares[0] - shares[1:]) / shares[0] >= np.array(limits[: len(ranked) - 1]) - _ROUNDED
        given = 1 + (int(fails.argmax()) if fails.any() else len(fails))
        found.append(tuple(labels[place] for place in ranked[:given]))
    return found


def _unit(features: np.ndarray, what: str) -> np.ndarray:
    """The features as float32 of unit length; a vector of zeros stays."""
    if bad := int((~np.isfinite(features).all(axis=1)).sum()):
        text = (
            f"the features of {bad:,} of {len(features):,} {what} are not finite; the model may have diverged"
        )
        raise UserError(text, exit_code=1)
    length = np.sqrt(np.einsum("nd,nd->n", features, features))[:, None]
    return (features / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32, copy=False)
