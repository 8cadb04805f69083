"""The probability of each concept for each image; see `concepts.probabilities`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.concepts.settings import ConceptsConfig
from harness.steps.base import Step

if TYPE_CHECKING:
    from harness.steps.plan import Plan
    from harness.steps.work import Work


class Detect(Step):
    """Writes the probabilities of the concepts of one split by this run's own predictor."""

    kind, version, shared = "detect", 1, True
    section = ("concepts", ConceptsConfig | None, None)

    @classmethod
    def of(cls, plan: "Plan", before: Mapping[str, Step]) -> Iterator[Step]:
        yield from ()

    def build(self, work: "Work", directory: Path) -> None:
        raise NotImplementedError
