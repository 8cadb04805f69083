"""Does the model use the image? Its captions, moved to other images, should score lower."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.metrics import bertscore, bootstrap, lexical
from harness.metrics.base import Absent, Inputs, Measured

if TYPE_CHECKING:
    from harness.metrics.settings import ScoreConfig

PERMUTATIONS = 5
MEASURES: Mapping[str, Callable[[Inputs], Measured]] = {
    "rouge1": lexical.rouge1,
    "bertscore": bertscore.measure,
}
"""The metrics of the controls."""


def image_gap(
    predictions: Sequence[str],
    references: Sequence[str],
    config: "ScoreConfig",
    edition: int,
    device: str = "cpu",
    cache: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How much ROUGE-1 and BERTScore lose when every caption goes to another image.

    `{"rouge1": {"value", "permuted", "gap", "low", "high"}, "bertscore": {...}, "n", "permutations"}`:
    `permuted` is the mean over random permutations that leave no caption in place. `low` and `high` are the
    row bootstrap's 95 % interval of the gap, None if `config.bootstrap` is 0. A gap whose interval excludes 0
    shows that the captions belong to their images; no score alone can show this. A metric that cannot be
    computed has only `{"reason"}`. With fewer than two captions this holds for both.
    """
    inputs = Inputs(predictions, references, None, config, edition, device, cache)
    orders = derangements(len(predictions), seed) if len(predictions) > 1 else []
    gaps = {}
    for name, measure in MEASURES.items():
        try:
            gaps[name] = _gap(measure, inputs, orders)
        except Absent as absence:
            gaps[name] = {"reason": str(absence)}
    return gaps | {"n": len(predictions), "permutations": len(orders)}


def derangements(n: int, seed: int, count: int = PERMUTATIONS) -> list[np.ndarray]:
    """Seeded random orders (n,) in which no index keeps its place; each is one cycle through all indices."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        cycle = random.permutation(n)
        order = np.empty(n, dtype=int)
        order[cycle] = np.roll(cycle, 1)
        found.append(order)
    return found


def _gap(measure: Callable[[Inputs], Measured], inputs: Inputs, orders: list[np.ndarray]) -> dict[str, Any]:
    if not orders:
        raise Absent("needs at least two captions")
    own = measure(inputs).per_image
    moved = np.mean([measure(_moved(inputs, order)).per_image for order in orders], axis=0)
    low = high = None
    if inputs.config.bootstrap:
        resampled = bootstrap.resample({"gap": own - moved}, {"gap": None}, inputs.config.bootstrap)
        low, high = bootstrap.interval(resampled["gap"])
    gap = float((own - moved).mean())
    return {"value": float(own.mean()), "permuted": float(moved.mean()), "gap": gap, "low": low, "high": high}


def _moved(inputs: Inputs, order: np.ndarray) -> Inputs:
    return replace(inputs, predictions=[inputs.predictions[i] for i in order])
