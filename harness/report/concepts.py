"""The concepts of a page: their scores beside those of baselines, each concept's, and every image's."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import records
from harness.concepts.results import Concept, per_concept, worst_first
from harness.data.halves import HALVES, TUNE
from harness.report import examples, gallery, groups
from harness.report.sources import Concepts, Images, Run
from harness.scoring.compare import few_images

F1 = "f1"


def as_dict(
    found: Concepts, images: Images | None, run: Run, page: Path, pictured: Sequence[str]
) -> dict[str, Any] | None:
    """What the page shows of a run's concepts; None for a run of captions alone.

    `pictured` are the ids whose images the page has anyway; `page` is its folder.
    """
    if records.CONCEPTS not in records.tasks_of(run.record):
        return None
    own = run.record.get("concepts") or {}
    names = images.concept_names if images else {}
    predicted, true = ([lists.get(key, ()) for key in found.ids] for lists in (found.predicted, found.true))
    have = set(pictured)
    opening = examples.chosen(found.ids, found.f1)
    shown = [key for key in found.ids if key not in have]
    links, thumbnails = gallery.pictures(shown, images, page, [key for _, key in opening])
    table = worst_first(per_concept(predicted, true, names)) if found.true else _unscored(found, names)
    return {
        "predictor": own.get("predictor"),
        "labels": own.get("labels"),
        "told": _told(own),
        "tuned": _tuned(own),
        "scores": list(_scores(own)),
        "examples": {"metric": F1 if found.f1 else None, "chosen": opening},
        "groups": groups.as_dict({key: {F1: value} for key, value in found.f1.items()}, found.true, names),
        "baselines": list(_baselines(own)),
        "few": list(_few(own)),
        "table": [_row(concept, bool(found.true)) for concept in table],
        "rows": list(_images(found, [concept.cui for concept in table], links, thumbnails)),
        "notes": [
            *_notes(found, images, run),
            *(gallery.missing(len(shown), len(links), len(thumbnails)) if images else ()),
        ],
    }


def _told(own: Mapping[str, Any]) -> str | None:
    """How thresholds were chosen, in words; None before that is known."""
    if told := (own.get("thresholds") or {}).get("told"):
        return told
    return "No threshold was chosen by this run." if own.get("scores") else None


def _tuned(own: Mapping[str, Any]) -> bool:
    """Whether the half `tune` may have chosen thresholds: those of the run, or of runs that vote."""
    return (own.get("thresholds") or {}).get("chosen_on") == TUNE or own.get("predictor") == "votes"


def _scores(own: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each score on all of validation and on its halves."""
    halves = own.get("halves", {})
    for metric, score in own.get("scores", {}).get("valid", {}).items():
        yield {
            "metric": metric,
            "whole": score,
            **{half: halves.get(half, {}).get(metric) for half in HALVES},
        }


def _baselines(own: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The F1 of each baseline and what the run gains over it, on all of validation and on the half `held`."""
    for name, floor in own.get("baselines", {}).items():
        gain = own.get("paired", {}).get(name) or {}
        parts = {"whole": floor, "held": floor.get("held"), "gain": gain, "gain_held": gain.get("held")}
        yield {"name": name} | {key: _without_held(part) for key, part in parts.items()}


def _without_held(part: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (part or {}).items() if key != "held"}


def _few(own: Mapping[str, Any]) -> Iterator[str]:
    """Warnings of halves with few images."""
    for half in HALVES:
        score = own.get("halves", {}).get(half, {}).get(F1)
        if score and (few := few_images(score["n"], half)):
            yield few


def _unscored(found: Concepts, names: Mapping[str, str]) -> list[Concept]:
    """The predicted concepts of a run without references, the most frequent first."""
    lists = [found.predicted[key] for key in found.ids]
    counted = per_concept(lists, [()] * len(lists), names)
    return sorted(counted, key=lambda one: (-one.predicted, one.cui))


def _row(concept: Concept, scored: bool) -> list[Any]:
    """CUI, name, support, predicted, correct, precision, recall, F1; without references, only `predicted`."""
    ratios = [one and round(one, 4) for one in (concept.precision, concept.recall, concept.f1)]
    counts = [concept.support, concept.predicted, concept.correct]
    return [
        concept.cui,
        concept.name,
        *(counts + ratios if scored else [None, concept.predicted, *[None] * 4]),
    ]


def _images(
    found: Concepts, cuis: Sequence[str], links: Mapping[str, str], thumbnails: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Each image with its true and predicted concepts as positions in the table, without absent fields."""
    place = {cui: position for position, cui in enumerate(cuis)}
    for key in found.ids:
        row = {
            "id": key,
            "true": [place[cui] for cui in found.true[key]] if key in found.true else None,
            "predicted": [place[cui] for cui in found.predicted[key]],
            "f1": found.f1.get(key),
            "image": links.get(key),
            "thumbnail": thumbnails.get(key),
        }
        yield {name: value for name, value in row.items() if value is not None}


def _notes(found: Concepts, images: Images | None, run: Run) -> Iterator[str]:
    """Notes on concepts that are missing or changed."""
    if not found.ids:
        yield "This run has no concepts of validation images yet."
        return
    if not found.true:
        why = run.record.get("unscored", {}).get("valid")
        yield (
            f"There are no references to compare with: {why}."
            if why
            else "These concepts have no scores yet."
        )
    if images is None:
        yield gallery.gone(run)
        return
    now = {key: set(example.cuis) for key, example in images.examples.items()}
    if changed := sum(now.get(key) != set(cuis) for key, cuis in found.true.items()):
        yield (
            "The data folder has changed since the run: "
            f"the concepts of {changed:,} of {len(found.true):,} images differ."
        )
