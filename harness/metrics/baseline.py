"""The floor: the score of one constant caption for all images."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.metrics import control, lexical, text
from harness.metrics.base import Absent, Inputs

if TYPE_CHECKING:
    from harness.metrics.settings import ScoreConfig

MOST_CANDIDATES = 2000


def constant_baseline(
    training: Sequence[str],
    references: Sequence[str],
    config: "ScoreConfig",
    edition: int,
    device: str = "cpu",
    cache: Path | None = None,
) -> dict[str, Any]:
    """ROUGE-1 and BERTScore of the training caption with the best mean ROUGE-1 over the training captions.

    Returns `{"caption", "rouge1", "bertscore"}`. A metric that cannot be computed is left out. Without
    training captions the result is empty.
    """
    if not training:
        return {}
    constant = constant_caption(training)
    inputs = Inputs([constant] * len(references), references, None, config, edition, device, cache)
    result: dict[str, Any] = {"caption": constant}
    for name, measure in control.MEASURES.items():
        try:
            result[name] = float(measure(inputs).per_image.mean())
        except Absent:
            continue
    return result


def constant_caption(training: Sequence[str]) -> str:
    """The training caption with the best mean ROUGE-1 over the training captions.

    If there are more than 2,000, a seeded sample of 2,000 is used instead of all.
    """
    captions = [text.official(caption) for caption in training]
    if len(captions) > MOST_CANDIDATES:
        chosen = np.random.default_rng(0).permutation(len(captions))[:MOST_CANDIDATES]
        captions = [captions[i] for i in sorted(chosen)]
        training = [training[i] for i in sorted(chosen)]
    return training[int(np.argmax(mean_rouge1(captions)))]


def mean_rouge1(captions: Sequence[str]) -> np.ndarray:
    """The mean ROUGE-1 F of each pre-processed caption against all of them, (n,), in one sparse product.

    The k-th occurrence of a word is its own feature, so common features count clipped common words.
    """
    from scipy.sparse import csr_matrix

    known: dict[tuple[str, int], int] = {}
    rows, columns = [], []
    for row, caption in enumerate(captions):
        seen: Counter[str] = Counter()
        for word in lexical.WORD.findall(caption):
            seen[word] += 1
            rows.append(row)
            columns.append(known.setdefault((word, seen[word]), len(known)))
    features = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(captions), max(len(known), 1)))
    lengths = np.asarray(features.sum(axis=1)).ravel()
    common = (features @ features.T).toarray()
    return (2 * common / np.maximum(lengths[:, None] + lengths[None, :], 1)).mean(axis=1)
