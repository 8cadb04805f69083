"""Scores that equal the organisers': a number per image first, then aggregate, interval and signature."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import ScoreConfig
from harness.errors import Problem, UserError
from harness.metrics import bertscore, bootstrap, lexical, text
from harness.metrics.base import Absent, Inputs, Measured, Metric, some_rows
from harness.metrics.control import image_gap

__all__ = ["METRICS", "Metric", "Score", "image_gap", "problems", "score"]

METRICS: dict[str, Metric] = {
    "bertscore": Metric(bertscore.measure, neural=True),
    "rouge1": Metric(lexical.rouge1),
    "bleu1": Metric(lexical.bleu1, lexical.bleu1_aggregate),
    "cider": Metric(lexical.cider),
}


@dataclass(frozen=True)
class Score:
    """One metric over one set of captions.

    `value` with its 95 % row bootstrap interval [`low`, `high`], None with a `reason` where it could not be
    computed; `n` captions; `official` only where the edition's own checkpoint computed it; `per_image` (n,)
    segment scores and `statistics` (n, k) that `METRICS[name].aggregate` turns into the value.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    signature: str
    official: bool
    seconds: float
    reason: str | None = None
    per_image: np.ndarray | None = field(default=None, repr=False)
    statistics: np.ndarray | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The score as JSON-like values, without its arrays; `reason` only where there is one."""
        arrays = ("per_image", "statistics")
        values = {key: value for key, value in vars(self).items() if key not in arrays}
        return values if self.reason else {key: v for key, v in values.items() if key != "reason"}


def score(
    predictions: Sequence[str],
    references: Sequence[str],
    images: Sequence[Path] | None,
    config: ScoreConfig,
    edition: int,
    device: str = "cpu",
    cache: Path | None = None,
) -> tuple[dict[str, Score], list[str]]:
    """Score captions row by row by the metrics of the config; returns the scores and what to know about them.

    `images` are the files of the rows, `device` a torch device, `cache` a folder for embeddings that later
    calls may share. The Java and counting metrics run in a thread beside the neural ones. Raises `UserError`
    when the rows do not match; a metric that cannot be computed is absent with its reason.
    """
    _check_rows(predictions, references, images)
    inputs = Inputs(
        [text.one_line(caption) for caption in predictions],
        [text.one_line(caption) for caption in references],
        images,
        config,
        edition,
        device,
        cache,
    )
    wanted = [name for name in METRICS if name in config.metrics]
    warnings = _empty_rows(inputs)
    with ThreadPoolExecutor(1) as beside:
        others = {n: beside.submit(_timed, n, inputs) for n in wanted if not METRICS[n].neural}
        neural = {n: _timed(n, inputs) for n in wanted if METRICS[n].neural}
        found = {n: neural[n] if n in neural else others[n].result() for n in wanted}
    for _, more in found.values():
        warnings += more
    return {name: result for name, (result, _) in found.items()}, warnings


def problems(config: ScoreConfig) -> list[Problem]:
    """Checkpoints of the wanted metrics that are not at hand, found without importing torch."""
    found = bertscore.problems(config.bertscore) if "bertscore" in config.metrics else []
    return found


def _check_rows(predictions: Sequence[str], references: Sequence[str], images: Sequence[Path] | None) -> None:
    counts = {"predictions": len(predictions), "references": len(references)}
    if images is not None:
        counts["images"] = len(images)
    if len(set(counts.values())) > 1 or not predictions:
        got = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise UserError([Problem(f"got {got}; scoring wants the same number of each, at least one")])


def _empty_rows(inputs: Inputs) -> list[str]:
    pairs = zip(inputs.clean_predictions, inputs.clean_references, strict=True)
    empty = [(text.is_empty(prediction), text.is_empty(reference)) for prediction, reference in pairs]
    both = [row for row, sides in enumerate(empty) if all(sides)]
    one = [row for row, sides in enumerate(empty) if any(sides) and not all(sides)]
    return some_rows(both, "with prediction and reference empty after pre-processing, scored 1") + some_rows(
        one, "with one caption empty after pre-processing, scored 0"
    )


def _timed(name: str, inputs: Inputs) -> tuple[Score, list[str]]:
    started = time.perf_counter()
    try:
        measured = METRICS[name].measure(inputs)
    except Absent as absence:
        seconds = time.perf_counter() - started
        return Score(name, None, None, None, len(inputs.references), "", False, seconds, str(absence)), []
    return _finish(name, measured, inputs.config, started), measured.warnings


def _finish(name: str, measured: Measured, config: ScoreConfig, started: float) -> Score:
    aggregate = METRICS[name].aggregate
    low = high = None
    if config.bootstrap:
        values = measured.per_image if aggregate is None else measured.statistics
        low, high = bootstrap.interval(values, config.bootstrap, aggregate)
    return Score(
        name,
        float(measured.per_image.mean()) if measured.value is None else measured.value,
        low,
        high,
        len(measured.per_image),
        measured.signature,
        measured.official,
        time.perf_counter() - started,
        per_image=measured.per_image,
        statistics=measured.statistics,
    )
