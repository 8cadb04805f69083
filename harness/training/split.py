"""Images and texts of one split, and their micro-batches."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.models.loading import Loaded, batch_of
from harness.models.text import Text


@dataclass(frozen=True)
class Split:
    """Images and texts of one split; `pixels` are for `models.loading.batch_of`."""

    ids: Sequence[str]
    pixels: Any
    captions: Sequence[Text]
    concepts: Sequence[Text | None]


def batches(
    split: Split, loaded: Loaded, parts: Sequence[np.ndarray], names: Sequence[str], multiple: int
) -> Iterator[dict[str, Any]]:
    """Collated micro-batches of the images `parts` with the texts `names`, padded to a `multiple`.

    A thread prepares the next one while the device works on this one.
    """

    def collate(indices: np.ndarray) -> dict[str, Any]:
        batch: dict[str, Any] = {"pixels": batch_of(split.pixels, indices)}
        concepts = [split.concepts[i] or Text([loaded.concept.pad], 1) for i in indices]
        captions = [split.captions[i] for i in indices]
        for name, texts in (("caption", captions), ("concept", concepts)):
            codec = getattr(loaded, name)
            batch[name] = codec.collate(texts, multiple) if name in names else None
        return batch

    if not parts:
        return
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(collate, parts[0])
        for part in [*parts[1:], None]:
            batch = waiting.result()
            if part is not None:
                waiting = pool.submit(collate, part)
            yield batch
