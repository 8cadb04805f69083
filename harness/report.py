"""One run as a page: how it was made, how it trained, what it scores, and every caption beside its image.

The page is one file that needs neither network nor server. Captions, ids and names of concepts are untrusted
text: they travel as JSON, and the page only sets them as text. The page of an unfinished run says what is
missing.
"""

import base64
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from harness import records, store
from harness.captions import PREDICTIONS, same_in
from harness.config.editions import EDITIONS
from harness.config.schema import Config, flat
from harness.data.images import DAMAGE, decode, each
from harness.data.readers import Example, read
from harness.errors import UserError
from harness.pages import filled
from harness.tracking.server import failure_of, status_of
from harness.training.resume import LOSSES, losses_of, rows_of

REPORT = "report.html"
SIDE = 192
"""Pixels of a thumbnail's longer side."""
MOST_EMBEDDED = 1_000
"""Images that a page holds, 6 to 10 kB each; those of a larger set are shown from their files."""
_POINTS = 400  # of a curve's stage: more than a screen can tell apart
_WHY = {"failed in": "step", "why": "reason", "what helps": "hint"}
_NO_SETTING = ("variant", "seed", "name")
_NEEDS = (
    *("variant", "seed", "started", "ended", "parameters", "standin_model", "git", "environment", "data"),
    *("steps", "made", "seconds", "scores", "image_gap", "baseline", "warnings", "artifacts", "submissions"),
)
_CAPTION_COLUMNS = ("ID", "reference", "prediction")


@dataclass(frozen=True)
class Run:
    """A run's folder, what `run.json` says in it, and what can't be read and is left out."""

    folder: Path
    record: Mapping[str, Any]
    left_out: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`<variant>-s<seed>`, or what the user has renamed the folder to."""
        return self.folder.resolve().name

    @cached_property
    def root(self) -> Path:
        """The folder that holds `steps/` and the experiments."""
        return records.root(self.folder, self.record)

    def read(self, step: str, name: str, reader: Callable[[Path, records.Record], Any]) -> Any:
        """What a reader finds in a file of a step; empty where there is none that can be read."""
        try:
            file = records.step_file(self.folder, self.record, step, name)
            return reader(file, self.record) if file else {}
        except UserError as error:
            self.left_out.extend(str(problem) for problem in error.problems)
            return {}

    def main_metric(self) -> str | None:
        """The score that ranks in the run's edition, else the first one that it has."""
        scores = {m: s for m, s in _stage(self.record, "after").items() if s["value"] is not None}
        primary = EDITIONS[self.record["edition"]].primary
        return primary if primary in scores else next(iter(scores), None)


@dataclass(frozen=True)
class Captions:
    """The validation captions of a run by id; what the run has not come to is empty.

    Before and after post-processing, the rows of `per_image.csv` for each, and the references.
    """

    before: Mapping[str, str]
    after: Mapping[str, str]
    scored_before: Mapping[str, Mapping[str, str]]
    scored_after: Mapping[str, Mapping[str, str]]
    references: Mapping[str, str]

    @property
    def scored(self) -> Mapping[str, Mapping[str, str]]:
        """The rows of the last stage that was scored."""
        return self.scored_after or self.scored_before

    @property
    def ids(self) -> list[str]:
        """In the order of the data set."""
        return list(self.scored or self.after or self.before)

    @property
    def metrics(self) -> list[str]:
        """Those that have a number for each image."""
        return [name for name in next(iter(self.scored.values()), {}) if name not in _CAPTION_COLUMNS]


@dataclass(frozen=True)
class Images:
    """What the data folder says of the validation images as it lies there now: labels by id, and files."""

    examples: Mapping[str, Example]
    files: Mapping[str, Path]
    concept_names: Mapping[str, str]


def write(folder: Path, out: Path | None = None, say: Callable[[str], None] = lambda text: None) -> Path:
    """Write the page of the run in `folder`, by default to its `report.html`, and return the page's path.

    `say` hears of each file that the page leaves out, since it is not what the run left.

    A page in its default place is listed among the artifacts of a run that has ended, so that the next mirror
    takes it to MLflow. Raises `UserError` where there is no run.
    """
    run = _read(folder)
    page = out or folder / REPORT
    store.write(page, filled(REPORT, as_dict(run, page.parent)))
    for problem in dict.fromkeys(run.left_out):
        say(f"left out: {problem}")
    if out is None and run.record["status"] != "RUNNING":
        record = dict(_read(folder).record)
        record["artifacts"] |= {REPORT: f"{record['name']}/{run.name}/{REPORT}"}
        store.write_json(folder / "run.json", record)
    return page


def _read(folder: Path) -> Run:
    return Run(folder, records.read(folder, _NEEDS))


def as_dict(run: Run, page: Path) -> dict[str, Any]:
    """All that the page shows, as JSON-like values; links are relative to the folder `page`."""
    record = run.record
    images = _images(run)
    captions, curves, siblings = _captions(run, images), _curves(run), _siblings(run, page)
    left_out = [f"left out: {problem}" for problem in dict.fromkeys(run.left_out)]
    same = [*same_in("valid", captions.after or captions.before), *record["data"].get("notes", ())]
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "experiment": record["name"],
        "run": run.name,
        "facts": _facts(record),
        "scores": _scores(record),
        "main_metric": run.main_metric(),
        "image_gap": {
            name: gap for name, gap in (record["image_gap"] or {}).items() if isinstance(gap, dict)
        },
        "baseline": record["baseline"],
        "warnings": list(dict.fromkeys([*record["warnings"], *same, *left_out])),
        "differences": differences(record),
        "from_base": from_base(record),
        "siblings": siblings,
        "config": yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True),
        "curves": curves,
        "lengths": _lengths(captions),
        "steps": list(_steps(record)),
        "data": _data_facts(record),
        "environment": record["environment"],
        "captions": _shown(captions, images, run, page),
    }


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader asks first, by name."""
    git = record["git"]
    changed = " (with changes that were not committed)" if git["dirty"] else ""
    status = status_of(record, None)
    gone = " (its process is gone)" if status != record["status"] else ""
    return {
        "status": status + gone,
        **{name: (failure_of(record) or {}).get(key) for name, key in _WHY.items()},
        "captions by": "a stand-in model, not the paper's" if record["standin_model"] else "a real model",
        "checkpoint": record["config"].get("model", {}).get("checkpoint"),
        "edition": record["edition"],
        "seed": record["seed"],
        "started": _moment(record["started"]),
        "ended": _moment(record["ended"]),
        "command": record["command"],
        "commit": git["commit"] and git["commit"] + changed,
        "submissions": ", ".join(record["submissions"]) or None,
    }


def _moment(text: str | None) -> str | None:
    return text and text.replace("T", " ").replace("+00:00", " UTC")


def _stage(record: Mapping[str, Any], stage: str) -> Mapping[str, Mapping[str, Any]]:
    return record["scores"].get("valid", {}).get(stage, {})


def _scores(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a metric: the validation score before and after post-processing, and that of the constant."""
    before, after = _stage(record, "before"), _stage(record, "after")
    baseline = record["baseline"] or {}
    return [
        {
            "metric": metric,
            "before": before.get(metric),
            "after": after.get(metric),
            "baseline": baseline.get(metric),
            "baseline_official": metric not in baseline.get("standin", ()),
        }
        for metric in dict.fromkeys([*before, *after])
    ]


def differences(record: Mapping[str, Any]) -> list[list[Any]]:
    """[key, the run's value, the schema's default] where the two differ, in the schema's order.

    A required key has the default None, as have the keys of a section that is null by default.
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
    """The base experiment's file and [key, the run's value, the base's] where they differ, if it has one."""
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
    """The runs of the same experiment that lie beside this one, and the keys in which they differ."""
    files = sorted(run.folder.resolve().parent.glob(f"*/{records.FILE}"))
    beside, left_out = records.read_all(files, _NEEDS)
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
                "score": _stage(one.record, "after").get(metric),
                "link": _link(one.folder / REPORT, page) if (one.folder / REPORT).exists() else None,
            }
            for one, values in zip(found, settings, strict=True)
        ],
    }


def _link(path: Path, page: Path) -> str:
    return quote(os.path.relpath(path, page).replace(os.sep, "/"))


def _curves(run: Run) -> dict[str, Any]:
    """Points (step, value) of what `losses.jsonl` tells of training, its validation rows, and its stages."""
    rows = run.read("train", LOSSES, lambda file, _: rows_of(file))
    found = [{key: value for key, value in row.items() if value is not None} for row in rows]
    steps = [row for row in found if "loss" in row and "stage" in row]
    stages = {stage: [row for row in steps if row["stage"] == stage] for stage in {r["stage"] for r in steps}}
    size = max((math.ceil(len(part) / _POINTS) for part in stages.values()), default=1)
    names = [*losses_of(steps), "learning_rate"]
    train = {
        name: [point for part in stages.values() for point in _thinned(part, name, size)] for name in names
    }
    return {
        "train": {name: points for name, points in train.items() if points},
        "steps_per_point": size,
        "stages": [[stage, part[0]["step"]] for stage, part in sorted(stages.items())],
        "valid": [
            {key: row[key] for key in row if key.startswith("valid_") or key in ("stage", "epoch", "step")}
            for row in found
            if "loss" not in row
        ],
    }


def _thinned(part: Sequence[Mapping[str, Any]], name: str, size: int) -> Iterator[list[float]]:
    """Means of `size` steps each of one stage."""
    points = [(row["step"], row[name]) for row in part if name in row]
    for at in range(0, len(points), size):
        group = points[at : at + size]
        yield [sum(column) / len(group) for column in zip(*group, strict=True)]


def _captions(run: Run, images: Images | None) -> Captions:
    steps = ("predict-valid", "postprocess-valid")
    texts = [run.read(step, PREDICTIONS, records.captions) for step in steps]
    steps = ("score-before", "score-after")
    before, after = (run.read(step, "per_image.csv", records.per_image) for step in steps)
    references = {key: row["reference"] for key, row in (after or before).items()}
    if not references and images:
        labels = {key: images.examples[key].caption for key in texts[0] if key in images.examples}
        references = {key: caption for key, caption in labels.items() if caption is not None}
    return Captions(*texts, before, after, references)


def _images(run: Run) -> Images | None:
    """Looked for from here and from the folder in which runs/ lies; None where there are none."""
    data = run.record["data"]
    for root in (Path(data["root"]), run.root.parent / data["root"]):
        listing = read(root, data["layout"]) if root.is_dir() else None
        if listing and listing.splits.get("valid"):
            files = {key: file.path for (split, key), file in listing.files.items() if split == "valid"}
            return Images({e.id: e for e in listing.splits["valid"]}, files, listing.concept_names)
    return None


def _shown(captions: Captions, images: Images | None, run: Run, page: Path) -> dict[str, Any]:
    """The captions as the page lists them: absent things left out, concepts by their place in a list."""
    examples, files = (images.examples, images.files) if images else ({}, {})
    files = {key: files[key] for key in captions.ids if key in files}
    thumbnails = _thumbnails(files) if len(files) <= MOST_EMBEDDED else {}
    count = Counter(cui for key in captions.ids if key in examples for cui in examples[key].cuis)
    concepts = {cui: place for place, (cui, _) in enumerate(count.most_common())}
    listed = []
    for key in captions.ids:
        row = {
            "id": key,
            "reference": captions.references.get(key),
            "before": captions.before.get(key),
            "after": captions.after.get(key),
            "scores_before": _numbers(captions.scored_before.get(key), captions.metrics),
            "scores_after": _numbers(captions.scored_after.get(key), captions.metrics),
            "concepts": [concepts[cui] for cui in examples[key].cuis] if key in examples else None,
            "image": _link(files[key], page) if key in files else None,
            "thumbnail": thumbnails.get(key),
        }
        listed.append({name: value for name, value in row.items() if value is not None})
    names = images.concept_names if images else {}
    return {
        "metrics": captions.metrics,
        "concepts": [[cui, names.get(cui, cui), count[cui]] for cui in concepts],
        "rows": listed,
        "notes": list(_notes(captions, images, run, len(files), len(thumbnails))),
    }


def _notes(captions: Captions, images: Images | None, run: Run, found: int, embedded: int) -> Iterator[str]:
    """What to know of the captions and images shown, and of those that are not."""
    if not captions.ids:
        yield "This run has no validation captions yet."
        return
    if images is None:
        root = run.record["data"]["root"]
        yield f"The data folder {root} is not here, and with it images and names of concepts."
        return
    now = {key: example.caption for key, example in images.examples.items()}
    if changed := sum(now.get(key) != caption for key, caption in captions.references.items()):
        total = len(captions.references)
        yield f"The data folder has changed since the run: {changed:,} of {total:,} captions differ."
    if found > MOST_EMBEDDED:
        yield (
            f"{found:,} images are more than a page holds ({MOST_EMBEDDED:,}): they are shown from their "
            "files, as long as this page and the data stay where they are."
        )
    if missing := len(captions.ids) - (embedded if found <= MOST_EMBEDDED else found):
        yield f"{missing:,} of {len(captions.ids):,} images are missing or damaged."


def _numbers(row: Mapping[str, str] | None, metrics: Sequence[str]) -> list[float | None] | None:
    """Scores of one image with the digits that the page shows; None for one that is no number."""
    if row is None:
        return None
    values = [_number(row.get(metric)) for metric in metrics]
    return [round(value, 4) if math.isfinite(value) else None for value in values]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _thumbnails(files: Mapping[str, Path]) -> dict[str, str]:
    """Small JPEGs in base64 by id, of the images that can be read."""
    made = each(_thumbnail, list(files.values()))
    return {key: image for key, image in zip(files, made, strict=True) if image}


def _thumbnail(path: Path) -> str | None:
    try:
        image = decode(path)
    except DAMAGE:
        return None
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def _lengths(captions: Captions) -> dict[str, Any] | None:
    """How many captions have how many words, in bins of `width` words from 0 on; None without captions."""
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
    """Each step, its folder, its seconds, and by whom it was made: a run takes over what others made."""
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
