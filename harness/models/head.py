"""The classifier of concepts on the features of an image: pooling, a linear layer, and its losses.

A stage with the loss `concepts` trains it, in every family that gives `feature_width` and `class_tokens`. It
reads what `Captioner.image_features` gives, and belongs to the part `connector`.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.models import parts
from harness.models.loading import batch_of

if TYPE_CHECKING:
    from harness.concepts.settings import HeadConfig
    from harness.models.base import Captioner
    from harness.models.loading import Loaded

HEAVIEST = 100.0
"""The largest weight of a label's positives (`class_weights: balanced`)."""
_LEAST = 1e-6  # GeM is of positive features; this one counts for all that are smaller
_UNLIKELY = 1e-12  # a power below 1 has no gradient at 0


class Mean(nn.Module):
    """The mean of the features: (B, N, D) -> (B, D)."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(1)


class GeM(nn.Module):
    """The generalised mean of the features, (B, N, D) -> (B, D), by one exponent that is learned from 3.

    (mean of x^p)^(1/p), Radenovic et al., TPAMI 2019. Features below 1e-6 count as 1e-6.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor([3.0]))

    def forward(self, features: Tensor) -> Tensor:
        # by logarithms, since powers of small features would be too small for fp32
        sums = torch.logsumexp(self.exponent * features.clamp(min=_LEAST).log(), 1)
        return ((sums - math.log(features.shape[1])) / self.exponent).exp()


class CrossEntropy(nn.Module):
    """Binary cross-entropy of logits (B, L), the mean over labels as torch's default, summed over images.

    Positives have the `weights` (L,).
    """

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, wanted: Tensor) -> Tensor:
        weighed = {"pos_weight": self.weights, "reduction": "none"}
        return F.binary_cross_entropy_with_logits(logits, wanted, **weighed).mean(1).sum()


class Asymmetric(nn.Module):
    """The asymmetric loss of logits (B, L), summed over labels and images (Ridnik et al., ICCV 2021).

    -(1 - p)^gamma+ log p for positives, and -q^gamma- log(1 - q) for negatives, with q = max(p - clip, 0). As
    in the paper, gradients also flow through the two powers; its authors' code can leave that out.
    """

    def __init__(self, gamma_negative: float, gamma_positive: float, clip: float) -> None:
        super().__init__()
        self.gamma_negative, self.gamma_positive, self.clip = gamma_negative, gamma_positive, clip

    def forward(self, logits: Tensor, wanted: Tensor) -> Tensor:
        shifted = (logits.sigmoid() - self.clip).clamp(min=_UNLIKELY)
        # without a clip 1 - q may be 0 in fp32
        rest = torch.log1p(-shifted) if self.clip else F.logsigmoid(-logits)
        negative = shifted.pow(self.gamma_negative) * rest
        missed = (-logits).sigmoid().clamp(min=_UNLIKELY)
        positive = missed.pow(self.gamma_positive) * F.logsigmoid(logits)
        return -torch.where(wanted > 0, positive, negative).sum()


class Head(nn.Module):
    """Features (B, N, D) -> logits (B, L), in fp32 whatever the encoder computes in.

    The first `class_tokens` features are of no part of the image and are left out. `labels` is L. `criterion`
    gives the loss of logits (B, L) by labels (B, L), 0 or 1, as a sum over images.
    """

    def __init__(
        self, width: int, class_tokens: int, labels: int, pool: nn.Module, criterion: nn.Module
    ) -> None:
        super().__init__()
        self.class_tokens, self.labels = class_tokens, labels
        self.pool, self.criterion = pool, criterion
        self.linear = nn.Linear(width, labels)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return self.linear(self.pool(features[:, self.class_tokens :].float()))

    def loss(self, features: Tensor, concepts: Tensor) -> Tensor:
        """The loss of features (B, N, D) by their labels (B, L), 0 or 1: in nats, the sum over images."""
        logits = self(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.criterion(logits, concepts.float())


def attach(model: "Captioner", config: "HeadConfig", positives: Sequence[int], images: int) -> None:
    """Give a model a new head for labels that so many of the training `images` have (`positives`).

    `balanced` weights of positives are (images - positives) / positives, at most `HEAVIEST`. The first
    probabilities are the frequencies of the labels, (positives + 1) / (images + 2), as for rare labels in Lin
    et al., ICCV 2017.
    """
    counts = torch.tensor(positives, dtype=torch.float32)
    weights = torch.ones_like(counts)
    if config.class_weights == "balanced":
        weights = ((images - counts) / counts.clamp(min=1)).clamp(max=HEAVIEST)
    bce = config.loss == "bce"
    asymmetric = Asymmetric(config.gamma_negative, config.gamma_positive, config.clip)
    pool = GeM() if config.pooling == "gem" else Mean()
    attach_new(model, len(counts), pool, CrossEntropy(weights) if bce else asymmetric)
    with torch.no_grad():
        model.head.linear.bias.copy_(((counts + 1) / (images - counts + 1)).log())


def attach_new(model: "Captioner", labels: int, pool: nn.Module, criterion: nn.Module) -> None:
    """Give a model a new head, whose weights are the same in every call (`parts.new`)."""
    with parts.new():
        model.head = Head(model.feature_width, model.class_tokens, labels, pool, criterion)


def freeze(model: "Captioner", losses: Collection[str]) -> None:
    """Freeze the head, if there is one, unless the loss `concepts` trains it."""
    if model.head is not None and "concepts" not in losses:
        model.head.requires_grad_(False)


def indicators(rows: Sequence[Sequence[int]], labels: int) -> Tensor:
    """The labels of some images, by their numbers -> uint8 (B, L), 1 for a label that the image has."""
    found = torch.zeros(len(rows), labels, dtype=torch.uint8)
    for row, own in zip(found, rows, strict=True):
        row[list(own)] = 1
    return found


@torch.no_grad()
def probabilities(
    loaded: "Loaded",
    pixels: Any,
    places: Sequence[int],
    batch_size: int = 16,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """The probability of each label for the images at these `places` of a split: float32 (n, L).

    `pixels` are for `models.loading.batch_of`. The model must have a head; its mode becomes that of
    evaluation.
    """
    model = loaded.model.eval()
    found = [np.zeros((0, model.head.labels), np.float32)]
    for start in range(0, len(places), batch_size):
        images = loaded.normalise(batch_of(pixels, places[start : start + batch_size]))
        found.append(model.head(model.image_features(images)).sigmoid().cpu().numpy())
        advance(min(start + batch_size, len(places)), len(places))
    return np.concatenate(found)
