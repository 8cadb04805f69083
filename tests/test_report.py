"""The page of a run: what it holds, and what it says is missing. How it works in a browser: test_pages.py."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from models import stages
from PIL import Image
from small_sets import CAPTIONS, write_2023
from support import commands

from harness import pages, report
from harness.config.schema import Config, flat
from harness.errors import UserError

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
    ends = {"low": None, "high": None} if value is None else {"low": value - 0.01, "high": value + 0.01}
    return {"value": value, "n": 3, "signature": SIGNATURE, "official": True, **ends} | more


def record(variant: str = "base", changes: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
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
        "command": "python -m harness run small.yaml",
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
    text = page.read_text(encoding="utf-8").partition('type="application/json">')[2]
    return json.loads(text.partition("</script>")[0])


def harness(folder: Path, *arguments: str, code: int = 0) -> str:
    done = commands.harness(folder, *arguments, code=code)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_what_differs_from_the_defaults_and_from_the_runs_beside_it(tmp_path):
    changes = {"train": {"batch_size": 256, "stages": stages(7, 20)}, "postprocess": {"deduplicate": True}}
    ours = write_run(tmp_path, record("ours", changes), captions(3))
    write_run(
        tmp_path,
        record("other", changes | {"postprocess": {"deduplicate": False}}, status="FAILED"),
        captions(3),
    )
    (ours.parent / "other-s42" / "report.html").write_text("")
    page = data_of(report.write(ours))
    assert page["differences"] == [
        ["data.root", "data/small", None],
        ["train.stages.0.epochs", 7, 50],
        ["train.batch_size", 256, 128],
        ["postprocess.deduplicate", True, False],
    ]
    assert page["siblings"]["keys"] == ["postprocess.deduplicate"]
    found = {
        one["run"]: (one["here"], one["status"], one["values"], one["link"])
        for one in page["siblings"]["runs"]
    }
    assert found == {
        "ours-s42": (True, "FINISHED", [True], None),
        "other-s42": (False, "FAILED", [False], "../other-s42/report.html"),
    }


def test_what_differs_from_the_base_experiment(tmp_path):
    base = {"file": "paper.yaml", "parameters": record("any")["parameters"]}
    changes = {"train": {"batch_size": 256}, "postprocess": {"deduplicate": True}}
    page = data_of(report.write(write_run(tmp_path, record("ours", changes) | {"base": base}, captions(3))))
    assert page["from_base"] == {
        "file": "paper.yaml",
        "changed": [["train.batch_size", 256, 128], ["postprocess.deduplicate", True, False]],
    }


def test_a_run_that_has_just_begun_has_a_page_that_says_so(tmp_path):
    empty = {
        "status": "RUNNING",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": {},
        "seconds": {},
        "scores": {},
        "image_gap": None,
        "baseline": None,
    }
    folder = write_run(tmp_path, record(**empty, warnings=[], ended=None), [])
    before = (folder / "run.json").read_bytes()
    page = data_of(report.write(folder))
    assert page["facts"]["status"] == "RUNNING"
    assert page["captions"]["notes"] == ["This run has no validation captions yet."]
    assert page["curves"]["train"] == {}
    assert page["lengths"] is None
    assert (folder / "run.json").read_bytes() == before, "a run that goes on writes it itself"


def test_a_run_without_scores_yet_has_its_captions_and_the_references_of_the_data(tmp_path):
    found = captions(3)
    write_data(tmp_path, found)
    run = record(status="RUNNING", pid=2**22 + 1, scores={}, image_gap=None, baseline=None)
    run["steps"] = {"predict-valid": run["steps"]["predict-valid"]}
    page = data_of(report.write(write_run(tmp_path, run, found)))
    assert page["facts"]["status"] == "KILLED (its process is gone)"
    rows = page["captions"]["rows"]
    assert [(row["before"], row["reference"]) for row in rows] == [
        (c["before"], c["reference"]) for c in found
    ]
    assert all("after" not in row and "scores_after" not in row for row in rows)


def test_a_run_whose_data_is_gone_has_its_captions_and_a_sentence(tmp_path):
    found = captions(3)
    page = data_of(report.write(write_run(tmp_path, record(), found)))
    (note,) = page["captions"]["notes"]
    assert "data/small is not here" in note
    assert [row["reference"] for row in page["captions"]["rows"]] == [c["reference"] for c in found]
    assert all("thumbnail" not in row and "image" not in row for row in page["captions"]["rows"])


def test_missing_and_damaged_images_and_changed_captions_are_told(tmp_path):
    found = captions(4)
    root = write_data(tmp_path, found)
    (root / "valid" / "valid_0.jpg").unlink()
    (root / "valid" / "valid_1.jpg").write_bytes(b"not an image")
    labels = root / CAPTIONS.format("valid")
    labels.write_text(labels.read_text().replace("number 3", "number three"))
    page = data_of(report.write(write_run(tmp_path, record(), found)))
    assert page["captions"]["notes"] == [
        "The data folder has changed since the run: 1 of 4 captions differ.",
        "2 of 4 images are missing or damaged.",
    ]
    rows = page["captions"]["rows"]
    assert [("image" in row, "thumbnail" in row) for row in rows] == [
        (False,) * 2,
        (True, False),
        *[(True,) * 2] * 2,
    ]
    assert rows[3]["reference"] == found[3]["reference"], "the one that was scored"


def test_only_a_page_in_its_place_is_listed_for_mlflow(tmp_path):
    folder = write_run(tmp_path, record(), captions(2))
    elsewhere = report.write(folder, tmp_path / "pages" / "one.html")
    assert elsewhere == tmp_path / "pages" / "one.html"
    assert json.loads((folder / "run.json").read_text())["artifacts"] == {}
    report.write(folder)
    kept = json.loads((folder / "run.json").read_text())
    assert kept == record() | {"artifacts": {"report.html": "small/base-s42/report.html"}}


def test_long_curves_keep_their_means_and_their_stages(tmp_path):
    run = record()
    folder = write_run(tmp_path, run, captions(2))
    losses = tmp_path / "runs" / run["steps"]["train"] / "losses.jsonl"
    losses.parent.mkdir()
    rows = [
        {"step": n + 1, "stage": 1 + (n >= 6000), "epoch": n / 100, "loss": 6 - n / 2000}
        for n in range(10_000)
    ]
    rows.insert(6000, {"step": 6000, "stage": 1, "epoch": 60, "valid_loss": 3.25})
    losses.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10001, "sta')
    curves = data_of(report.write(folder))["curves"]
    points = curves["train"]["loss"]
    assert curves["steps_per_point"] == 15
    assert len(points) == 400 + 267
    assert points[0] == pytest.approx([8, 6 - 7 / 2000])
    assert [step for step, _ in points] == sorted(step for step, _ in points)
    assert curves["stages"] == [[1, 1], [2, 6001]]
    assert curves["valid"] == [{"step": 6000, "stage": 1, "epoch": 60, "valid_loss": 3.25}]


def test_captions_that_are_all_the_same_are_warned_of(tmp_path):
    found = [caption | {"after": "An x-ray."} for caption in captions(3)]
    page = data_of(report.write(write_run(tmp_path, record(), found)))
    assert page["warnings"] == [*record()["warnings"], "valid: all 3 captions are the same: 'An x-ray.'"]
    page = data_of(report.write(write_run(tmp_path, record(), captions(3))))
    assert page["warnings"] == record()["warnings"]


def test_a_score_that_is_no_number_is_absent(tmp_path):
    found = captions(2)
    found[0]["scores"], found[1]["scores"] = ["nan", 0.5], ["", 0.25]
    rows = data_of(report.write(write_run(tmp_path, record(), found)))["captions"]["rows"]
    assert [row["scores_after"] for row in rows] == [[None, 0.5], [None, 0.25]]


def test_no_run_is_a_mistake_with_the_runs_that_there_are(tmp_path):
    assert "make some: python -m harness run" in harness(tmp_path, "report", "runs/none", code=2)
    write_run(tmp_path, record(), captions(2))
    text = harness(tmp_path, "report", "runs/small", code=2)
    assert "runs/small: not a run: it has no run.json" in text
    assert "Runs: runs/small/base-s42" in text
    broken = tmp_path / "runs" / "small" / "base-s42"
    (broken / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not what a run writes"):
        report.write(broken)


def palettes() -> Iterator[dict[str, str]]:
    """The colours of the page, in light and in dark."""
    templates = Path(pages.__file__).parent
    text = "".join((templates / name).read_text(encoding="utf-8") for name in ("common.html", "report.html"))
    dark = re.findall(r"prefers-color-scheme: dark\) \{ :root \{(.*?)\} \}", text, re.DOTALL)
    light = [one for one in re.findall(r":root \{(.*?)\}", text, re.DOTALL) if one not in dark]
    for found in (light, dark):
        yield dict(re.findall(r"--(\w+): (#\w+)", " ".join(found)))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, 1.4.3."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_have_the_contrast_of_aa_in_light_and_dark():
    light, dark = palettes()
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for ink in ("ink", "soft", "ours", "one", "two", "three", "gone", "focus"):
            assert contrast(colours[ink], colours["paper"]) >= 4.5, ink
        for ink in ("ink", "soft", "gone"):
            assert contrast(colours[ink], colours["raised"]) >= 4.5, ink
