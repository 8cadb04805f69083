"""The section `concepts`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from harness.config.sections import (
    Fraction,
    Images,
    Mass,
    NonNegative,
    Positive,
    Section,
    Share,
    or_auto,
    whole,
)
from harness.decoding.consensus import SourceConfig, distinct, named
from harness.errors import AcrossKeys


class HeadConfig(Section):
    """The classifier on an image encoder that the loss `concepts` trains: pooling, a linear layer, a loss."""

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

    @model_validator(mode="after")
    def _weighs_cross_entropy(self) -> "HeadConfig":
        if self.class_weights != "none" and self.loss != "bce":
            what = f"class_weights {self.class_weights} are for the loss bce; {self.loss} has its gammas"
            raise AcrossKeys(what, "class_weights", "loss")
        return self


class KnnConfig(Section):
    """Concepts of the training images with the most similar features, by cosine."""

    neighbours: whole(1, 1000) = 33
    """Number of training images that are counted. The probability of a concept is the share that has it."""
    weighted: bool = False
    """Weigh each neighbour by its cosine; one of 0 or less does not count."""
    rule: Literal["thresholds", "votes"] = "thresholds"
    """How concepts are decided. votes: by `limits`, without thresholds."""
    limits: tuple[Fraction, ...] = (0.58, 0.65, 0.65)
    """With the rule votes: the most frequent concept of the neighbours, with count c1, is always given. The
    second is given if (c1 - c2) / c1 is below the first limit, then the third by the second limit, and so on.

    The first concept that is not given ends the list.
    """


class ThresholdsConfig(Section):
    """A concept is given if its probability is above a threshold.

    Thresholds maximise the F1 averaged over the images of the half `tune` of validation. Its other half,
    `held`, says how good they are.
    """

    kind: Literal["global", "per_concept"] = "per_concept"
    """global: the best threshold for all concepts together. per_concept: one for each concept."""
    start: or_auto(Fraction) = 0.4
    """With per_concept, all thresholds start here. One pass, the most frequent concept first, then moves
    each to where F1 is highest, if it rises.

    auto: starts at the best global threshold.
    """
    fallback: Literal["top1", "none"] = "top1"
    """What an image gets without a concept above its threshold: its most probable concept, or nothing.

    The evaluator gives an F1 of 0 to an empty list, unless the reference is empty too.
    """


class ConceptRun(SourceConfig):
    """A finished run whose concepts are combined with those of others."""

    run: str
    """Its name, `<experiment>/<variant>-s<seed>`, as under runs/."""
    weight: Positive = 1.0
    """Its weight in the mean, or in the votes."""


class ConceptsConfig(Section):
    """How the concepts of an image are predicted and decided; `null` turns it off."""

    predictor: Literal["classifier", "knn", "from_captions"] = "classifier"
    """classifier: the head that the loss `concepts` trains. knn: the most similar training images.
    from_captions: concepts whose names are in the run's own captions."""
    min_images: Images = 1
    """Concepts of fewer training images are never predicted."""
    head: HeadConfig = HeadConfig()
    """The classifier on an image encoder that the loss `concepts` trains."""
    knn: KnnConfig = KnnConfig()
    """Concepts of the training images with the most similar features, by cosine."""
    thresholds: ThresholdsConfig = ThresholdsConfig()
    """A concept is given if its probability is above a threshold."""
    runs: tuple[Annotated[ConceptRun, BeforeValidator(named)], ...] = ()
    """Finished runs on the same images whose concepts are combined with this run's own: an ensemble.

    A name alone has the weight 1.
    """
    own: NonNegative = 1.0
    """Weight of this run's own concepts. With 0 this run has no model: nothing is trained."""
    combine: Literal["mean", "votes"] = "mean"
    """With `runs`. mean: the weighted mean of probabilities, with thresholds of its own. votes: of the
    concepts that each run decides by its own thresholds, those with a weighted share of `vote_share`."""
    vote_share: Mass = 0.5
    """With votes: the smallest share of the weights that gives a concept."""

    @field_validator("runs")
    @classmethod
    def _distinct(cls, runs: tuple[ConceptRun, ...]) -> tuple[ConceptRun, ...]:
        return distinct(runs)

    @model_validator(mode="after")
    def _has_a_source(self) -> "ConceptsConfig":
        if not self.own and not self.runs:
            what = "own is 0 and runs is empty: nothing predicts concepts; name runs, or set own to 1"
            raise AcrossKeys(what, "own", "runs")
        return self

    @model_validator(mode="after")
    def _has_thresholds_for_a_mean(self) -> "ConceptsConfig":
        votes = self.own and self.predictor == "knn" and self.knn.rule == "votes"
        if votes and self.runs and self.combine == "mean":
            what = "the rule votes decides by counts of neighbours, and can't decide by a mean with other "
            raise AcrossKeys(what + "runs; use the rule thresholds, or combine: votes", "knn.rule", "combine")
        return self
