"""Does the model use the image? Its captions, moved to other images, should score lower."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from harness.config import ScoreConfig
from harness.metrics import bertscore, bootstrap, lexical, text
from harness.metrics.base import Absent

PERMUTATIONS = 5


def image_gap(
    predictions: Sequence[str],
    references: Sequence[str],
    config: ScoreConfig,
    edition: int,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """How much ROUGE-1 and BERTScore lose when every caption goes to another image.

    `{"rouge1": {"value", "permuted", "gap", "low", "high"}, "bertscore": {...}, "n", "permutations"}`:
    `permuted` is the mean over random permutations that leave no caption in place, `low` and `high` the row
    bootstrap's 95 % interval of the gap (None where `config.bootstrap` is 0). A gap whose interval excludes 0
    shows what no score on its own can: that the captions belong to their images. A metric that cannot be
    computed has `{"reason"}` alone, and so have both for fewer than two captions.
    """
    ours = [text.official(text.one_line(caption)) for caption in predictions]
    theirs = [text.official(text.one_line(caption)) for caption in references]
    orders = derangements(len(ours), seed) if len(ours) > 1 else []
    gaps = {}
    for name, scorer in scorers(config, edition, device).items():
        try:
            gaps[name] = _gap(scorer, ours, theirs, orders, config.bootstrap)
        except Absent as absence:
            gaps[name] = {"reason": str(absence)}
    return gaps | {"n": len(ours), "permutations": len(orders)}


def scorers(config: ScoreConfig, edition: int, device: str) -> dict[str, Callable]:
    """The metrics of the controls: functions of pre-processed predictions and references (n) -> scores (n,).

    One that cannot be computed raises `Absent` when called.
    """
    return {"rouge1": _rouge1, "bertscore": _bertscore(config, edition, device)}


def derangements(n: int, seed: int, count: int = PERMUTATIONS) -> list[np.ndarray]:
    """Seeded random orders (n,) in which no index keeps its place (each is one cycle through all)."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        cycle = random.permutation(n)
        order = np.empty(n, dtype=int)
        order[cycle] = np.roll(cycle, 1)
        found.append(order)
    return found


def _gap(
    scorer: Callable, ours: list[str], theirs: list[str], orders: list[np.ndarray], resamples: int
) -> dict[str, Any]:
    if not orders:
        raise Absent("needs at least two captions")
    own = scorer(ours, theirs)
    moved = np.mean([scorer([ours[i] for i in order], theirs) for order in orders], axis=0)
    low, high = bootstrap.interval(own - moved, resamples) if resamples else (None, None)
    gap = float((own - moved).mean())
    return {"value": float(own.mean()), "permuted": float(moved.mean()), "gap": gap, "low": low, "high": high}


def _rouge1(predictions: list[str], references: list[str]) -> np.ndarray:
    return np.array([lexical.rouge1_f(*pair) for pair in zip(predictions, references, strict=True)])


def _bertscore(config: ScoreConfig, edition: int, device: str) -> Callable:
    def scorer(predictions: list[str], references: list[str]) -> np.ndarray:
        checkpoint, layer = bertscore.locate(config.bertscore)
        store = bertscore.embeddings(checkpoint.folder, layer, device)
        return bertscore.f1(predictions, references, store, edition >= bertscore.IDF_SINCE)

    return scorer
