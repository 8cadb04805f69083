"""Systems with made-up scores, caption files, and `harness compare` on them."""

import csv
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np

from harness.metrics import METRICS, Score
from harness.scoring.compare import System
from support import commands


def system(label: str, ids=None, references="same", **arrays: np.ndarray) -> System:
    """A system with these scores (n,) or statistics (n, k) by metric."""
    scores = {name: given(name, np.asarray(array, dtype=float)) for name, array in arrays.items()}
    n = len(next(iter(arrays.values())))
    return System(label, [f"i{row:06}" for row in range(n)] if ids is None else ids, references, scores)


def given(name: str, array: np.ndarray, **more) -> Score:
    """A score made of its array alone."""
    corpus = METRICS[name].aggregate
    value = float(corpus(array.sum(0)) if corpus else array.mean())
    kind = "statistics" if corpus else "per_image"
    score = Score(name, value, None, None, len(array), f"{name}|clef2023", True, 0.0, **{kind: array})
    return replace(score, **more)


def write_file(path: Path, ids, captions) -> Path:
    """Captions in the format of 2025."""
    rows = [("ID", "Caption"), *zip(ids, captions, strict=True)]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    return path


def harness(folder: Path, *arguments) -> subprocess.CompletedProcess:
    """`harness compare`, whatever its exit code."""
    return commands.harness(folder, "compare", *arguments, code=None)
