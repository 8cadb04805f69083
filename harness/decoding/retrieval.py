"""Captions from the training images that are most alike: the honest baseline of every captioner."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from harness.config.sections import Fraction, Positive, Section, whole
from harness.decoding.consensus import MEANS
from harness.errors import UserError
from harness.machine import ranks
from harness.metrics import METRICS
from harness.store import write

if TYPE_CHECKING:
    from harness.models.loading import Loaded

_BATCH = 16
_QUERIES = 256  # compared at a time with all training images
_ROUNDED = 1e-5  # more than products of unit vectors in fp32 round
ALIKE, TWINS = 0.99, 0.9999
"""Cosines of `centred` features from which on thumbnails are compared, and from which on images are twins.

Half precision rounds features by less than the first one. Weak features give twins that are other images.
"""
SAME = 2.0
"""Root mean square difference of thumbnails, in grey levels, up to which two images are one.

Compression alone gives less than 1. Of 1,653 images of MedPix, 18 have another one below 1.7, the others none
below 4.7.
"""
LOOKED = 8
"""Neighbours among which copies are looked for, and rows beyond those that are wanted in place of copies."""
_THUMB = 32


class RetrievalConfig(Section):
    """Caption an image as the training images with the most similar features; `null` turns it off.

    The features are those of this run's trained model, or of the checkpoint if nothing is trained.
    """

    neighbours: whole(1, 1000) = 32
    """Number of training images whose captions are candidates; consensus chooses among them."""
    threshold: Fraction | None = None
    """From this cosine on, the nearest image's caption is taken without a consensus; `null`: never."""
    utility: dict[Literal[*METRICS, *MEANS], Positive] = Field({})
    """Metrics by which candidates are compared, with weights; by default the edition's primary metric."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of each query, best first: `rows` (N, k) of the database, and cosines (N, k)."""

    rows: np.ndarray
    cosines: np.ndarray


def features(loaded: "Loaded", pixels: Any, count: int, progress: Callable[[int, int], None]) -> np.ndarray:
    """Mean image features of unit length (N, D) float32 of pixels (N, S, S, 3); all ranks get them.

    Raises `UserError` if some are not finite.
    """
    import torch

    from harness.models.loading import batch_of

    model, found = loaded.model, []
    was_training = model.training
    model.eval()
    own = ranks.share(list(range(count)))
    with torch.inference_mode():
        for start in range(0, len(own), _BATCH):
            part = np.asarray(own[start : start + _BATCH])
            pooled = model.image_features(loaded.normalise(batch_of(pixels, part))).float().mean(1)
            found.extend(torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy())
            progress(min((start + _BATCH) * ranks.world_size(), count), count)
    model.train(was_training)
    every = np.stack(ranks.gather(found))
    if bad := int((~np.isfinite(every).all(axis=1)).sum()):
        text = f"the features of {bad:,} of {count:,} images are not finite; the model may have diverged"
        raise UserError(text, exit_code=1)
    return every


def nearest(queries: np.ndarray, database: np.ndarray, count: int) -> Neighbours:
    """The `count` nearest rows of a database (M, D) for each query (N, D), by the cosine of unit vectors.

    The search is exact. Equal rows of the database are in its order: products of matrices round by the place
    of a row, so the cosines of all rows that may count are computed again one by one.
    """
    count = min(count, len(database))
    rows, cosines = [], []
    for start in range(0, len(queries), _QUERIES):
        found = queries[start : start + _QUERIES] @ database.T
        least = np.partition(found, -count, axis=1)[:, -count]
        for query, row, low in zip(queries[start : start + _QUERIES], found, least, strict=True):
            (hits,) = np.nonzero(row >= low - _ROUNDED)
            exact = (database[hits].astype(np.float64) * query).sum(1)
            best = np.argsort(-exact, kind="stable")[:count]
            rows.append(hits[best])
            cosines.append(exact[best])
    return Neighbours(np.array(rows), np.array(cosines))


def centred(found: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Features (N, D) less the mean (D,) of a database, of unit length.

    Features of all images share a large part, above all those of a model that is not fine-tuned. Without it,
    cosines tell copies from other images.
    """
    own = found - mean
    return own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """The grey thumbnail (32, 32) of an image, uint8 (H, W, 3), that tells whether two images are one."""
    from PIL import Image

    grey = Image.fromarray(image).convert("L").resize((_THUMB, _THUMB), Image.Resampling.BOX)
    return np.asarray(grey, dtype=np.float32)


def are_one(image: np.ndarray, other: np.ndarray) -> bool:
    """Whether two thumbnails are of one image, perhaps compressed again."""
    return bool(np.sqrt(np.square(image - other).mean()) <= SAME)


def copies(
    queries: np.ndarray, database: np.ndarray, found: Neighbours, same: Callable[[int, int], bool]
) -> dict[int, int]:
    """The queries (N, D) with a copy among their neighbours, each with the first one: row by row.

    `same(query, row)` says whether two images are one.
    """
    mean = database.mean(0)
    queries, database = centred(queries, mean), centred(database, mean)
    result: dict[int, int] = {}
    for query, rows in enumerate(found.rows.tolist()):
        cosines = database[rows] @ queries[query]
        near = (row for row, cosine in zip(rows, cosines, strict=True) if cosine >= ALIKE)
        copy = next((row for row in near if same(query, row)), None)
        if copy is not None:
            result[query] = copy
    return result


def others(
    database: np.ndarray,
    count: int,
    is_copy: Callable[[int, int, float], bool],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """For each row of a database (M, D) the `count` nearest rows that are no copies of it, best first.

    `is_copy(row, other, cosine)` says whether a row is a copy; each row is a copy of itself.
    """
    result: list[list[int]] = [[] for _ in database]
    waiting, wanted = list(range(len(database))), count + LOOKED
    while waiting:
        for start in range(0, len(waiting), _QUERIES):
            part = waiting[start : start + _QUERIES]
            found = nearest(database[part], database, wanted)
            for row, near, cosines in zip(part, found.rows.tolist(), found.cosines.tolist(), strict=True):
                pairs = zip(near, cosines, strict=True)
                result[row] = [other for other, cosine in pairs if not is_copy(row, other, cosine)][:count]
            progress(min(start + _QUERIES, len(waiting)), len(waiting))
        waiting = [row for row in waiting if len(result[row]) < count] if wanted < len(database) else []
        wanted *= 4
    return result


def write_features(path: Path, found: np.ndarray) -> None:
    """Write features (N, D) as .npy, whole or nothing."""
    content = io.BytesIO()
    np.save(content, found)
    write(path, content.getvalue())
