"""What every metric gets and gives back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoints import Checkpoint
from harness.config import ScoreConfig
from harness.metrics import text


class Absent(Exception):
    """A score that cannot be computed here; its message says why."""


@dataclass(frozen=True)
class Inputs:
    """Captions to score, row by row: `predictions[i]` against `references[i]` and `images[i]`.

    `predictions` and `references` are raw but for line breaks, `images` is None where there are none.
    """

    predictions: Sequence[str]
    references: Sequence[str]
    images: Sequence[Path] | None
    config: ScoreConfig
    edition: int
    device: str = "cpu"
    cache: Path | None = None

    @cached_property
    def clean_predictions(self) -> list[str]:
        """The predictions after the official pre-processing."""
        return [text.official(caption) for caption in self.predictions]

    @cached_property
    def clean_references(self) -> list[str]:
        """The references after the official pre-processing."""
        return [text.official(caption) for caption in self.references]


@dataclass(frozen=True)
class Measured:
    """What a metric found: `per_image` (n,) and how it was made.

    A corpus metric has its own `value` and, where resamples can be summed, `statistics` (n, k) for
    `Metric.aggregate`; elsewhere the value is the mean of `per_image`.
    """

    per_image: np.ndarray
    signature: str
    official: bool = True
    value: float | None = None
    statistics: np.ndarray | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Metric:
    """A metric of METRICS: how it is measured and, for corpus metrics, how statistics become a score.

    `aggregate` maps summed statistics (..., k) to scores (...). `neural` metrics use the device, the others
    run beside them in a thread.
    """

    measure: Callable[[Inputs], Measured]
    aggregate: Callable[[np.ndarray], np.ndarray] | None = None
    neural: bool = False


def sign(metric: str, edition: int, *parts: Any) -> str:
    """The signature of a score: `metric|clef<edition>|part|part`; equal signatures are comparable scores."""
    return "|".join([metric, f"clef{edition}", *map(str, parts)])


def some_rows(rows: Sequence[int], what: str) -> list[str]:
    """A warning that counts rows and names the first few, or none."""
    if not rows:
        return []
    named = ", ".join(str(row + 1) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
    return [f"{len(rows)} row{'s' if len(rows) > 1 else ''} {what} (row {named})"]


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows grouped by similar length, so that each group padded stays within `budget` tokens."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[row] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def model_name(checkpoint: Checkpoint) -> str:
    """The checkpoint as signatures name it, so that a stand-in can never be taken for the official one."""
    return f"STAND-IN {checkpoint.name}" if checkpoint.standin else checkpoint.name
