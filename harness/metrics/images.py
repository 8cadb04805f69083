"""Features of image files for the metrics that use images: each file is encoded once."""

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
    """What identifies image files without reading them: path, size and dates.

    Raises `UserError` with the files that do not exist, `Absent` if an image is known to be unreadable.
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
    """Image features from `encode`, kept in memory and, once `keep` names a folder, on disk.

    Captions before and after post-processing, two metrics of one model, and later runs share them.
    All batches have one size, so a feature depends on its image alone.
    """

    def __init__(self, encode: Encode, batch: int):
        self._encode, self._batch = encode, batch
        self._known: dict[Row, np.ndarray] = {}
        self._disk: Blobs | None = None

    def keep(self, folder: Path | None, device: str, what: Any) -> None:
        """Keep features in `folder` from now on, or only in memory if it is None.

        `what` is all that determines them besides the image, the kind of device and package versions.
        """
        name = f"images-{fingerprint([VERSION, what, made_by(device)])}.sqlite"
        self._disk = Blobs(folder / name, FEATURE_BYTES) if folder else None

    def of(self, images: Sequence[Row]) -> np.ndarray:
        """Features (n, d) float32 of images, each given by its identity."""
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
