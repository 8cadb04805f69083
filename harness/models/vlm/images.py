"""Whole images as a model's image processor gives them, one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.machine.device import moved
from harness.models.loading import Loaded

NAMES = ("pixel_values", "image_grid_thw", "image_sizes")
"""What models take; a processor may give more."""


class Images:
    """The images of a batch: for each one, what the model takes by the names of its arguments."""

    def __init__(self, each: Sequence[Mapping[str, Tensor]]) -> None:
        self.each = each

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, rows: Sequence[int]) -> "Images":
        return Images([self.each[row] for row in rows])

    def joined(self) -> dict[str, Tensor]:
        """What the model takes for all of them; images in more tiles than others make these longer."""
        return {name: _joined([one[name] for one in self.each]) for name in self.each[0]}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].ndim == 5:  # (1, tiles, 3, H, W)
        tiles = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, 0) * 3 + (0, tiles - part.shape[1])) for part in parts]
    return torch.cat(tuple(parts))


@dataclass(frozen=True)
class WholeLoaded(Loaded):
    """A vision-language model with its codecs, the image processor and the folder of its checkpoint."""

    processor: Any = None
    folder: Path | None = None

    def normalise(self, images: Sequence[Tensor]) -> Images:
        """Whole images, uint8 (H, W, 3), as the model takes them, on its device."""
        return Images([self._processed(image) for image in images])

    def _processed(self, image: Tensor) -> dict[str, Tensor]:
        given = {"input_data_format": "channels_last", "return_tensors": "pt"}
        found = self.processor(images=image.cpu().numpy(), **given)
        return {name: moved(found[name], self.model.device) for name in NAMES if name in found}
