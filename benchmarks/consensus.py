"""Consensus over 32 candidates an image: its rate, its peak memory, and the time for a whole split.

    python benchmarks/consensus.py

Candidates are captions of 20 words in which samples of one image differ by a third. The utility is BERTScore
with the stand-in encoder (22 M parameters), then ROUGE-1. Prints the hours for 10,437 images at these rates.
With the official encoder, embedding takes longer by the ratio of their FLOPs.
"""

import os
import random
import resource
import time
from collections.abc import Mapping, Sequence

from harness.decoding import consensus
from harness.decoding.consensus import Candidate
from harness.machine import device
from harness.metrics.settings import ScoreConfig

device.probe("cpu")
IMAGES, SAMPLES, WORDS, SPLIT = 64, 32, 20, 10_437
LEXICON = [f"word{number}" for number in range(400)]


def drawn() -> Mapping[str, Sequence[Candidate]]:
    """The candidates of each image."""
    draw, found = random.Random(0), {}
    for image in range(IMAGES):
        base = draw.choices(LEXICON, k=WORDS)
        captions = [
            " ".join(draw.choice(LEXICON) if draw.random() < 1 / 3 else word for word in base)
            for _ in range(SAMPLES)
        ]
        found[str(image)] = [Candidate(caption) for caption in captions]
    return found


def main() -> None:
    """Print the rate for each utility."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config = ScoreConfig.model_validate({"bertscore": {"checkpoint": "standin"}, "bootstrap": 0})
    candidates = drawn()
    texts, pairs = consensus.cost(candidates)
    for name in ("bertscore", "rouge1"):
        utility = consensus.Utility({name: 1.0}, config, 2023)
        utility(["a"], ["b"])  # loads the encoder
        begun = time.perf_counter()
        chosen = dict(consensus.choose(candidates, utility))
        seconds = time.perf_counter() - begun
        assert len(chosen) == IMAGES
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"{name}: {IMAGES} images, {texts:,} texts, {pairs:,} comparisons in {seconds:.1f} s, ", end="")
        print(f"{pairs / seconds:,.0f} comparisons/s, peak {peak / 1e9:.1f} GB; ", end="")
        print(f"{SPLIT:,} images: {SPLIT / IMAGES * seconds / 3600:.2f} hours")


if __name__ == "__main__":
    main()
