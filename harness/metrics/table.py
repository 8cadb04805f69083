"""The table of metrics, and what a config asks of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import Problem
from harness.metrics import (
    alignscore,
    bertscore,
    bleurt,
    bootstrap,
    clipscore,
    lexical,
    medcat,
    meteor,
    similarity,
)
from harness.metrics.base import Metric, Weights

if TYPE_CHECKING:
    from harness.metrics.settings import ScoreConfig

METRICS: dict[str, Metric] = {
    "bertscore": bertscore.METRIC,
    "rouge1": lexical.ROUGE1,
    "bleurt": bleurt.METRIC,
    "bleu1": lexical.BLEU1,
    "meteor": meteor.METRIC,
    "cider": lexical.CIDER,
    "clipscore": clipscore.METRIC,
    "refclipscore": clipscore.REFCLIPSCORE,
    "similarity": similarity.METRIC,
    "medcat": medcat.METRIC,
    "alignscore": alignscore.METRIC,
}
READINGS = {reading: name for name, metric in METRICS.items() for reading in metric.readings}
"""The metric that a reading is a variant of; it is not established which of the two is official."""


def named(name: str) -> Metric | None:
    """The metric, or the reading of one, by its name; None for a mean of metrics."""
    beside = READINGS.get(name)
    return METRICS[beside].readings[name] if beside else METRICS.get(name)


def aggregate(name: str) -> bootstrap.Aggregate | None:
    """The function from the summed statistics of a metric to its score; None if its score is a mean."""
    metric = METRICS.get(name)
    return metric.aggregate if metric else None


def all_weights() -> dict[str, Weights]:
    """The weights of all metrics, by the section of the config that names them."""
    return {metric.weights.section: metric.weights for metric in METRICS.values() if metric.weights}


def weights_of(config: "ScoreConfig") -> dict[str, Weights]:
    """The weights of the requested metrics, by the section of the config that names them."""
    requested = (metric.weights for name, metric in METRICS.items() if name in config.metrics)
    return {weights.section: weights for weights in requested if weights}


def is_absent(name: str, config: "ScoreConfig") -> bool:
    """Whether a metric is not requested, or the config names no weights for it."""
    weights = METRICS[name].weights
    return name not in config.metrics or (weights is not None and weights.named(config) is None)


def problems(config: "ScoreConfig", edition: int) -> list[Problem]:
    """What is wrong with the weights of the requested metrics, found without importing torch."""
    config = config.for_edition(edition)
    return [problem for weights in weights_of(config).values() for problem in weights.missing(config)]


def uses_java(config: "ScoreConfig") -> bool:
    """Whether a requested metric, or a reading of one, runs on Java."""
    return any(metric.java for metric in wanted(config).values())


def identities_of(config: "ScoreConfig", cache: Path | None) -> dict[str, Any]:
    """What determines the numbers of the requested metrics besides settings and captions, by section.

    The contents of their weights, found without running or loading anything; known hashes stay in `cache`.
    Stand-ins that are trained here are left out: their steps and the data determine them.
    """
    return {
        section: weights.identity(weights.settings(config), cache)
        for section, weights in weights_of(config).items()
        if weights.named(config) is not None
        and not weights.is_trained_here(config)
        and not weights.missing(config)
    }


def wanted(config: "ScoreConfig") -> dict[str, Metric]:
    """The requested metrics and all their readings, by name."""
    found = {}
    for name, metric in METRICS.items():
        if name in config.metrics:
            found |= {name: metric, **metric.readings}
    return found


def unload() -> None:
    """Forget the models of the neural metrics and their embeddings."""
    for weights in all_weights().values():
        weights.unload()
