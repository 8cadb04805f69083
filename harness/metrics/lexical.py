"""ROUGE-1, BLEU-1 and CIDEr: scores that count words."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from harness.metrics import java
from harness.metrics.base import Inputs, Measured, Metric, Original, Pairs, sign
from harness.metrics.cache import Row
from harness.metrics.expected import silenced
from harness.metrics.ngrams import ORDERS, Frequencies
from harness.metrics.text import collapse
from harness.store import fingerprint

WORD = re.compile(r"[a-z0-9]+")
CIDER_SIGMA = 6.0


def rouge1_f(prediction: str, reference: str) -> float:
    """ROUGE-1 F1 of one pre-processed pair, equal to rouge-score's without the stemmer."""
    ours, theirs = Counter(WORD.findall(prediction.lower())), Counter(WORD.findall(reference.lower()))
    common = (ours & theirs).total()
    if not common:
        return 0.0
    precision, recall = common / ours.total(), common / theirs.total()
    return 2 * precision * recall / (precision + recall)


def rouge1(inputs: Inputs) -> Measured:
    """ROUGE-1 F1 of each row after the official pre-processing; empty captions by the edition's rule."""
    per_image = np.where(inputs.agreed, 1.0, [rouge1_f(*pair) for pair in inputs.clean_pairs])
    return Measured(per_image, sign("rouge1", inputs.edition, "stem:no", "like:rouge-score:0.1.2"))


def bleu1(inputs: Inputs) -> Measured:
    """Corpus BLEU-1 after the official pre-processing, without PTB.

    The statistics are matches, words, reference words.
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
    signature = sign("cider", inputs.edition, "ptb:no", "like:pycocoevalcap:1.2")
    pairs, counted = inputs.clean_pairs, inputs.counted

    def compute(new: list[Row]) -> np.ndarray:
        return _cider(*zip(*new, strict=True), counted.frequencies)[:, None]

    return Measured(inputs.scored([signature, counted.identity], pairs, compute)[:, 0], signature)


def cider_ptb(inputs: Inputs) -> Measured:
    """CIDEr-D of the raw captions after PTB; the organisers may compute this instead of `cider`."""
    signature = sign("cider_ptb", inputs.edition, "pre:raw", "ptb:yes", "like:pycocoevalcap:1.2")
    pairs, documents = inputs.pairs, inputs.counted.captions
    n = len(pairs)

    def compute(new: list[Row]) -> np.ndarray:
        further = [] if inputs.documents is None else documents  # else they are the references
        tokenised = java.ptb([*(text for side in zip(*pairs, strict=True) for text in side), *further])
        scores = cider_scores(tokenised[:n], tokenised[n : 2 * n], tokenised[2 * n :] or None)
        of_row = dict(zip(pairs, scores, strict=True))
        return np.array([[of_row[row]] for row in new])

    return Measured(inputs.scored([signature, fingerprint(list(documents))], pairs, compute)[:, 0], signature)


def cider_scores(
    predictions: Sequence[str], references: Sequence[str], documents: Sequence[str] | None = None
) -> np.ndarray:
    """CIDEr-D (n,), in 0 to 10, as pycocoevalcap's `cider_scorer.py` with one reference for each prediction.

    The documents, by default the references, give the document frequencies.
    """
    return _cider(predictions, references, Frequencies(documents or references))


def _cider(predictions: Sequence[str], references: Sequence[str], counted: Frequencies) -> np.ndarray:
    """CIDEr-D (n,). A row's score depends on `counted` and the row only: sums run over n-grams in an order
    that other rows do not change."""
    count = len(references)
    log_count = math.log(counted.size)
    total, lengths = np.zeros(count), np.zeros(2 * count)
    for order, (document, grams, frequency) in enumerate(counted.of([*references, *predictions]), 1):
        if order == 2:  # the original takes the number of bigrams as a caption's length
            lengths = np.bincount(document, minlength=2 * count).astype(float)
        total += _cosines(document, grams, frequency, count, log_count)
    gap = lengths[count:] - lengths[:count]
    return 10 * total / ORDERS * np.exp(-(gap**2) / (2 * CIDER_SIGMA**2))


def _cosines(
    document: np.ndarray, grams: np.ndarray, frequency: np.ndarray, count: int, log_count: float
) -> np.ndarray:
    """Clipped cosines (count,) of n-grams of one order; documents from `count` on are the predictions."""
    size = len(frequency)
    pairs, times = np.unique(document * size + grams, return_counts=True)
    document, grams = np.divmod(pairs, max(size, 1))
    weights = times * (log_count - np.log(np.maximum(frequency, 1)))[grams]
    # n-grams that no document has are summed separately, in whole numbers, so exactly
    known = frequency[grams] > 0
    squares = np.bincount(document[known], weights[known] ** 2, 2 * count)
    unknown = np.bincount(document[~known], times[~known] ** 2, 2 * count)
    norms = np.sqrt(squares + log_count**2 * unknown)

    ours = document >= count
    _, mine, theirs = np.intersect1d(
        pairs[ours] - count * size, pairs[~ours], assume_unique=True, return_indices=True
    )
    clipped = np.minimum(weights[ours][mine], weights[~ours][theirs]) * weights[~ours][theirs]
    shared = np.bincount(document[~ours][theirs], clipped, count)
    both = norms[:count] * norms[count:]
    return np.divide(shared, both, out=np.zeros(count), where=both > 0)


def _rouge1_original(_: Inputs, pairs: Pairs) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], use_stemmer=False)
    return [scorer.score(reference, prediction)["rouge1"].fmeasure for prediction, reference in pairs]


def _bleu1_original(_: Inputs, pairs: Pairs) -> list[float]:
    from pycocoevalcap.bleu.bleu import Bleu

    one = ({0: [reference]} for _, reference in pairs), ({0: [prediction]} for prediction, _ in pairs)
    return [Bleu(1).compute_score(*pair, verbose=0)[0][0] for pair in zip(*one, strict=True)]


def _cider_original(_: Inputs, pairs: Pairs) -> Sequence[float]:
    from pycocoevalcap.cider.cider import Cider

    truth = {row: [reference] for row, (_, reference) in enumerate(pairs)}
    return Cider().compute_score(truth, {row: [prediction] for row, (prediction, _) in enumerate(pairs)})[1]


def _cider_ptb_original(inputs: Inputs, pairs: Pairs) -> Sequence[float]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenised(side: int) -> list[str]:
        # one line per caption, or its lines are taken for other rows
        given = {row: [{"caption": collapse(pair[side])}] for row, pair in enumerate(pairs)}
        with java.on_path(), silenced():
            found = PTBTokenizer().tokenize(given)
        return [found[row][0] for row in given]

    return _cider_original(inputs, list(zip(tokenised(0), tokenised(1), strict=True)))


ROUGE1 = Metric(rouge1, original=Original("rouge-score", _rouge1_original))
BLEU1 = Metric(bleu1, bleu1_aggregate, original=Original("pycocoevalcap", _bleu1_original))
CIDER = Metric(
    cider,
    original=Original("pycocoevalcap", _cider_original, corpus=True),
    readings={
        "cider_ptb": Metric(
            cider_ptb,
            java=True,
            original=Original("pycocoevalcap", _cider_ptb_original, corpus=True, raw=True),
        )
    },
)
