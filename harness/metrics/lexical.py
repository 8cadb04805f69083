"""ROUGE-1, BLEU-1 and CIDEr: scores that count words."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from harness.metrics import java, text
from harness.metrics.base import Inputs, Measured, sign
from harness.metrics.cache import Row
from harness.store import fingerprint

WORD = re.compile(r"[a-z0-9]+")


def rouge1_f(prediction: str, reference: str) -> float:
    """ROUGE-1 F1 of one pre-processed pair, equal to rouge-score's without stemmer; both empty is 1."""
    if text.is_empty(prediction) and text.is_empty(reference):
        return 1.0
    ours, theirs = Counter(WORD.findall(prediction.lower())), Counter(WORD.findall(reference.lower()))
    common = (ours & theirs).total()
    if not common:
        return 0.0
    precision, recall = common / ours.total(), common / theirs.total()
    return 2 * precision * recall / (precision + recall)


def rouge1(inputs: Inputs) -> Measured:
    """ROUGE-1 F1 of each row after the official pre-processing."""
    per_image = np.array([rouge1_f(*pair) for pair in inputs.clean_pairs])
    return Measured(per_image, sign("rouge1", inputs.edition, "stem:no", "like:rouge-score:0.1.2"))


def bleu1(inputs: Inputs) -> Measured:
    """Corpus BLEU-1 after the official pre-processing, without PTB.

    Statistics are matches, words, reference words.
    """
    statistics = np.array([_bleu_counts(*pair) for pair in inputs.clean_pairs], dtype=float)
    return Measured(
        bleu1_aggregate(statistics),
        sign("bleu1", inputs.edition, "ptb:no", "like:pycocoevalcap:1.2"),
        value=float(bleu1_aggregate(statistics.sum(0))),
        statistics=statistics,
    )


def _bleu_counts(prediction: str, reference: str) -> tuple[int, int, int]:
    ours, theirs = Counter(prediction.split()), Counter(reference.split())
    return (ours & theirs).total(), ours.total(), theirs.total()


def bleu1_aggregate(totals: np.ndarray) -> np.ndarray:
    """BLEU-1 of summed statistics (..., 3), with the small constants of pycocoevalcap's `bleu_scorer.py`."""
    matches, words, reference_words = np.moveaxis(totals, -1, 0)
    ratio = (words + 1e-15) / (reference_words + 1e-9)
    return (matches + 1e-15) / (words + 1e-9) * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def cider(inputs: Inputs) -> Measured:
    """CIDEr-D of each row after the official pre-processing, without PTB; its mean is the score."""
    signature = sign("cider", inputs.edition, "ptb:no", "pycocoevalcap:1.2")
    return Measured(_cider(inputs, signature, inputs.clean_pairs, list), signature)


def cider_ptb(inputs: Inputs) -> Measured:
    """CIDEr-D of the raw captions after PTB, the other candidate for what the organisers compute."""
    signature = sign("cider_ptb", inputs.edition, "pre:raw", "ptb:yes", "pycocoevalcap:1.2")
    pairs = list(zip(inputs.predictions, inputs.references, strict=True))
    return Measured(_cider(inputs, signature, pairs, java.ptb), signature)


def _cider(
    inputs: Inputs, signature: str, pairs: list[Row], tokenise: Callable[[list[str]], list[str]]
) -> np.ndarray:
    """CIDEr-D (n,); a row counts as scored before only among the same references."""
    references = [reference for _, reference in pairs]

    def compute(new: list[Row]) -> np.ndarray:
        tokenised = tokenise([*(prediction for prediction, _ in pairs), *references])
        scores = cider_scores(tokenised[: len(pairs)], tokenised[len(pairs) :])
        of_row = dict(zip(pairs, scores, strict=True))
        return np.array([[of_row[row]] for row in new])

    return inputs.scored([signature, fingerprint(references)], pairs, compute)[:, 0]


def cider_scores(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """CIDEr-D (n,), in 0 to 10, by pycocoevalcap; its document frequencies are those of these references."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for prediction, reference in zip(predictions, references, strict=True):
        scorer += (prediction, [reference])
    if not any(map(str.split, references)):  # the scorer takes the maximum of no frequencies
        return np.zeros(len(predictions))
    return np.asarray(scorer.compute_score()[1])
