"""Scores equal to the organisers': first a number per image, then the aggregate, interval and signature."""

import math
import re
import time
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.config.editions import EDITIONS
from harness.errors import Problem, UserError
from harness.machine import ranks
from harness.metrics import (
    alignscore,
    bertscore,
    bleurt,
    bootstrap,
    clipscore,
    concepts,
    lexical,
    medcat,
    meteor,
    similarity,
    text,
)
from harness.metrics.base import Absent, Flagged, Inputs, Measured, Metric, Weights, sign
from harness.metrics.baseline import constant_baseline, constant_caption
from harness.metrics.cache import versions
from harness.metrics.control import image_gap
from harness.metrics.files import read_arrays, references_fingerprint, write_arrays, write_per_image
from harness.store import fingerprint

if TYPE_CHECKING:
    from harness.metrics.settings import ScoreConfig

__all__ = [
    "METRICS",
    "READINGS",
    "Inputs",
    "Metric",
    "Score",
    "Weights",
    "aggregate",
    "all_weights",
    "constant_baseline",
    "constant_caption",
    "finite",
    "identities_of",
    "image_gap",
    "is_absent",
    "named",
    "on_rows",
    "problems",
    "read_arrays",
    "references_fingerprint",
    "score",
    "score_concepts",
    "text",
    "unload",
    "uses_java",
    "versions",
    "weights_of",
    "write_arrays",
    "write_per_image",
]

METRICS: dict[str, Metric] = {
    "bertscore": bertscore.METRIC,
    "rouge1": lexical.ROUGE1,
    "bleurt": bleurt.METRIC,
    "bleu1": lexical.BLEU1,
    "meteor": meteor.METRIC,
    "cider": lexical.CIDER,
    "clipscore": clipscore.METRIC,
    "refclipscore": clipscore.REFCLIPSCORE,
    "similarity": similarity.METRIC,
    "medcat": medcat.METRIC,
    "alignscore": alignscore.METRIC,
}
READINGS = {reading: name for name, metric in METRICS.items() for reading in metric.readings}
"""The metric that a reading is a variant of; it is not established which of the two is official."""
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Score:
    """One metric over one set of captions.

    `value` has a 95 % row bootstrap interval [`low`, `high`]. It is None, with a `reason`, if it could not be
    computed. `n` images count. `official` is true only if the edition's own checkpoint computed the score.
    `per_image` (n,) has NaN for an image that does not count. `aggregate(name)` turns `statistics` (n, k)
    into the value.
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
        """The score as JSON-like values, without its arrays; `reason` only if there is one."""
        arrays = ("per_image", "statistics")
        values = {key: value for key, value in vars(self).items() if key not in arrays}
        return values if self.reason else {key: v for key, v in values.items() if key != "reason"}


def score(
    predictions: Sequence[str],
    references: Sequence[str],
    images: Sequence[Path | None] | None,
    config: "ScoreConfig",
    edition: int,
    device: str = "cpu",
    cache: Path | None = None,
    ids: Sequence[str] | None = None,
) -> tuple[dict[str, Score], list[str]]:
    """Score captions row by row with the metrics of the config; returns the scores and the warnings.

    `images` are the files of the rows, None for one that can't be read. `device` is a torch device, `cache` a
    folder for embeddings that later calls can use. `ids` name the rows in warnings. The Java and counting
    metrics run in a thread, at the same time as the neural ones. In a launch with several ranks, all ranks
    must call this: they share the neural work, and rank 0 gets the result. Raises `UserError` when the rows
    do not match. A metric that cannot be computed is absent with its reason.
    """
    _check_rows(predictions, references, images)
    config = config.for_edition(edition)
    inputs = Inputs(predictions, references, images, config, edition, device, cache)
    found = _measure(_wanted(config), inputs)
    if ranks.rank():
        return {}, []
    found |= _aggregates(found, edition)
    scores = _with_intervals(found, len(inputs.references), config.bootstrap, edition)
    flagged = _blank_rows(inputs, [name for name in ("bertscore", "rouge1") if name in found])
    for result in found.values():
        flagged += result.measured.warnings if result.measured else []
    doubts = [doubt for result in found.values() if result.measured for doubt in result.measured.doubts]
    return scores, list(dict.fromkeys([*(one.message(ids) for one in flagged), *doubts]))


@dataclass(frozen=True)
class _Found:
    """The result of one metric: a measurement, or the reason why there is none."""

    measured: Measured | None
    seconds: float
    reason: str | None = None


def _measure(metrics: Mapping[str, Metric], inputs: Inputs) -> dict[str, _Found]:
    """Each metric by name; those without a neural model run in a parallel thread, on rank 0 only."""
    _same_weights(inputs.config, inputs.edition)
    # a JVM takes seconds to start, so the Java metrics go first
    counted = (name for name, metric in metrics.items() if not metric.neural)
    first = sorted(counted, key=lambda name: not metrics[name].java)
    beside = ThreadPoolExecutor(1)
    try:
        others = {
            name: beside.submit(_timed, name, metrics[name], inputs) for name in first if not ranks.rank()
        }
        neural = {name: _timed(name, metric, inputs) for name, metric in metrics.items() if metric.neural}
        done = neural | {name: result.result() for name, result in others.items()}
    except BaseException:  # an interrupted command does not wait for answers that are still to come
        for metric in metrics.values():
            metric.stop()
        beside.shutdown(wait=False, cancel_futures=True)
        raise
    beside.shutdown()
    return {name: done[name] for name in metrics if name in done}


def _same_weights(config: "ScoreConfig", edition: int) -> None:
    """Raise `UserError` if the ranks lack different weights: they would wait for each other forever."""
    lacking = (
        ranks.every([str(problem) for problem in problems(config, edition)]) if ranks.world_size() > 1 else []
    )
    if any(one != lacking[0] for one in lacking):
        what = "; ".join(
            f"rank {number}: {', '.join(one) or 'all there'}" for number, one in enumerate(lacking)
        )
        raise UserError([Problem(f"not all ranks have the same weights: {what}")], None, 1)


def _timed(name: str, metric: Metric, inputs: Inputs) -> _Found:
    started = time.perf_counter()
    try:
        measured = finite(metric.measure(inputs))
    except Absent as absence:
        return _Found(None, time.perf_counter() - started, str(absence))
    if measured.signature.partition("|")[0] != name:
        raise ValueError(f"the metric {name} signs as {measured.signature}")
    return _Found(measured, time.perf_counter() - started)


def finite(measured: Measured) -> Measured:
    """The measurement; raises `Absent` if a number is not finite."""
    arrays = [measured.per_image, *([] if measured.statistics is None else [measured.statistics])]
    rows = sorted({int(row) for array in arrays for row in np.argwhere(~np.isfinite(array))[:, 0]})
    if rows:
        raise Absent(f"gave no finite number for {len(rows)} captions, the first in row {rows[0] + 1}")
    if measured.value is not None and not math.isfinite(measured.value):
        raise Absent("gave no finite number for all captions together")
    return measured


def _aggregates(found: Mapping[str, _Found], edition: int) -> dict[str, _Found]:
    """The edition's means of other scores, each only if all its parts were requested."""
    made: dict[str, _Found] = {}
    for name, parts in EDITIONS[edition].aggregates.items():
        known = {**found, **made}
        if not all(part in known for part in parts):
            continue
        lacking = [part for part in parts if known[part].measured is None]
        if lacking:
            made[name] = _Found(None, 0.0, f"needs {', '.join(lacking)}")
            continue
        measured = [known[part].measured for part in parts]
        signatures = fingerprint([one.signature for one in measured])
        made[name] = _Found(
            Measured(
                np.mean([one.per_image for one in measured], axis=0),
                sign(name, edition, f"mean:{'+'.join(parts)}", f"of:{signatures}"),
                official=all(one.official for one in measured),
            ),
            0.0,
        )
    return made


def unload() -> None:
    """Forget the models of the neural metrics and their embeddings."""
    for weights in all_weights().values():
        weights.unload()


def score_concepts(
    predictions: Sequence[Set[str]],
    references: Sequence[Set[str]],
    manual: Sequence[Set[str]] | None,
    edition: int,
    bootstrap: int = 1000,
    validated: bool = True,
) -> dict[str, Score]:
    """The scores of concept detection, for a set of CUIs per row: `f1` over all concepts, and `f1_secondary`.

    `f1_secondary` compares with the `manual` references, over modalities and body parts only. Images whose
    manual list has none of these do not count. It is absent without `manual`, and if no image counts. It is
    not official if nobody has `validated` these lists by hand.
    """
    _check_counts(predictions=predictions, references=references, manual=manual)
    started = time.perf_counter()
    per_image = concepts.scores(predictions, references)
    signature = sign("f1", edition, "all concepts", "like:sklearn")
    found = {"f1": _Found(Measured(per_image, signature), time.perf_counter() - started)}
    found["f1_secondary"] = _secondary(predictions, manual, edition, validated)
    return _with_intervals(found, len(references), bootstrap, None)


def _secondary(
    predictions: Sequence[Set[str]], manual: Sequence[Set[str]] | None, edition: int, validated: bool
) -> _Found:
    if manual is None:
        return _Found(None, 0.0, "needs the manually validated concepts (--manual)")
    per_image = concepts.secondary_scores(predictions, manual)
    what = f"{len(concepts.SECONDARY)} concepts"
    if np.isnan(per_image).all():
        lists = "manual list" if validated else "list"
        return _Found(None, 0.0, f"no image counts: no {lists} has one of the {what} of this score")
    whose = "manual" if validated else "not validated"
    signature = sign("f1_secondary", edition, f"{what}, {whose}", "like:sklearn")
    return _Found(Measured(per_image, signature, official=validated), 0.0)


def _with_intervals(
    found: Mapping[str, _Found], n: int, resamples: int, edition: int | None
) -> dict[str, Score]:
    """The scores; `edition` says which of them can be official, None leaves that to the metric.

    Only rows that count are resampled. Scores of the same rows are resampled together.
    """
    arrays = {
        name: one.measured.per_image if one.measured.statistics is None else one.measured.statistics
        for name, one in found.items()
        if one.measured
    }
    counted = {name: values[np.isfinite(values.reshape(n, -1)).all(1)] for name, values in arrays.items()}
    intervals = {}
    for rows in {len(values) for values in counted.values()} - {1} if resamples else ():
        same = {name: values for name, values in counted.items() if len(values) == rows}
        resampled = bootstrap.resample(same, {name: aggregate(name) for name in same}, resamples)
        intervals |= {name: bootstrap.interval(scores) for name, scores in resampled.items()}
    return {
        name: _score(
            name,
            result.measured,
            *intervals.get(name, (None, None)),
            len(counted[name]),
            result.seconds,
            result.measured.official and _is_official(name, edition),
        )
        if result.measured
        else Score(name, None, None, None, n, "", False, result.seconds, result.reason)
        for name, result in found.items()
    }


def on_rows(scores: Mapping[str, Score], rows: np.ndarray, resamples: int = 1000) -> dict[str, Score]:
    """The scores of some of their `rows` (n,) bool, from the arrays that scoring left.

    Nothing is measured again, so CIDEr's document frequencies stay those of all references. A score that has
    no arrays, or no rows that count, is absent with a reason.
    """
    found = {name: _kept(score, rows) for name, score in scores.items()}
    return _with_intervals(found, int(rows.sum()), resamples, None)


def _kept(score: Score, rows: np.ndarray) -> _Found:
    values = score.per_image if score.statistics is None else score.statistics
    if score.value is None or values is None or not rows.any():
        lacking = "its scoring left no number for each image" if rows.any() else "there are no images"
        return _Found(None, 0.0, score.reason or lacking)
    kept, corpus = np.asarray(values, dtype=float)[rows], aggregate(score.name)
    if np.isnan(kept).all():
        return _Found(None, 0.0, "none of these images counts for this score")
    if corpus is None:
        return _Found(Measured(kept, score.signature, score.official), 0.0)
    value = float(corpus(kept.sum(0)))
    return _Found(Measured(corpus(kept), score.signature, score.official, value, kept), 0.0)


def _is_official(name: str, edition: int | None) -> bool:
    """Whether the organisers of an edition are known to score by a metric of that name and definition."""
    if edition is None:
        return True
    year = EDITIONS[edition]
    return year.primary is not None and name in {*year.metrics, *year.aggregates} - {*READINGS.values()}


def _score(
    name: str,
    measured: Measured,
    low: float | None,
    high: float | None,
    n: int,
    seconds: float,
    official: bool,
) -> Score:
    return Score(
        name,
        float(np.nanmean(measured.per_image)) if measured.value is None else measured.value,
        low,
        high,
        n,
        measured.signature,
        official,
        seconds,
        per_image=measured.per_image,
        statistics=measured.statistics,
    )


def named(name: str) -> Metric | None:
    """The metric, or the reading of one, by its name; None for a mean of metrics."""
    beside = READINGS.get(name)
    return METRICS[beside].readings[name] if beside else METRICS.get(name)


def aggregate(name: str) -> bootstrap.Aggregate | None:
    """The function from the summed statistics of a metric to its score; None if its score is a mean."""
    metric = METRICS.get(name)
    return metric.aggregate if metric else None


def all_weights() -> dict[str, Weights]:
    """The weights of all metrics, by the section of the config that names them."""
    return {metric.weights.section: metric.weights for metric in METRICS.values() if metric.weights}


def weights_of(config: "ScoreConfig") -> dict[str, Weights]:
    """The weights of the requested metrics, by the section of the config that names them."""
    wanted = (metric.weights for name, metric in METRICS.items() if name in config.metrics)
    return {weights.section: weights for weights in wanted if weights}


def is_absent(name: str, config: "ScoreConfig") -> bool:
    """Whether a metric is not requested, or the config names no weights for it."""
    weights = METRICS[name].weights
    return name not in config.metrics or (weights is not None and weights.named(config) is None)


def problems(config: "ScoreConfig", edition: int) -> list[Problem]:
    """What is wrong with the weights of the requested metrics, found without importing torch."""
    config = config.for_edition(edition)
    return [problem for weights in weights_of(config).values() for problem in weights.missing(config)]


def uses_java(config: "ScoreConfig") -> bool:
    """Whether a requested metric, or a reading of one, runs on Java."""
    return any(metric.java for metric in _wanted(config).values())


def identities_of(config: "ScoreConfig", cache: Path | None) -> dict[str, Any]:
    """What determines the numbers of the requested metrics besides settings and captions, by section.

    The contents of their weights, found without running or loading anything; known hashes stay in `cache`.
    Stand-ins that are trained here are left out: their steps and the data determine them.
    """
    return {
        section: weights.identity(weights.settings(config), cache)
        for section, weights in weights_of(config).items()
        if weights.named(config) is not None
        and not weights.is_trained_here(config)
        and not weights.missing(config)
    }


def _wanted(config: "ScoreConfig") -> dict[str, Metric]:
    wanted = {}
    for name, metric in METRICS.items():
        if name in config.metrics:
            wanted |= {name: metric, **metric.readings}
    return wanted


def _check_rows(
    predictions: Sequence[str], references: Sequence[str], images: Sequence[Path | None] | None
) -> None:
    _check_counts(predictions=predictions, references=references, images=images)
    problems = [
        Problem(f"row {row} of the {name} holds half of a surrogate pair, which is not a character")
        for name, captions in (("predictions", predictions), ("references", references))
        for row, caption in enumerate(captions, 1)
        if _HALF_A_PAIR.search(caption)
    ]
    if problems:
        raise UserError(problems)


def _check_counts(**rows: Sequence[Any] | None) -> None:
    counts = {what: len(values) for what, values in rows.items() if values is not None}
    if len(set(counts.values())) > 1 or not counts["predictions"]:
        got = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise UserError([Problem(f"got {got}; scoring needs the same number of each, at least one")])


def _blank_rows(inputs: Inputs, metrics: Sequence[str]) -> list[Flagged]:
    """Rows with a blank caption, and the value that `metrics` have for them by the edition's rule."""
    blanks = EDITIONS[inputs.edition].blanks
    blank = np.array([any(map(text.is_empty, pair)) for pair in inputs.clean_pairs])
    after = " after pre-processing" if blanks.length_of == "clean" else ""
    kinds = (
        (inputs.agreed, f"both captions of length 0{after}", 1),
        (blank & ~inputs.agreed, "a caption that is blank after pre-processing", 0),
    )
    named = f"{' and '.join(metrics)} {'are' if len(metrics) > 1 else 'is'}"
    return [
        Flagged(np.flatnonzero(rows).tolist(), f"with {what}: {named} {value} by {blanks.rule}")
        for rows, what, value in kinds
        if rows.any() and metrics
    ]
