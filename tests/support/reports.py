"""The files that a run leaves for its page, written by other code; and the data in a page."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from harness.config.schema import Config, flat
from support.small_sets import write_2023

METRICS = ("bertscore", "rouge1")
SIGNATURE = "bertscore|clef2023|microsoft/deberta-xlarge-mnli|layer:40|idf:no|rescale:no|fp32"
NAMES = {"C0000001": "Chest", "C0000002": "Skull", "C0000003": "Axial"}
Caption = dict[str, Any]


def captions(count: int) -> list[Caption]:
    """Captions whose scores are in another order than they are, and that share few words."""
    return [
        {
            "reference": f"Chest radiograph number {n} of the series",
            "before": f"chest radiograph {n} chest radiograph {n} chest radiograph {n} chest radiograph {n}",
            "after": f"Chest radiograph {n}.",
            "scores": [round((n * 7919 % count) / count, 6), round((n * 104729 % count) / count, 6)],
            "cuis": [list(NAMES)[n % 3]],
        }
        for n in range(count)
    ]


def score(value: float | None, **more: Any) -> dict[str, Any]:
    """A score of a record; None: one that is absent."""
    ends = {"low": None, "high": None} if value is None else {"low": value - 0.01, "high": value + 0.01}
    return {"value": value, "n": 3, "signature": SIGNATURE, "official": True, **ends} | more


def record(variant: str = "base", changes: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The record of a finished run; `changes` are of its config, `more` of the record."""
    config = Config.model_validate(
        {"name": "small", "variant": variant, "data": {"root": "data/small"}, **(changes or {})}
    )
    stage = {"bertscore": score(0.61), "rouge1": score(0.25), "bleurt": score(None, reason="no weights")}
    steps = ("train", "predict-valid", "postprocess-valid", "score-before", "score-after")
    found = {
        "name": "small",
        "variant": variant,
        "seed": 42,
        "status": "FINISHED",
        "pid": os.getpid(),
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-02T03:04:05+00:00",
        "command": "harness run small.yaml",
        "edition": 2023,
        "config": json.loads(config.model_dump_json()),
        "parameters": flat(config),
        "standin_model": False,
        "git": {"commit": "c0ffee" * 6, "dirty": True},
        "environment": {"torch": "2.13.0"},
        "data": {
            "root": "data/small",
            "layout": "imageclef2023",
            "fingerprints": {"valid": "1" * 12},
            "splits": {"valid": 3},
            "left_out": 0,
        },
        "steps": {step: f"steps/{step.partition('-')[0]}-{variant}-{step}" for step in steps},
        "made": {},
        "seconds": {"train": 12.5},
        "scores": {"valid": {"before": stage, "after": stage}},
        "image_gap": {
            "rouge1": {"value": 0.25, "permuted": 0.2, "gap": 0.05, "low": 0.01, "high": 0.09},
            "n": 3,
        },
        "baseline": {"caption": "A chest radiograph.", "rouge1": 0.17, "standin": []},
        "warnings": ["1 row with one caption empty after pre-processing: bertscore and rouge1 are 0 (row 2)"],
        "artifacts": {},
        "submissions": [],
    }
    return found | more


def table(file: Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    """A CSV file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as text:
        csv.writer(text, lineterminator="\n").writerows([header, *lines])


def write_run(
    project: Path, run: dict[str, Any], found: Sequence[Caption], ids: Sequence[str] | None = None
) -> Path:
    """What a run leaves on disk, by other means than the run's."""
    ids = ids or [f"valid_{n}" for n in range(len(found))]
    places = {name: project / "runs" / where for name, where in run["steps"].items()}
    for step, stage in (("predict-valid", "before"), ("postprocess-valid", "after")):
        if step in places:
            rows = [(key, caption[stage]) for key, caption in zip(ids, found, strict=True)]
            table(places[step] / "predictions.csv", ["ID", "caption"], rows)
    for stage in ("before", "after"):
        if f"score-{stage}" in places:
            rows = [(key, c["reference"], c[stage], *c["scores"]) for key, c in zip(ids, found, strict=True)]
            header = ["ID", "reference", "prediction", *METRICS]
            table(places[f"score-{stage}"] / "per_image.csv", header, rows)
    folder = project / "runs" / run["name"] / f"{run['variant']}-s{run['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder


def write_data(project: Path, found: Sequence[Caption]) -> Path:
    """A data set of small images in the 2023 layout."""
    root = project / "data" / "small"
    write_2023(root, [(caption["reference"], caption["cuis"]) for caption in found], "\n")
    lines = [f"{cui}\t{name}" for cui, name in NAMES.items()]
    next(root.glob("*cui_mapping.csv")).write_text("\n".join(lines) + "\n", encoding="utf-8")
    file = io.BytesIO()
    Image.new("L", (300, 150), 128).save(file, "JPEG")
    for image in (root / "valid").iterdir():
        image.write_bytes(file.getvalue())
    return root


def data_of(page: Path) -> dict[str, Any]:
    """The data that a page of a run shows."""
    text = page.read_text(encoding="utf-8").partition('type="application/json">')[2]
    return json.loads(text.partition("</script>")[0])
