"""Significance tests for differences between systems that caption the same images; both tests are paired.

The paired bootstrap resamples images, the same for both systems (Koehn 2004, section 5). Paired approximate
randomisation swaps the two systems' captions of random images (Noreen 1989; Riezler and Maxwell 2005). Corpus
metrics are recomputed from the summed statistics of each draw. Other metrics keep their per-image scores, so
CIDEr's document frequencies are always those of the whole reference set.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import combinations, zip_longest
from math import comb
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from harness import records
from harness.data.halves import half
from harness.errors import Problem, UserError
from harness.metrics import (
    READINGS,
    Score,
    aggregate,
    bootstrap,
    image_gap,
    on_rows,
    read_arrays,
    references_fingerprint,
)
from harness.metrics.settings import ScoreConfig
from harness.metrics.swaps import PERMUTATIONS, p_value, swapped
from harness.scoring import Rows

LEVEL = 0.05
DRAWS = 1_000
ARRAYS = "arrays.npz"
SCORED = {"captions": "score-after", "concepts": "score-concepts"}
"""The step with the scores of a run, by its task."""
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, NotImplementedError, BadZipFile, zlib.error)
"""The exceptions of numpy and zipfile for a damaged file of arrays."""
SMALL = 200
"""With fewer images, intervals are wide and only large differences can be shown."""


@dataclass(frozen=True)
class System:
    """The scores of one run or file; `ids` (n) are in the order of the scores' arrays.

    `references` is the fingerprint of ids and references. A score with a value also has arrays.
    """

    label: str
    ids: Sequence[str]
    references: str
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Difference:
    """`b` minus `a` in one metric, with its 95 % interval [`low`, `high`], `p` and Holm's `adjusted_p`.

    `real` if `adjusted_p` < 0.05 and the interval excludes 0. With one image there is no interval. If the two
    were not compared, there is a `reason` and no number.
    """

    metric: str
    a: str
    b: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted_p: float | None = None
    real: bool | None = None
    reason: str | None = None

    @property
    def side(self) -> str:
        """Whether `b` is higher or lower than `a`; `not shown` does not mean that the two are equal."""
        if self.reason:
            return "not compared"
        if not self.real:
            return "not shown"
        return "higher" if self.difference > 0 else "lower"

    @property
    def verdict(self) -> str:
        """`side` with the name of the higher system."""
        return {"higher": f"{self.b} higher", "lower": f"{self.a} higher"}.get(self.side, self.side)


@dataclass(frozen=True)
class _Contrast:
    """One metric of two systems: `rows` of `a`, and `excess`, the rows of `b` minus those of `a`; (n, k).

    n are the images that count: f1_secondary leaves some out.
    """

    metric: str
    a: str
    b: str
    rows: np.ndarray
    excess: np.ndarray

    def score(self, totals: np.ndarray) -> np.ndarray:
        """Scores (...) of summed rows (..., k)."""
        corpus = aggregate(self.metric)
        return corpus(totals) if corpus else totals[..., 0] / len(self.rows)

    def drawn(self, totals: np.ndarray) -> np.ndarray:
        """Differences (...) of summed rows and excess (..., 2k)."""
        rows, excess = np.split(totals, 2, axis=-1)
        return self.score(rows + excess) - self.score(rows)


def compare(
    systems: Sequence[System],
    metrics: Sequence[str] | None = None,
    resamples: int = PERMUTATIONS,
    seed: int = 0,
    against: str | None = None,
) -> list[Difference]:
    """Compare every pair of systems in every metric, or in the given ones; rows are aligned by id.

    `against` names a system: only the differences of all others from it are tested. The p value is two-sided,
    from `resamples` random swaps, or from all 2^n if there are no more. Raises `UserError` if ids or
    references differ, if the swaps are too few for any real difference, and (exit code 1) if nothing can be
    compared.
    """
    pairs = list(combinations(systems, 2))
    if against is not None:
        first = next(system for system in systems if system.label == against)
        pairs = [(first, other) for other in systems if other is not first]
    check_rows(systems)
    check_resamples(systems, resamples, len(pairs))
    order = {system.label: np.argsort(np.asarray(system.ids, dtype=str)) for system in systems}
    found = [_contrast(metric, a, b, order) for metric in _names(systems, metrics) for a, b in pairs]
    contrasts = [number for number, one in enumerate(found) if isinstance(one, _Contrast)]
    results: dict[int, Difference] = {}
    for count in {len(found[number].rows) for number in contrasts}:  # images that count for a metric
        same = [number for number in contrasts if len(found[number].rows) == count]
        tested = _test([found[number] for number in same], resamples, seed)
        results |= zip(same, tested, strict=True)
    found = [results.get(number, one) for number, one in enumerate(found)]
    if all(one.reason for one in found):
        problems = [Problem(f"{one.metric}: {one.reason}", f"{one.a} / {one.b}") for one in found]
        raise UserError(problems, "No metric can be compared.", exit_code=1)
    return found


def _names(systems: Sequence[System], wanted: Sequence[str] | None) -> list[str]:
    """The metrics to compare; a wanted metric includes its other reading."""
    found = list(dict.fromkeys(name for system in systems for name in system.scores))
    if wanted is None:
        return found
    readings = [name for name in found if READINGS.get(name) in wanted]
    return list(dict.fromkeys([*wanted, *readings]))


def check_rows(systems: Sequence[System]) -> None:
    """Raise `UserError` naming every system whose ids or references differ from the first's."""
    first, *others = systems
    problems = []
    for other in others:
        missing, more = (sorted(set(one.ids) - set(two.ids)) for one, two in ((first, other), (other, first)))
        if missing or more:
            parts = [(missing, f"lacks ids of {first.label}"), (more, f"has ids that {first.label} lacks")]
            lines = [f"{words}: {len(ids)}, the first {ids[0]}" for ids, words in parts if ids]
            problems.append(Problem("other images: " + "; ".join(lines), other.label))
        elif other.references != first.references:
            problems.append(Problem(f"other references than {first.label}, for the same ids", other.label))
    if problems:
        raise UserError(problems, "Compare scores of the same images against the same references only.")


def check_resamples(systems: Sequence[System], resamples: int, pairs: int | None = None) -> None:
    """Raise `UserError` if so few swaps can give no p below 0.05 after Holm's correction for all pairs."""
    pairs = comb(len(systems), 2) if pairs is None else pairs
    exact = 2 ** len(systems[0].ids) <= resamples
    if not exact and 2 * pairs / (resamples + 1) >= LEVEL:
        enough = round(2 * pairs / LEVEL)
        what = f"{resamples} are too few for any difference between {len(systems)} systems to be real"
        hint = f"With {pairs} {'pair' if pairs == 1 else 'pairs'}, use --resamples {enough} or more."
        raise UserError([Problem(what, key="--resamples", hint=hint)])


def _contrast(metric: str, a: System, b: System, order: Mapping[str, np.ndarray]) -> "_Contrast | Difference":
    absent = [_lacks(metric, system) for system in (a, b)]
    if any(absent):
        return Difference(metric, a.label, b.label, reason="; ".join(filter(None, absent)))
    one, two = a.scores[metric], b.scores[metric]
    if one.signature != two.signature:
        reason = "the signatures differ: " + signature_changes(one.signature, two.signature)
        return Difference(metric, a.label, b.label, reason=reason)
    ours, theirs = (_rows(system.scores[metric])[order[system.label]] for system in (a, b))
    counted, also = (np.isfinite(rows).all(axis=1) for rows in (ours, theirs))
    if (counted != also).any():
        return Difference(
            metric, a.label, b.label, reason="other images count for the one than for the other"
        )
    return _Contrast(metric, a.label, b.label, ours[counted], (theirs - ours)[counted])


def rows_of(system: System, metric: str) -> np.ndarray:
    """What each image gives to a score, (n, k), in the order of ids. Raises `UserError` if it is absent."""
    if why := _lacks(metric, system):
        raise UserError([Problem(f"{metric}: {why}", system.label)])
    return _rows(system.scores[metric])


def _lacks(metric: str, system: System) -> str | None:
    score = system.scores.get(metric)
    if score is None:
        return f"not computed for {system.label}"
    if score.value is None:
        return f"absent for {system.label}: {score.reason}"
    rows = _rows(score)
    if rows is None:
        return f"{system.label} has no scores per image"
    bad = score.n - np.isfinite(rows).all(axis=1).sum()  # an image that does not count has no number
    if bad > 0:
        return f"{system.label} has {bad:,} of {score.n:,} images with a score that is not finite"
    return None


def _rows(score: Score) -> np.ndarray | None:
    values = score.statistics if aggregate(score.name) else score.per_image
    return values if values is None else np.asarray(values, dtype=float).reshape(len(values), -1)


def signature_changes(a: str, b: str) -> str:
    """The parts in which two signatures differ: `layer: 40 / 6; fp32 / bf16`; `-` is a missing part."""
    ours, theirs = a.split("|"), b.split("|")
    changes = []
    for kind, i, j, k, m in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if kind != "equal":
            changes += [_change(*parts) for parts in zip_longest(ours[i:j], theirs[k:m], fillvalue="-")]
    return "; ".join(changes)


def _change(one: str, two: str) -> str:
    key, _, value = one.partition(":")
    return f"{key}: {value} / {two[len(key) + 1 :]}" if two.startswith(f"{key}:") else f"{one} / {two}"


def _test(contrasts: Sequence[_Contrast], resamples: int, seed: int) -> list[Difference]:
    """Do both tests for all contrasts, with the same draws and the same swaps."""
    both = {str(i): np.hstack([one.rows, one.excess]) for i, one in enumerate(contrasts)}
    drawn = bootstrap.resample(both, {str(i): c.drawn for i, c in enumerate(contrasts)}, DRAWS, seed)
    sums = swapped([one.excess for one in contrasts], resamples, seed)
    exact = 2 ** len(contrasts[0].rows) <= resamples
    found: list[Difference] = []
    for one, draws, moved in zip(contrasts, drawn.values(), sums, strict=True):
        a, b = one.rows.sum(0), one.rows.sum(0) + one.excess.sum(0)
        observed = float(one.score(b) - one.score(a))
        null = one.score(b - moved) - one.score(a + moved)
        if not all(np.isfinite(part).all() for part in (observed, draws, null)):
            reason = "some draws of the images have a score that is not finite"
            found.append(Difference(one.metric, one.a, one.b, reason=reason))
            continue
        ends = bootstrap.interval(draws) if len(one.rows) > 1 else (None, None)
        p = p_value(null, observed, exact)
        found.append(Difference(one.metric, one.a, one.b, observed, *ends, p))
    return _corrected(found)


def adjust(one: Difference, p: float) -> Difference:
    """The difference with its adjusted p, and with `real` from that p and the interval."""
    without_0 = one.low is not None and (one.low > 0 or one.high < 0)
    return replace(one, adjusted_p=p, real=p < LEVEL and without_0)


def holm(p: Sequence[float]) -> list[float]:
    """The p values of one family, adjusted (Holm 1979): by chance, 5 % of families have one below 0.05."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted


def _corrected(found: Sequence[Difference]) -> list[Difference]:
    """The differences with Holm's correction over the compared pairs of each metric."""
    corrected = list(found)
    for metric in {one.metric for one in found}:
        family = [i for i, one in enumerate(found) if one.metric == metric and not one.reason]
        for i, value in zip(family, holm([found[i].p for i in family]), strict=True):
            corrected[i] = adjust(found[i], value)
    return corrected


def read_run(folder: Path, label: str, task: str | None = None) -> System:
    """The validation scores of a run: of its captions after post-processing, or of its concepts.

    `task` is captions or concepts, by default that of the run.

    Raises `UserError` if the folder is not a run, or if its scores lack the numbers per image.
    """
    record = records.read(folder)
    return _system(folder, record, label, SCORED[task or records.task_of(record)])


def _system(folder: Path, record: records.Record, label: str, step: str) -> System:
    table = records.step_file(folder, record, step, "scores.json")
    if table is None:
        unscored = record.get("unscored", {}).get("valid")
        what = f"the run (status {record['status']}) has no scores" + (f": {unscored}" if unscored else "")
        hint = "Compare runs that learn from train alone." if unscored else records.finish(record)
        raise UserError([Problem(what, folder, hint=hint)])
    if (file := records.step_file(folder, record, step, ARRAYS)) is None:
        what = "scored by an older version, without the numbers per image that a comparison needs"
        raise UserError([Problem(what, folder, hint="Score it again: " + record["command"])])
    result = records.scores(table, record)
    try:
        ids, arrays = read_arrays(file)
        scores = {
            name: _with_rows(Score(**e), arrays.get(name), len(ids)) for name, e in result["scores"].items()
        }
    except UNREADABLE as error:
        # the checksum can be right: an earlier version may have written this file
        hint = f"Delete {file.parent}, then run again: {record['command']}"
        raise UserError([Problem(f"can't be read: {error}", file, hint=hint)]) from None
    return System(label, ids, result["references"], scores)


def of_rows(found: Rows, label: str) -> System:
    """The system of a file of captions, matched with its references but not scored yet."""
    return System(label, found.ids, references_fingerprint(found.ids, found.references), {})


def _with_rows(score: Score, array: np.ndarray | None, rows: int) -> Score:
    if array is not None and (array.dtype.kind not in "fiu" or len(array) != rows):
        raise ValueError(f"{score.name} has no number for each image")
    return replace(score, **{"statistics" if aggregate(score.name) else "per_image": array})


def on_half(system: System, wanted: str) -> System:
    """The system on one half of its images, `tune` or `held`; scores and intervals are those of that half."""
    rows = np.array([half(image) == wanted for image in system.ids], dtype=bool)
    ids = [image for image, kept in zip(system.ids, rows, strict=True) if kept]
    return replace(system, ids=ids, scores=on_rows(system.scores, rows, DRAWS))


def record_on_half(folder: Path, record: records.Record, wanted: str) -> dict[str, Any]:
    """A run's record with the scores after post-processing, and the image gap, of one half of validation.

    A run of concepts has the scores of its concepts instead, and no image gap. The scores come from the
    numbers per image that scoring left, so records of earlier versions have them too. The gap is that of
    ROUGE-1, among the images of this half. Raises `UserError` if the run has no such numbers.
    """
    system = on_half(read_run(folder, folder.name), wanted)
    scores = {name: score.as_dict() for name, score in system.scores.items()}
    if records.task_of(record) == "concepts":
        concepts = {**record["concepts"], "scores": {"valid": scores}}
        return {**record, "concepts": concepts, "image_gap": {"rouge1": {}}, "half": wanted}
    gap = gap_on_half(folder, record, wanted)
    return {**record, "scores": {"valid": {"after": scores}}, "image_gap": gap, "half": wanted}


def gap_on_half(folder: Path, record: records.Record, wanted: str) -> dict[str, Any]:
    """The image gap of a run's captions among the images of one half, as `metrics.image_gap` gives it."""
    table = records.step_file(folder, record, "score-after", "per_image.csv")
    if table is None:
        return {"rouge1": {"reason": "its scoring left no table of captions"}}
    rows = [row for key, row in records.per_image(table, record).items() if half(key) == wanted]
    captions = [row["prediction"] for row in rows], [row["reference"] for row in rows]
    return image_gap(*captions, ScoreConfig(), record["edition"], names=("rouge1",))


def few_images(n: int, wanted: str) -> str | None:
    """A warning if a half has few images."""
    if n >= SMALL:
        return None
    return f"the {wanted} half has {n} images: intervals are wide, and small differences can't be shown"
