"""The section `concepts`."""

from typing import Literal

from harness.config.sections import NonNegative, Section, Share


class HeadConfig(Section):
    """The classifier on an image encoder that the loss `concepts` trains: pooling, a linear layer, and its loss."""

    pooling: Literal["mean", "gem"] = "mean"
    """How the features of an image become one vector. gem: generalised mean with a learned exponent
    (Radenovic et al. 2019)."""
    loss: Literal["bce", "asymmetric"] = "bce"
    """bce: binary cross-entropy, the mean over the labels of an image. asymmetric: the sum over the labels of
    an image (Ridnik et al. 2021)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: in bce, a label's positives weigh as much as its negatives in train, at most 100."""
    gamma_negative: NonNegative = 4.0
    """In asymmetric: the focusing exponent of negatives."""
    gamma_positive: NonNegative = 1.0
    """In asymmetric: the focusing exponent of positives."""
    clip: Share = 0.05
    """In asymmetric: the probability of negatives is lowered by this, so that easy ones have no loss."""
