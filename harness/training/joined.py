"""One split to train on, made of several."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.data.images import Whole
from harness.training.split import Split


class Joined:
    """The images of several splits one after another; an array of N indices gives uint8 (N, H, W, 3).

    Whole images are a list.
    `parts` are the pixels of each split and the indices of those that are used.
    """

    def __init__(self, parts: Sequence[tuple[Any, Sequence[int]]]) -> None:
        self.pixels = [pixels for pixels, _ in parts]
        self.split = np.repeat(np.arange(len(parts)), [len(used) for _, used in parts])
        self.place = np.concatenate([np.asarray(used, dtype=int) for _, used in parts])

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray | list[np.ndarray]:
        places = zip(self.split[indices], self.place[indices], strict=True)
        found = [self.pixels[split][int(place)] for split, place in places]
        return found if any(isinstance(one, Whole) for one in self.pixels) else np.stack(found)


def joined(parts: Sequence[tuple[Split, Sequence[int]]]) -> Split:
    """One split of the images with these indices of several splits, in their order."""
    rows = [(split, i) for split, used in parts for i in used]
    return Split(
        [split.ids[i] for split, i in rows],
        Joined([(split.pixels, used) for split, used in parts]),
        [split.captions[i] for split, i in rows],
        [split.concepts[i] for split, i in rows],
        [split.labels[i] for split, i in rows if split.labels],
    )
