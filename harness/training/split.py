"""Images and texts of one split, and their micro-batches."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.models.head import indicators
from harness.models.loading import Loaded, batch_of
from harness.models.text import Text


@dataclass(frozen=True)
class Split:
    """Images and texts of one split; `pixels` are for `models.loading.batch_of`.

    `labels` are the concepts of each image that its head predicts, by their numbers; empty without a head. As
    numbers they take less memory than a matrix of all images: 250 MB for 100,000 images and 2,500 labels.
    """

    ids: Sequence[str]
    pixels: Any
    captions: Sequence[Text]
    concepts: Sequence[Text | None]
    labels: Sequence[Sequence[int]] = ()


def batches(
    split: Split, loaded: Loaded, parts: Sequence[np.ndarray], names: Sequence[str], multiple: int
) -> Iterator[dict[str, Any]]:
    """Collated micro-batches of the images `parts` with what `names` names: texts, or labels (`concepts`).

    Texts are padded to a `multiple`.

    A thread prepares the next one while the device works on this one.
    """

    def collate(indices: np.ndarray) -> dict[str, Any]:
        batch: dict[str, Any] = {"pixels": batch_of(split.pixels, indices)}
        batch |= dict.fromkeys(("caption", "concept"))
        if "caption" in names:
            batch["caption"] = loaded.caption.collate([split.captions[i] for i in indices], multiple)
        if "concept" in names:
            texts = [split.concepts[i] or Text([loaded.concept.pad], 1) for i in indices]
            batch["concept"] = loaded.concept.collate(texts, multiple)
        if "concepts" in names:
            batch["concepts"] = indicators([split.labels[i] for i in indices], loaded.model.head.labels)
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
