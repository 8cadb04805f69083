"""Scores that equal the organisers': a number per image first, then aggregate, interval and signature."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness import checkpoints
from harness.config import STANDIN, ScoreConfig
from harness.errors import Problem, UserError
from harness.metrics import bertscore, bleurt, bootstrap, clipscore, lexical, meteor, text
from harness.metrics.base import Absent, Inputs, Measured, Metric, some_rows
from harness.metrics.baseline import constant_baseline
from harness.metrics.control import image_gap

__all__ = ["METRICS", "READINGS", "Metric", "Score", "constant_baseline", "image_gap", "problems", "score"]

METRICS: dict[str, Metric] = {
    "bertscore": Metric(bertscore.measure, neural=True),
    "rouge1": Metric(lexical.rouge1),
    "bleurt": Metric(bleurt.measure, neural=True),
    "bleu1": Metric(lexical.bleu1, lexical.bleu1_aggregate),
    "meteor": Metric(meteor.measure, meteor.aggregate),
    "cider": Metric(lexical.cider),
    "clipscore": Metric(clipscore.measure, neural=True),
}
READINGS: dict[str, Metric] = {"cider_ptb": Metric(lexical.cider_ptb)}
"""Reported beside the metric before the `_`, where it is not established which of the two is official."""


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
    config = config.for_edition(edition)
    inputs = Inputs(
        [text.one_line(caption) for caption in predictions],
        [text.one_line(caption) for caption in references],
        images,
        config,
        edition,
        device,
        cache,
    )
    metrics = _wanted(config)
    with ThreadPoolExecutor(1) as beside:
        # METEOR's JVM takes seconds to start, so it goes first
        first = sorted((name for name, metric in metrics.items() if not metric.neural), key="meteor".__ne__)
        others = {name: beside.submit(_timed, name, metrics[name], inputs) for name in first}
        neural = {name: _timed(name, metric, inputs) for name, metric in metrics.items() if metric.neural}
        found = {name: neural[name] if name in neural else others[name].result() for name in metrics}
    warnings = _empty_rows(inputs) + [warning for _, more in found.values() for warning in more]
    return {name: result for name, (result, _) in found.items()}, warnings


def problems(config: ScoreConfig, edition: int) -> list[Problem]:
    """Checkpoints of the wanted metrics that are not at hand, found without importing torch."""
    config = config.for_edition(edition)
    found = bertscore.problems(config.bertscore) if "bertscore" in config.metrics else []
    for metric, wanted in (("bleurt", config.bleurt), ("clipscore", config.clipscore)):
        at_hand = wanted.checkpoint == STANDIN or checkpoints.find(wanted.checkpoint)
        if metric in config.metrics and not at_hand:
            found.append(checkpoints.missing(wanted.checkpoint, f"score.{metric}.checkpoint"))
    return found


def _wanted(config: ScoreConfig) -> dict[str, Metric]:
    wanted = {}
    for name, metric in METRICS.items():
        if name in config.metrics:
            wanted[name] = metric
            wanted |= {other: m for other, m in READINGS.items() if other.startswith(f"{name}_")}
    return wanted


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


def _timed(name: str, metric: Metric, inputs: Inputs) -> tuple[Score, list[str]]:
    started = time.perf_counter()
    try:
        measured = metric.measure(inputs)
    except Absent as absence:
        seconds = time.perf_counter() - started
        return Score(name, None, None, None, len(inputs.references), "", False, seconds, str(absence)), []
    return _finish(name, metric, measured, inputs.config, started), measured.warnings


def _finish(name: str, metric: Metric, measured: Measured, config: ScoreConfig, started: float) -> Score:
    low = high = None
    if config.bootstrap:
        values = measured.per_image if metric.aggregate is None else measured.statistics
        low, high = bootstrap.interval(values, config.bootstrap, metric.aggregate)
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
