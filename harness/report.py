"""One run as a page: how it was made, how it trained, what it scores, and every caption beside its image.

The page is one file that needs neither network nor server. Captions, ids and names of concepts are untrusted
text: they travel as JSON, and the page only ever sets them as text. A run that is not finished, or whose data
is gone, has a page of what is there, which says what is not.
"""

import base64
import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from harness import store
from harness.captions import PREDICTIONS, read_captions
from harness.config import Config, flat
from harness.data.images import DAMAGE, decode, each
from harness.data.readers import Listing, read
from harness.editions import EDITIONS
from harness.errors import Problem, UserError
from harness.tracking.contents import rows
from harness.tracking.server import status_of

REPORT = "report.html"
SIDE = 192
"""Pixels of a thumbnail's longer side."""
MOST_EMBEDDED = 1_000
"""Images that a page holds, 6 to 10 kB each; those of a larger set are shown from their files."""
_POINTS = 400  # of a curve's stage: more than a screen can tell apart
_TRAIN = ("loss", "caption_loss", "concept_loss", "learning_rate")
_NO_SETTING = ("variant", "seed")
_CAPTION_COLUMNS = ("ID", "reference", "prediction")


@dataclass(frozen=True)
class Run:
    """A run's folder and what `run.json` says in it."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """`<variant>-s<seed>`."""
        return f"{self.record['variant']}-s{self.record['seed']}"

    @cached_property
    def root(self) -> Path:
        """The folder that holds `steps/` and the experiments."""
        return self.folder.resolve().parents[len(Path(self.record["name"]).parts)]

    def file(self, step: str, name: str) -> Path | None:
        """A file that a step has left; None where there is no step or no file yet."""
        folder = self.record["steps"].get(step)
        path = self.root / folder / name if folder else None
        return path if path and path.is_file() else None

    def main_metric(self) -> str | None:
        """The score that ranks in the run's edition, else the first one that it has."""
        scores = {m: s for m, s in _stage(self.record, "after").items() if s["value"] is not None}
        primary = EDITIONS[self.record["edition"]].primary
        return primary if primary in scores else next(iter(scores), None)


@dataclass
class Captions:
    """The validation captions of a run with all that is known of them; `notes` say what is not."""

    ids: list[str] = field(default_factory=list)
    before: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
    scored: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """The metrics that have a number for each image."""
        table = self.scored["after"] or self.scored["before"]
        return [name for name in next(iter(table.values()), {}) if name not in _CAPTION_COLUMNS]


def write(folder: Path, out: Path | None = None) -> Path:
    """Write the page of the run in `folder`, by default to its `report.html`, and return the page's path.

    A page in its default place is listed among the artifacts of a run that has ended, so that the next mirror
    takes it to MLflow. Raises `UserError` where there is no run.
    """
    run = _read(folder)
    page = out or folder / REPORT
    store.write(page, _filled(as_dict(run, page.parent)))
    if out is None and run.record["status"] != "RUNNING":
        record = dict(_read(folder).record)
        record["artifacts"] |= {REPORT: f"{record['name']}/{run.name}/{REPORT}"}
        store.write_json(folder / "run.json", record)
    return page


def _read(folder: Path) -> Run:
    file = folder / "run.json"
    try:
        return Run(folder, json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError([Problem("not a run: it has no run.json", folder, hint=_runs_near(folder))]) from None
    except ValueError as error:
        raise UserError([Problem(f"not the record of a run: {error}", file)]) from None


def _runs_near(folder: Path) -> str:
    """The runs below the folder, or else below runs/, for someone who gave another folder."""
    for place in (folder, Path("runs")):
        if found := sorted(str(file.parent) for file in place.rglob("run.json")):
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            return f"Runs: {', '.join(found[:8])}{more}"
    return "There are no runs yet; make some: python -m harness run experiments/quickstart.yaml"


def _filled(data: Mapping[str, Any]) -> str:
    """The page's template with its style, scripts and data."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    # "</script>" in a JSON string would end the element, "<!--" hide its end
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    templates = files("harness").joinpath("templates")
    common, page = (templates.joinpath(name).read_text("utf-8") for name in ("common.html", REPORT))
    return page.replace("{{common}}", common).replace("{{data}}", text)


def as_dict(run: Run, page: Path) -> dict[str, Any]:
    """All that the page shows, as JSON-like values; links are relative to the folder `page`."""
    record = run.record
    captions, listing = _captions(run)
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
        "warnings": record["warnings"],
        "differences": differences(record),
        "siblings": _siblings(run, page),
        "config": yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True),
        "curves": _curves(run),
        "lengths": _lengths(captions),
        "steps": list(_steps(record)),
        "data": _data_facts(record),
        "environment": record["environment"],
        "captions": _shown(captions, listing, page, run.record),
    }


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader asks first, by name."""
    git = record["git"]
    changed = " (with changes that were not committed)" if git["dirty"] else ""
    status = status_of(record, None)
    gone = " (its process is gone)" if status != record["status"] else ""
    return {
        "status": status + gone,
        "captions by": "a stand-in model, not the paper's" if record["standin_model"] else "a real model",
        "checkpoint": record["config"]["model"]["checkpoint"],
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
    required = {"name": record["name"], "edition": record["edition"], "data": {"root": ""}}
    defaults = flat(Config.model_validate(required)) | {"data.root": None}
    return [
        [key, value, defaults.get(key)]
        for key, value in record["parameters"].items()
        if key not in ("name", *_NO_SETTING) and value != defaults.get(key)
    ]


def _siblings(run: Run, page: Path) -> dict[str, Any]:
    """The runs of the same experiment that lie beside this one, and the keys in which they differ."""
    found = [_read(file.parent) for file in sorted(run.folder.resolve().parent.glob("*/run.json"))]
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
    found = list(rows(run.record, run.root))
    steps = [row for row in found if "valid_loss" not in row]
    stages = {stage: [row for row in steps if row["stage"] == stage] for stage in {r["stage"] for r in steps}}
    size = max((math.ceil(len(part) / _POINTS) for part in stages.values()), default=1)
    train = {
        name: [point for part in stages.values() for point in _thinned(part, name, size)] for name in _TRAIN
    }
    return {
        "train": {name: points for name, points in train.items() if points},
        "steps_per_point": size,
        "stages": [[stage, part[0]["step"]] for stage, part in sorted(stages.items())],
        "valid": [
            {key: row[key] for key in row if key.startswith("valid_") or key in ("stage", "epoch", "step")}
            for row in found
            if "valid_loss" in row
        ],
    }


def _thinned(part: Sequence[Mapping[str, Any]], name: str, size: int) -> Iterator[list[float]]:
    """Means of `size` steps each of one stage."""
    points = [(row["step"], row[name]) for row in part if name in row]
    for at in range(0, len(points), size):
        group = points[at : at + size]
        yield [sum(column) / len(group) for column in zip(*group, strict=True)]


def _captions(run: Run) -> tuple[Captions, Listing | None]:
    """The validation captions, and the data set as it lies there now; None where it is gone."""
    captions = Captions()
    names = {"before": "predict-valid", "after": "postprocess-valid"}
    found = {stage: run.file(step, PREDICTIONS) for stage, step in names.items()}
    captions.before, captions.after = (read_captions(file) if file else {} for file in found.values())
    captions.scored = {stage: _per_image(run.file(f"score-{stage}", "per_image.csv")) for stage in names}
    scored = captions.scored["after"] or captions.scored["before"]
    captions.ids = list(scored or captions.after or captions.before)
    captions.references = {key: row["reference"] for key, row in scored.items()}
    if not captions.ids:
        captions.notes.append("This run has no validation captions yet.")
        return captions, None
    listing = _listing(run)
    if listing is None:
        captions.notes.append(
            f"The data folder {run.record['data']['root']} is not here: there are no images and no concepts."
        )
        return captions, None
    now = {example.id: example.caption for example in listing.splits["valid"]}
    captions.references = captions.references or {key: now[key] for key in captions.ids if now.get(key)}
    changed = sum(now.get(key) != caption for key, caption in captions.references.items())
    if changed:
        captions.notes.append(
            f"The data folder has changed since: {changed} captions are other ones now, and images may be too."
        )
    return captions, listing


def _per_image(file: Path | None) -> dict[str, dict[str, str]]:
    if file is None:
        return {}
    with file.open(encoding="utf-8", newline="") as text:
        return {row["ID"]: row for row in csv.DictReader(text)}


def _listing(run: Run) -> Listing | None:
    """The data set's label files and images, looked for from here and from where runs/ lies."""
    data = run.record["data"]
    for root in (Path(data["root"]), run.root.parent / data["root"]):
        if root.is_dir():
            listing = read(root, data["layout"])
            if listing.splits.get("valid"):
                return listing
    return None


def _shown(
    captions: Captions, listing: Listing | None, page: Path, record: Mapping[str, Any]
) -> dict[str, Any]:
    """The captions as the page lists them: concepts by their place in a list, absent things left out."""
    examples = {example.id: example for example in listing.splits["valid"]} if listing else {}
    names = listing.concept_names if listing else {}
    concepts = Counter(cui for key in captions.ids if key in examples for cui in examples[key].cuis)
    order = {cui: place for place, (cui, _) in enumerate(concepts.most_common())}
    images = {key: listing.files[("valid", key)].path for key in examples if ("valid", key) in listing.files}
    thumbnails = _thumbnails(captions, images) if listing else {}
    metrics, listed = captions.metrics, []
    for key in captions.ids:
        row: dict[str, Any] = {
            "id": key,
            "reference": captions.references.get(key),
            "before": captions.before.get(key),
            "after": captions.after.get(key),
            "concepts": [order[cui] for cui in examples[key].cuis] if key in examples else None,
            "image": _link(images[key], page) if key in images else None,
            "thumbnail": thumbnails.get(key),
        }
        for stage, table in captions.scored.items():
            row[f"scores_{stage}"] = [_number(table[key].get(m)) for m in metrics] if key in table else None
        listed.append({name: value for name, value in row.items() if value is not None})
    return {
        "metrics": metrics,
        "concepts": [[cui, names.get(cui, cui), concepts[cui]] for cui in order],
        "rows": listed,
        "notes": captions.notes,
    }


def _number(text: str | None) -> float | None:
    value = float(text) if text else math.nan
    return round(value, 4) if math.isfinite(value) else None


def _thumbnails(captions: Captions, images: Mapping[str, Path]) -> dict[str, str]:
    """Small JPEGs in base64 by id, none where they are too many; says so, and what is missing."""
    wanted = [key for key in captions.ids if key in images]
    small: dict[str, str] = {}
    if len(wanted) > MOST_EMBEDDED:
        captions.notes.append(
            f"{len(wanted):,} images are more than a page can hold ({MOST_EMBEDDED:,}): they are shown from "
            "their files, as long as this page and the data stay where they are."
        )
    else:
        made = each(_thumbnail, [images[key] for key in wanted])
        small = {key: image for key, image in zip(wanted, made, strict=True) if image}
    missing = len(captions.ids) - (len(small) if len(wanted) <= MOST_EMBEDDED else len(wanted))
    if missing:
        captions.notes.append(f"{missing:,} images are missing or damaged.")
    return small


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
    """How many captions have how many words, in bins of `width` words from 0 on."""
    predictions = captions.after or captions.before
    texts = {"references": captions.references, "predictions": predictions}
    words = {
        name: [len(found[key].split()) for key in captions.ids if key in found]
        for name, found in texts.items()
    }
    top = max((max(counts) for counts in words.values() if counts), default=None)
    if top is None:
        return None
    width = max(top // 30, 1)
    bins = {name: Counter(count // width for count in counts) for name, counts in words.items() if counts}
    return {
        "width": width,
        "counts": {name: [found[place] for place in range(top // width + 1)] for name, found in bins.items()},
        "mean": {name: sum(words[name]) / len(words[name]) for name in bins},
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
