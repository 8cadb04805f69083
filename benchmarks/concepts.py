"""What concepts cost: a head's training, thresholds, neighbours and names in captions, on made-up numbers.

    python benchmarks/concepts.py                      # all
    python benchmarks/concepts.py thresholds names     # some
    python benchmarks/concepts.py head                 # on a GPU, if there is one

Concept k of K is in about 0.5/k of the images, as rare concepts are in real sets. Prints for each part its
size, seconds of the clock and of the CPU, and the most memory of the process so far.
"""

import os
import random
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

LABELS, IMAGES = 2_500, 20_000
QUERIES, TRAINING, WIDTH = 10_000, 100_000, 1_408
NAMES, CAPTIONS = 20_000, 10_000


def timed(what: str, size: str, call: Callable[[], Any]) -> Any:
    """The result of a call; prints a row of the table."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what:<28}{size:<30}{wall:>8.1f} s {cpu:>8.1f} s CPU {peak:>6.1f} GB", flush=True)
    return found


def frequencies() -> np.ndarray:
    """The share of images that have each concept, the most frequent first."""
    return np.clip(0.5 / np.arange(1, LABELS + 1), 1e-4, 1)


def thresholds() -> None:
    """A global threshold, one pass over all labels, and the decisions."""
    from harness.concepts import thresholds
    from harness.concepts.settings import ThresholdsConfig

    draw, share = np.random.default_rng(0), frequencies()
    has = draw.random((IMAGES, LABELS)) < share
    values = draw.standard_normal((IMAGES, LABELS), dtype=np.float32)
    values += 2.5 * has + np.log(share / (1 - share)).astype(np.float32)
    values = 1 / (1 + np.exp(-values))
    labels = tuple(f"C{number:07d}" for number in range(LABELS))
    references = [{labels[place] for place in np.flatnonzero(row)} for row in has]
    size = f"{LABELS:,} labels x {IMAGES:,} images"
    for kind in ("global", "per_concept"):
        config = ThresholdsConfig(kind=kind)
        found = timed(
            f"thresholds, {kind}", size, lambda c=config: thresholds.choose(values, labels, references, c)
        )
    timed("decisions", size, lambda: thresholds.decide(values, found))


def knn() -> None:
    """The concepts of 33 neighbours, by cosines with all training images."""
    from harness.concepts import knn
    from harness.concepts.settings import KnnConfig

    draw = np.random.default_rng(0)
    database = draw.standard_normal((TRAINING, WIDTH), dtype=np.float32)
    queries = draw.standard_normal((QUERIES, WIDTH), dtype=np.float32)
    labels = tuple(f"C{number:07d}" for number in range(LABELS))
    share = frequencies() / frequencies().sum()
    places = draw.choice(LABELS, (TRAINING, 4), p=share)
    training = [tuple(labels[place] for place in row) for row in places]
    size = f"{QUERIES:,} x {TRAINING:,} x {WIDTH:,}"
    timed("knn", size, lambda: knn.probabilities(queries, database, training, labels, KnnConfig()))


def names() -> None:
    """Names of concepts in captions of 20 words."""
    from harness.concepts.names import from_captions

    draw = random.Random(0)
    words = [f"word{number}" for number in range(5_000)]
    known = {f"C{k:07d}": " ".join(draw.choices(words, k=draw.choice((1, 2, 3)))) for k in range(NAMES)}
    captions = [" ".join(draw.choices(words, k=20)) for _ in range(CAPTIONS)]
    labels = list(known)[:LABELS]
    timed(
        "names in captions",
        f"{NAMES:,} names x {CAPTIONS:,}",
        lambda: from_captions(captions, known, labels),
    )


def head() -> None:
    """Steps of the head alone: labels as indicators, forward and backward pass, AdamW; by pooling and loss.

    The widths are those of ViT-g (257 tokens at 224 pixels) and of BLIP-2's 32 queries. The features of one
    batch stand for those of all images, which would need 145 GB; labels are those of 100,000 images.
    """
    import torch

    from harness.concepts.settings import HeadConfig

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw = np.random.default_rng(0)
    share = frequencies() / frequencies().sum()
    rows = [list(set(row)) for row in draw.choice(LABELS, (TRAINING, 4), p=share)]
    for width, tokens in ((1_408, 257), (768, 32)):
        features = torch.randn(_BATCH, tokens, width).to(place)
        for settings in (HeadConfig(), HeadConfig(pooling="gem", loss="asymmetric")):
            _steps(settings, features, rows)


_BATCH, _STEPS = 128, 8


def _steps(settings: Any, features: Any, rows: list[list[int]]) -> None:
    """Time `_STEPS` optimiser steps after another one, and print images/s and the most memory."""
    import torch

    from harness.models import head, parts

    place, (_, tokens, width) = features.device, features.shape
    model = torch.nn.Module()
    model.feature_width, model.class_tokens, model.part_of = width, 1, lambda name: "connector"
    head.attach(model, settings, (frequencies() * TRAINING).astype(int).tolist(), TRAINING)
    model.to(place).train()
    optimizer = torch.optim.AdamW(parts.groups(model, 0.05, {}), lr=1e-3, fused=True)
    draw = np.random.default_rng(1)

    def step() -> None:
        chosen = draw.integers(len(rows), size=_BATCH)
        labels = head.indicators([rows[i] for i in chosen], LABELS).to(place)
        (model.head.loss(features, labels) / _BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    cuda = place.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(_STEPS):
        step()
    if cuda:
        torch.cuda.synchronize()
    images = _STEPS * _BATCH
    rate, cpu = images / (time.perf_counter() - wall), images / (time.process_time() - cpu)
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1e3
    )
    what, size = f"head, {settings.pooling}, {settings.loss}", f"{LABELS:,} x {width:,} x {tokens} tokens"
    shown = f"{rate:>8,.0f} images/s {cpu:>8,.0f} images/s of CPU time {peak / 1e9:>6.1f} GB on {place.type}"
    print(f"{what:<28}{size:<30}{shown}", flush=True)


PARTS = {"head": head, "thresholds": thresholds, "knn": knn, "names": names}


def main() -> None:
    """Run the parts that the arguments name, or all."""
    print(f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
