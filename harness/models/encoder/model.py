"""An image encoder and a classifier of concepts on its features."""

from collections.abc import Mapping

from torch import Tensor

from harness.models.base import Losses, Samples
from harness.models.prefix.vision import Seeing


class Classifier(Seeing):
    """`base.Captioner` without a decoder: of the losses it has `concepts` only."""

    def forward(
        self,
        pixels: Tensor,
        caption: Mapping[str, Tensor] | None = None,
        concept: Mapping[str, Tensor] | None = None,
        label_smoothing: float = 0.0,
        samples: Samples | None = None,
        concepts: Tensor | None = None,
    ) -> Losses:
        """The loss of one micro-batch: pixels (B, 3, S, S), `concepts` (B, L); no other loss is computed."""
        with self.autocast():
            return Losses(None, None, None, self.head.loss(self.see(pixels), concepts))
