"""Scores equal to the organisers': first a number per image, then the aggregate, interval and signature."""

import re
import time
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.config.editions import EDITIONS
from harness.errors import Problem, UserError
from harness.machine import ranks
from harness.metrics import concepts, text
from harness.metrics.base import Absent, Flagged, Inputs, Measured, Metric, Weights, sign
from harness.metrics.baseline import constant_baseline, constant_caption
from harness.metrics.cache import versions
from harness.metrics.control import image_gap
from harness.metrics.files import read_arrays, references_fingerprint, write_arrays, write_per_image
from harness.metrics.scores import Found, Score, finite, on_rows, with_intervals
from harness.metrics.table import (
    METRICS,
    READINGS,
    aggregate,
    all_weights,
    identities_of,
    is_absent,
    named,
    problems,
    unload,
    uses_java,
    wanted,
    weights_of,
)
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

_HALF_A_PAIR = re.compile("[\ud800-\udfff]")


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
    found = _measure(wanted(config), inputs)
    if ranks.rank():
        return {}, []
    found |= _aggregates(found, edition)
    scores = with_intervals(found, len(inputs.references), config.bootstrap, edition)
    flagged = _blank_rows(inputs, [name for name in ("bertscore", "rouge1") if name in found])
    for result in found.values():
        flagged += result.measured.warnings if result.measured else []
    doubts = [doubt for result in found.values() if result.measured for doubt in result.measured.doubts]
    return scores, list(dict.fromkeys([*(one.message(ids) for one in flagged), *doubts]))


def _measure(metrics: Mapping[str, Metric], inputs: Inputs) -> dict[str, Found]:
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


def _timed(name: str, metric: Metric, inputs: Inputs) -> Found:
    started = time.perf_counter()
    try:
        if metric.weights:
            metric.weights.check_named(inputs.config)
        measured = finite(metric.measure(inputs))
    except Absent as absence:
        return Found(None, time.perf_counter() - started, str(absence))
    if measured.signature.partition("|")[0] != name:
        raise ValueError(f"the metric {name} signs as {measured.signature}")
    return Found(measured, time.perf_counter() - started)


def _aggregates(found: Mapping[str, Found], edition: int) -> dict[str, Found]:
    """The edition's means of other scores, each only if all its parts were requested."""
    made: dict[str, Found] = {}
    for name, parts in EDITIONS[edition].aggregates.items():
        known = {**found, **made}
        if not all(part in known for part in parts):
            continue
        lacking = [part for part in parts if known[part].measured is None]
        if lacking:
            made[name] = Found(None, 0.0, f"needs {', '.join(lacking)}")
            continue
        measured = [known[part].measured for part in parts]
        signatures = fingerprint([one.signature for one in measured])
        made[name] = Found(
            Measured(
                np.mean([one.per_image for one in measured], axis=0),
                sign(name, edition, f"mean:{'+'.join(parts)}", f"of:{signatures}"),
                official=all(one.official for one in measured),
            ),
            0.0,
        )
    return made


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
    found = {"f1": Found(Measured(per_image, signature), time.perf_counter() - started)}
    found["f1_secondary"] = _secondary(predictions, manual, edition, validated)
    return with_intervals(found, len(references), bootstrap, None)


def _secondary(
    predictions: Sequence[Set[str]], manual: Sequence[Set[str]] | None, edition: int, validated: bool
) -> Found:
    if manual is None:
        return Found(None, 0.0, "needs the manually validated concepts (--manual of score)")
    per_image = concepts.secondary_scores(predictions, manual)
    what = f"{len(concepts.SECONDARY)} concepts"
    if np.isnan(per_image).all():
        lists = "manual list" if validated else "list"
        return Found(None, 0.0, f"no image counts: no {lists} has one of the {what} of this score")
    whose = "manual" if validated else "not validated"
    signature = sign("f1_secondary", edition, f"{what}, {whose}", "like:sklearn")
    return Found(Measured(per_image, signature, official=validated), 0.0)


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
