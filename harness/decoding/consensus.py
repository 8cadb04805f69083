"""Consensus: the candidate of each image that agrees best with all its candidates (minimum Bayes risk).

Candidates are samples, beams, or captions of several systems. With several systems this is an ensemble. The
rule is Eikema and Aziz's (2022): argmax over candidates c of the mean over candidates r of utility(c, r).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field, field_validator

from harness.config.editions import EDITIONS
from harness.config.sections import NonNegative, Positive, Section
from harness.errors import UserError
from harness.metrics import METRICS, Inputs, finite, text
from harness.metrics.base import Absent, Documents
from harness.records.files import Candidate

if TYPE_CHECKING:
    from harness.metrics.settings import ScoreConfig

TIE = 1e-6
"""Expected utilities that differ by less are equal: metrics are exact to about 1e-7."""
TEXTS = 1024
"""Candidates of the images that are compared at a time; it bounds the memory for embeddings."""
_ROWS = 1 << 16  # comparisons in one call of a metric

MEANS = tuple(dict.fromkeys(name for edition in EDITIONS.values() for name in edition.aggregates))
"""The means of metrics that some edition ranks by."""


class SourceConfig(Section):
    """A finished run whose captions are candidates."""

    run: str
    """Its name, `<experiment>/<variant>-s<seed>`, as under runs/."""
    weight: Positive = 1.0
    """Its weight in the mean utility."""


Source = TypeVar("Source", bound=SourceConfig)


def named(value: Any) -> Any:
    """A source from its name alone."""
    return {"run": value} if isinstance(value, str) else value


def distinct(runs: tuple[Source, ...]) -> tuple[Source, ...]:
    """The runs; raises `ValueError` if one is named twice."""
    names = [source.run for source in runs]
    if again := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{', '.join(again)} is named twice; give it a weight of 2 instead")
    return runs


class ConsensusConfig(Section):
    """Choose for each image the candidate that agrees best with all its candidates; `null` turns it off."""

    runs: tuple[Annotated[SourceConfig, BeforeValidator(named)], ...] = ()
    """Finished runs with the same images whose captions, before post-processing, are candidates too.

    A name alone has the weight 1.
    """
    own: NonNegative = 1.0
    """Weight of this run's own captions. With 0 this run has no model: nothing is trained or captioned."""
    utility: dict[Literal[*METRICS, *MEANS], Positive] = Field({})
    """Metrics by which candidates are compared, with weights; by default the edition's primary metric."""

    @field_validator("runs")
    @classmethod
    def _distinct(cls, runs: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        return distinct(runs)


@dataclass(frozen=True)
class Choice:
    """The chosen candidate of an image, its expected `utility`, and how many candidates are `distinct`."""

    COLUMNS: ClassVar = ("source", "utility", "distinct", "caption")

    candidate: Candidate
    utility: float
    distinct: int

    @property
    def row(self) -> tuple[str, ...]:
        """The values of `COLUMNS`, for tables."""
        one = self.candidate
        return one.source, f"{self.utility:.6f}", str(self.distinct), one.caption


Compare = Callable[[Sequence[str], Sequence[str], Sequence[Path | None] | None], np.ndarray]
"""(candidates (n,), references (n,), images (n,) or None) -> utility of each row (n,)."""


@dataclass
class Utility:
    """A weighted mixture of metrics, each per image and after its official pre-processing.

    `weights` are by metric; `mixture` makes them. `documents` give the document frequencies of metrics that
    weigh words, such as CIDEr. `signatures` has the signature of each metric after the first call. Raises
    `UserError` if a metric can't be computed, which names what it is `needed_by`.
    """

    weights: Mapping[str, float]
    config: "ScoreConfig"
    edition: int
    device: str = "cpu"
    documents: Documents | None = None
    signatures: dict[str, str] = field(default_factory=dict)
    needed_by: str = "the consensus"

    def __call__(
        self,
        candidates: Sequence[str],
        references: Sequence[str],
        images: Sequence[Path | None] | None = None,
    ) -> np.ndarray:
        measured, total = self.each(candidates, references, images), np.zeros(len(candidates))
        for name, weight in self.weights.items():
            total += weight * measured[name]
        return total

    def each(
        self,
        candidates: Sequence[str],
        references: Sequence[str],
        images: Sequence[Path | None] | None = None,
    ) -> dict[str, np.ndarray]:
        """The numbers (n,) of each metric, before they are weighed."""
        # no cache on disk: the embeddings of all candidates would fill it
        inputs = Inputs(
            candidates, references, images, self.config, self.edition, self.device, documents=self.documents
        )
        found = {}
        for name in self.weights:
            try:
                measured = finite(METRICS[name].measure(inputs))
            except Absent as absence:
                raise UserError(f"{self.needed_by} needs {name}: {absence}", exit_code=1) from None
            self.signatures[name] = measured.signature
            found[name] = measured.per_image
        return found


def mixture(weights: Mapping[str, float], edition: int) -> dict[str, float]:
    """Weights by metric that sum to 1; a mean of the edition, such as `overall`, becomes its metrics."""
    found: dict[str, float] = {}
    for name, weight in weights.items():
        parts = EDITIONS[edition].aggregates.get(name)
        inner = {name: 1.0} if parts is None else mixture(dict.fromkeys(parts, 1.0), edition)
        for metric, share in inner.items():
            found[metric] = found.get(metric, 0.0) + weight * share
    total = sum(found.values())
    return {name: weight / total for name, weight in found.items()}


def choose(
    candidates: Mapping[str, Sequence[Candidate]],
    utility: Compare,
    images: Mapping[str, Path | None] | None = None,
    texts: int = TEXTS,
) -> Iterator[tuple[str, Choice]]:
    """The choice of each image, in the order of `candidates`.

    Each distinct caption is compared once with each other one and with itself. Ties go to the higher
    log-probability, then to the first candidate. A blank caption is chosen only if all are blank. `texts`
    does not affect the choice.
    """
    candidates = {image: _worded(given) for image, given in candidates.items()}
    for part in _parts(candidates, texts):
        yield from zip(part, _choices(part, candidates, utility, images), strict=True)


def of_source(given: Sequence[Candidate], name: str, weight: float) -> list[Candidate]:
    """The candidates of one source of an image: they share its weight equally and bear its name."""
    return [
        replace(one, weight=weight / len(given), source=f"{name}/{one.source}" if one.source else name)
        for one in given
    ]


def cost(candidates: Mapping[str, Sequence[Candidate]]) -> tuple[int, int]:
    """How many distinct captions are embedded, and how many pairs of captions are compared."""
    counts = [len(_distinct(given)) for given in candidates.values()]
    return sum(counts), sum(count**2 for count in counts)


def _worded(given: Sequence[Candidate]) -> Sequence[Candidate]:
    """The candidates that are not blank after the official pre-processing; all of them if none is left."""
    return [one for one in given if not text.is_empty(text.official(one.caption))] or given


def _parts(candidates: Mapping[str, Sequence[Candidate]], texts: int) -> Iterator[list[str]]:
    part: list[str] = []
    held = 0
    for image, given in candidates.items():
        if part and held + len(given) > texts:
            yield part
            part, held = [], 0
        part.append(image)
        held += len(given)
    if part:
        yield part


def _choices(
    part: Sequence[str],
    candidates: Mapping[str, Sequence[Candidate]],
    utility: Compare,
    images: Mapping[str, Path | None] | None,
) -> Iterator[Choice]:
    ours, theirs, seen = [], [], []
    for image in part:
        captions = _distinct(candidates[image])
        ours += [caption for caption in captions for _ in captions]
        theirs += captions * len(captions)
        seen += [images[image] if images else None] * len(captions) ** 2
    values, start = _in_blocks(utility, ours, theirs, seen if images else None), 0
    for image in part:
        count = len(_distinct(candidates[image]))
        yield _choice(candidates[image], values[start : start + count**2].reshape(count, count))
        start += count**2


def _in_blocks(
    utility: Compare, ours: list[str], theirs: list[str], seen: list[Path | None] | None
) -> np.ndarray:
    """The utility of each row; `_ROWS` rows at a time, which bounds the memory of any metric."""
    parts = [slice(start, start + _ROWS) for start in range(0, len(ours), _ROWS)]
    return np.concatenate([utility(ours[part], theirs[part], seen[part] if seen else None) for part in parts])


def _choice(given: Sequence[Candidate], utilities: np.ndarray) -> Choice:
    """The best of an image's candidates; `utilities` (m, m) are of its distinct captions."""
    place = {caption: row for row, caption in enumerate(_distinct(given))}
    shares = np.zeros(len(place))
    for one in given:
        shares[place[one.caption]] += one.weight
    expected = utilities @ shares / shares.sum()
    tied = [n for n, one in enumerate(given) if expected[place[one.caption]] >= expected.max() - TIE]
    best = given[max(tied, key=lambda n: (given[n].log_probability, -n))]
    return Choice(best, float(expected[place[best.caption]]), len(place))


def _distinct(given: Sequence[Candidate]) -> list[str]:
    return list(dict.fromkeys(one.caption for one in given))
