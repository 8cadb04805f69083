"""The content of a run's page, as JSON-like values."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from harness import records
from harness.config.schema import Config, flat
from harness.data.halves import HALVES
from harness.errors import UserError
from harness.pages import link
from harness.records.files import same_in
from harness.records.status import failure_of, status_of
from harness.report import concepts, examples, gallery, groups, sources
from harness.report.sources import Captions, Images, Run, main_scores, scores
from harness.scoring.compare import few_images, record_on_half
from harness.training import soups
from harness.training.profile import TABLE, TRACE
from harness.training.resume import LOSSES, SAMPLED, VALIDATION, described, losses_of, rows_of

REPORT = "report.html"
_POINTS = 400  # of one stage of a curve; a screen does not show more
_WHY = {"failed in": "step", "why": "reason", "what helps": "hint"}
_NO_SETTING = ("variant", "seed", "name")


def as_dict(run: Run, page: Path) -> dict[str, Any]:
    """The whole content of the page, as JSON-like values; links are relative to the folder `page`."""
    record = run.record
    images = sources.images(run)
    captions, curves, siblings = sources.captions(run, images), _curves(run), _siblings(run, page)
    detected, halves = sources.concepts(run), _halves(run)
    nearest = records.nearest_image(record, run.root)
    opening = _examples(captions, run)
    left_out = [f"left out: {problem}" for problem in dict.fromkeys(run.left_out)]
    same = [*same_in("valid", captions.after or captions.before), *record["data"].get("notes", ())]
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "experiment": record["name"],
        "run": run.name,
        "facts": _facts(record),
        "scores": _scores(record, nearest),
        "unscored": record.get("unscored", {}).get("valid"),
        "nearest": nearest and records.full_name(nearest),
        "main_metric": run.main_metric(),
        "image_gap": {
            name: gap for name, gap in (record["image_gap"] or {}).items() if isinstance(gap, dict)
        },
        "halves": halves,
        "baseline": record["baseline"],
        "warnings": list(dict.fromkeys([*record["warnings"], *same, *left_out])),
        "differences": differences(record),
        "from_base": from_base(record),
        "siblings": siblings,
        "config": yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True),
        "curves": curves,
        "untrained": _is_untrained(record["config"]) or not _has_model(record),
        "lengths": _lengths(captions),
        "steps": list(_steps(record)),
        "profile": {
            name: link(run.root / record["artifacts"][name], page)
            for name in (TABLE, TRACE)
            if name in record["artifacts"]
        },
        "data": _data_facts(record),
        "environment": record["environment"],
        "examples": opening,
        "groups": _groups(captions, images),
        "captions": gallery.shown(captions, images, run, page, [key for _, key in opening["chosen"]]),
        "tasks": records.tasks_of(record),
        "concepts": concepts.as_dict(detected, images, run, page, captions.ids),
    }


def _examples(captions: Captions, run: Run) -> dict[str, Any]:
    """The captions that open the page, (kind, id), and the metric by which the best and the worst are so."""
    main = run.main_metric()
    metric = main if main in captions.metrics else next(iter(captions.metrics), None)
    scores = {key: gallery.number(row.get(metric)) for key, row in captions.scored.items()}
    return {"metric": metric, "chosen": examples.chosen(captions.ids, scores)}


def _groups(captions: Captions, images: Images | None) -> dict[str, Any] | None:
    """Mean scores of the images of each modality and concept; None without scores or concepts."""
    cuis = {key: one.cuis for key, one in images.examples.items()} if images else {}
    scores = {
        key: {metric: gallery.number(row.get(metric)) for metric in captions.metrics}
        for key, row in captions.scored.items()
    }
    return groups.as_dict(scores, cuis, images.concept_names) if images else None


def _halves(run: Run) -> dict[str, Any] | None:
    """The scores and image gap of each half of validation, with warnings; None if there are no scores."""
    if not scores(run.record, "after"):
        return None
    try:
        if records.step_file(run.folder, run.record, "score-after", "arrays.npz") is None:
            return None
        on = {half: record_on_half(run.folder, run.record, half) for half in HALVES}
    except UserError as error:
        run.left_out.extend(map(str, error.problems))
        return None
    return {
        half: {
            "scores": scores(record, "after"),
            "image_gap": record["image_gap"]["rouge1"],
            "few": few_images(next(iter(scores(record, "after").values()))["n"], half),
        }
        for half, record in on.items()
    }


def _is_untrained(config: Mapping[str, Any]) -> bool:
    """Whether a run's model is the checkpoint as it is, or an average of weights of other runs."""
    return (config.get("train") or {}).get("stages") == [] or bool(config.get("soup"))


def _has_model(record: Mapping[str, Any]) -> bool:
    """Whether the run predicts with a model of its own; a consensus of other runs alone has none."""
    section = "concepts" if records.task_of(record) == records.CONCEPTS else "consensus"
    return (record["config"].get(section) or {}).get("own") != 0


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """The main facts of a run, by name."""
    git = record["git"]
    changed = " (with changes that were not committed)" if git["dirty"] else ""
    status = status_of(record, None)
    gone = " (its process has ended)" if status != record["status"] else ""
    return {
        "status": status + gone,
        **{name: (failure_of(record) or {}).get(key) for name, key in _WHY.items()},
        f"{records.task_of(record)} by": _by(record),
        "checkpoint": _checkpoint(record) if _has_model(record) else None,
        "best weights": described((record.get("training") or {}).get("best") or {}),
        "training": "; ".join(record.get("training", {}).get("notes", ())) or None,
        "weights": soups.described(record["soup"]) if record.get("soup") else None,
        "edition": record["edition"],
        "seed": record["seed"],
        "started": _moment(record["started"]),
        "ended": _moment(record["ended"]),
        "command": record["command"],
        "commit": git["commit"] and git["commit"] + changed,
        "submissions": ", ".join(record["submissions"]) or None,
    }


def _by(record: Mapping[str, Any]) -> str:
    if not record["standin_model"]:
        return "a real model"
    return "a stand-in model" + (", not the paper's" if records.task_of(record) == records.CAPTIONS else "")


def _checkpoint(record: Mapping[str, Any]) -> str | None:
    """The model's weights; a run of concepts alone uses those of the image encoder, if they are named."""
    model = record["config"].get("model", {})
    alone = records.task_of(record) == records.CONCEPTS
    return (alone and model.get("vision_checkpoint")) or model.get("checkpoint")


def _moment(text: str | None) -> str | None:
    return text and text.replace("T", " ").replace("+00:00", " UTC")


def _scores(record: Mapping[str, Any], nearest: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One row per metric: validation scores before and after post-processing, and those of baselines.

    `nearest` is the record of the captions of nearest training images.
    """
    before, after = scores(record, "before"), scores(record, "after")
    beside = {
        metric: score
        for metric, score in (scores(nearest, "after") if nearest else {}).items()
        if records.comparable(score, after.get(metric))
    }
    baseline = record["baseline"] or {}
    return [
        {
            "metric": metric,
            "before": before.get(metric),
            "after": after.get(metric),
            "baseline": baseline.get(metric),
            "baseline_official": metric not in baseline.get("standin", ()),
            "nearest": beside.get(metric),
        }
        for metric in dict.fromkeys([*before, *after])
    ]


def differences(record: Mapping[str, Any]) -> list[list[Any]]:
    """[key, the run's value, the schema's default] for each difference, in the schema's order.

    The default is None for a required key and for the keys of a section that is null by default.
    """
    required = {"name": "any", "edition": record["edition"], "data": {"root": ""}}
    defaults = flat(Config.model_validate(required)) | {"data.root": None}
    parameters = dict(record["parameters"])
    for key in defaults:
        if key.startswith("train.stages."):
            parameters.setdefault(key, None)  # the run may have fewer
    return [
        [key, value, defaults.get(key)]
        for key, value in parameters.items()
        if key not in _NO_SETTING and value != defaults.get(key)
    ]


def from_base(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The base's file and [key, the run's value, the base's] for each difference; None without a base."""
    base = record.get("base")
    if not base:
        return None
    ours, theirs = record["parameters"], base["parameters"]
    changed = [
        [key, ours.get(key), theirs.get(key)]
        for key in dict.fromkeys([*ours, *theirs])
        if key not in _NO_SETTING and ours.get(key) != theirs.get(key)
    ]
    return {"file": base["file"], "changed": changed}


def _siblings(run: Run, page: Path) -> dict[str, Any]:
    """All runs in this experiment's folder, and the keys in which they differ."""
    files = sorted(run.folder.resolve().parent.glob(f"*/{records.FILE}"))
    beside, left_out = records.read_all(files, sources.NEEDS)
    run.left_out.extend(map(str, left_out))
    found = [Run(folder, record) for folder, record in beside]
    every = dict.fromkeys(key for one in found for key in one.record["parameters"] if key not in _NO_SETTING)
    settings = [{key: one.record["parameters"].get(key) for key in every} for one in found]
    keys = [key for key in every if any(values[key] != settings[0][key] for values in settings)]
    metric = run.main_metric()
    return {
        "keys": keys,
        "runs": [
            {
                "run": one.name,
                "here": one.name == run.name,
                "status": status_of(one.record, None),
                "values": [values[key] for key in keys],
                "score": main_scores(one.record).get(metric),
                "link": link(one.folder / REPORT, page) if (one.folder / REPORT).exists() else None,
            }
            for one, values in zip(found, settings, strict=True)
        ],
    }


def _curves(run: Run) -> dict[str, Any]:
    """From `losses.jsonl`: training curves as points (step, value), validation rows, and stages."""
    rows = run.read("train", LOSSES, lambda file, _: rows_of(file))
    found = [{key: value for key, value in row.items() if value is not None} for row in rows]
    steps = [row for row in found if "loss" in row and "stage" in row]
    stages = {stage: [row for row in steps if row["stage"] == stage] for stage in {r["stage"] for r in steps}}
    size = max((math.ceil(len(part) / _POINTS) for part in stages.values()), default=1)
    names = [*losses_of(steps), *SAMPLED, "learning_rate"]
    train = {
        name: [point for part in stages.values() for point in _thinned(part, name, size)] for name in names
    }
    return {
        "train": {name: points for name, points in train.items() if points},
        "steps_per_point": size,
        "stages": [[stage, part[0]["step"]] for stage, part in sorted(stages.items())],
        "valid": [
            {key: row[key] for key in row if key.startswith(VALIDATION) or key in ("stage", "epoch", "step")}
            for row in found
            if "loss" not in row
        ],
    }


def _thinned(part: Sequence[Mapping[str, Any]], name: str, size: int) -> Iterator[list[float]]:
    """One stage's curve as means of `size` steps each."""
    points = [(row["step"], row[name]) for row in part if name in row]
    for at in range(0, len(points), size):
        group = points[at : at + size]
        yield [sum(column) / len(group) for column in zip(*group, strict=True)]


def _lengths(captions: Captions) -> dict[str, Any] | None:
    """A histogram of words per caption, in bins of `width` words from 0; None without captions."""
    texts = {"references": captions.references, "predictions": captions.after or captions.before}
    words = {name: [len(text.split()) for text in found.values()] for name, found in texts.items() if found}
    if not words:
        return None
    top = max(max(counts) for counts in words.values())
    width = max(top // 30, 1)
    bins = {name: Counter(count // width for count in counts) for name, counts in words.items()}
    return {
        "width": width,
        "counts": {name: [found[place] for place in range(top // width + 1)] for name, found in bins.items()},
        "mean": {name: sum(counts) / len(counts) for name, counts in words.items()},
    }


def _steps(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each step with folder, seconds, and the run that built it; a run reuses steps of earlier runs."""
    for name, folder in record["steps"].items():
        made = record["made"].get(name)
        own = name in record["seconds"]
        same = made is not None and made["command"] == record["command"]
        earlier = "an earlier run by the same command" if same else made and made["command"]
        by = made and ("this run" if own else earlier)
        commit = made and made["git"]["commit"]
        seconds = record["seconds"].get(name, made["seconds"] if made else None)
        yield {"step": name, "folder": folder, "seconds": seconds, "by": by, "commit": commit}


def _data_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    data = record["data"]
    splits = {f"{split} images": count for split, count in data["splits"].items()}
    prints = {f"{split} fingerprint": value for split, value in data["fingerprints"].items()}
    return {"root": data["root"], "layout": data["layout"], **splits, "left out": data["left_out"], **prints}
