"""Features of image files for the metrics that look at images: each file is encoded once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import Problem, UserError
from harness.metrics.base import Absent
from harness.metrics.cache import VERSION, Blobs, Row, key, made_by
from harness.metrics.neural import filled
from harness.store import fingerprint

FEATURE_BYTES = 500_000_000

Encode = Callable[[Sequence[Path]], np.ndarray]
"""Features (n, d) of n image files."""


def identities(paths: Sequence[Path | None]) -> list[Row]:
    """What tells image files from others without reading them: place, size and date of each.

    Raises `UserError` that names the files that are not there, `Absent` where one is known to be unreadable.
    """
    if unreadable := sum(path is None for path in paths):
        raise Absent(f"needs every image, and {unreadable:,} of {len(paths):,} can't be read")
    missing = [Path(path) for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError([Problem("no such image", path) for path in missing])
    found = [(Path(path).resolve(), Path(path).stat()) for path in paths]
    return [
        (str(place), str(status.st_size), f"{status.st_mtime_ns}:{status.st_ctime_ns}")
        for place, status in found
    ]


class Features:
    """Image features by `encode`, kept in memory and, once `keep` has named a folder, on disk.

    They serve the captions before and after post-processing, two metrics of one model, and later runs.
    Batches are all of one size, so that a feature is a function of its image alone.
    """

    def __init__(self, encode: Encode, batch: int):
        self._encode, self._batch = encode, batch
        self._known: dict[Row, np.ndarray] = {}
        self._disk: Blobs | None = None

    def keep(self, folder: Path | None, device: str, what: Any) -> None:
        """Keep them in `folder` from now on, or on no disk.

        `what` is all that determines them beside the image, the kind of device and the versions.
        """
        name = f"images-{fingerprint([VERSION, what, made_by(device)])}.sqlite"
        self._disk = Blobs(folder / name, FEATURE_BYTES) if folder else None

    def of(self, images: Sequence[Row]) -> np.ndarray:
        """Features (n, d) float32 of images, each named by its identity."""
        new = [image for image in dict.fromkeys(images) if image not in self._known]
        if new and self._disk:
            keys = {key(*image): image for image in new}
            kept = self._disk.get(keys)
            self._known |= {keys[k]: np.frombuffer(value, np.float32) for k, value in kept.items()}
            new = [image for image in new if image not in self._known]
        for batch in filled(new, self._batch):
            self._add(batch)
        return np.stack([self._known[image] for image in images])

    def _add(self, images: Sequence[Row]) -> None:
        features = self._encode([Path(place) for place, *_ in images])
        made = dict(zip(images, features.astype(np.float32), strict=True))
        self._known |= made
        if self._disk:
            self._disk.put({key(*image): feature.tobytes() for image, feature in made.items()})
