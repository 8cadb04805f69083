"""The section `score:`, with the sections of all metrics."""

from typing import Literal

from pydantic import Field, create_model

from harness.config.editions import EDITIONS
from harness.config.sections import Section, Sha256, summary, whole
from harness.metrics import METRICS, all_weights


# In three classes, since keys are listed class by class: the keys of METRICS come between the others.
class _Chosen(Section):
    metrics: tuple[Literal[*METRICS], ...] | None = None
    """The metrics to compute; by default the metrics of the edition."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster. Its scores differ in the third digit, are unofficial, and their signatures name it."""


_Weighted = create_model(
    "_Weighted",
    __base__=_Chosen,
    **{
        name: (weights.schema, Field(weights.schema(), description=summary(weights.schema)))
        for name, weights in all_weights().items()
    },
)


class ScoreConfig(_Weighted):
    """Which metrics are computed, and with which checkpoints."""

    trusted: tuple[Sha256, ...] = ()
    """SHA-256 sums of local weights, copied from their publisher. Scores with these weights are official."""
    bootstrap: whole(0, 10**6) = 1000
    """Resamples of the rows for each 95 % interval; 0: no intervals."""

    def for_edition(self, year: int) -> "ScoreConfig":
        """The config with the edition's metrics and names of weights, if none are given."""
        edition = EDITIONS[year]
        metrics = edition.metrics if self.metrics is None else self.metrics
        config = self.model_copy(update={"metrics": metrics})
        for section, weights in all_weights().items():
            if section in edition.weights and weights.named(config) is None:
                config = weights.renamed(config, edition.weights[section])
        return config
