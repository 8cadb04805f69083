"""The page of a run: its contents, and what it reports as missing. For the browser see test_pages.py."""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import commands
from support.models import stages
from support.reports import captions, data_of, record, score, write_data, write_run
from support.small_sets import CAPTIONS

from harness import pages, report
from harness.cli import tables
from harness.errors import UserError
from harness.report import examples


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


def test_the_nearest_images_are_beside_the_constant_caption_if_they_were_scored_in_the_same_way(
    tmp_path, capsys, monkeypatch
):
    data = record()["data"] | {"fingerprints": {"train": "2" * 12, "valid": "1" * 12}}
    ours = record("ours", data=data)
    folder = write_run(tmp_path, ours, captions(3))
    assert data_of(report.write(folder))["nearest"] is None
    after = {"bertscore": score(0.5), "rouge1": score(0.7, signature="another"), "bleurt": score(0.3)}
    near = {"retrieval": {"neighbours": 1}}
    new = {"data": data, "scores": {"valid": {"after": after}}}
    others = {
        "near": record("near", near, **new),
        "older": record("older", near, **new | {"ended": "2025-01-01T00:00:00+00:00"}),
        "many": record("many", {"retrieval": {"neighbours": 2}}, **new),
        "failed": record("failed", near, **new | {"status": "FAILED"}),
        "elsewhere": record("elsewhere", near, **new | {"data": record()["data"]}),
    }
    for one in others.values():
        write_run(tmp_path, one | {"ended": one["ended"].replace("2026-01-02", "2026-01-03")}, captions(3))
    page = data_of(report.write(folder))
    assert page["nearest"] == "small/near-s42"
    found = {row["metric"]: row["nearest"] and row["nearest"]["value"] for row in page["scores"]}
    assert found == {"bertscore": 0.5, "rouge1": None, "bleurt": None}
    assert data_of(report.write(folder.with_name("near-s42")))["nearest"] == "small/older-s42"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    tables.show([ours])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ nearest image")]
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["0.5000", "", ""]
    tables.show([ours, others["near"]])
    assert "nearest image" not in capsys.readouterr().out


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
    assert page["facts"]["status"] == "KILLED (its process has ended)"
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


@pytest.mark.ci
def test_the_picture_of_the_examples_is_an_artifact_and_is_written_again_only_if_it_changes(tmp_path):
    found = captions(9)
    for caption in found:
        caption["after"] = "costs $5 and $6 \\frac{ \u202e \u80f8 " + "longer " * 99  # no formula, no end
    write_data(tmp_path, found)
    folder = write_run(tmp_path, record(), found)
    report.write(folder)
    artifacts = json.loads((folder / "run.json").read_text())["artifacts"]
    picture = tmp_path / "runs" / artifacts["captions.png"]
    before = picture.stat().st_mtime_ns
    with Image.open(picture) as image:
        assert image.height > 6 * 150
    report.write(folder)
    assert picture.stat().st_mtime_ns == before
    found[0]["reference"] = found[0]["after"] = "another caption"
    report.write(write_run(tmp_path, record(), found))
    assert picture.stat().st_mtime_ns != before


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


def test_a_page_opens_with_the_best_the_worst_and_two_at_random(tmp_path):
    found = captions(30)
    opening = data_of(report.write(write_run(tmp_path, record(), found)))["examples"]
    order = sorted(range(30), key=lambda n: -found[n]["scores"][0])
    assert opening["metric"] == "bertscore"
    kinds, ids = zip(*opening["chosen"], strict=True)
    assert kinds == ("best", "best", "worst", "worst", "random", "random")
    assert ids[:4] == tuple(f"valid_{n}" for n in (*order[:2], order[-1], order[-2]))
    assert len(set(ids)) == 6
    again = data_of(report.write(tmp_path / "runs" / "small" / "base-s42"))["examples"]
    assert again == opening, "the same ones in every page"


@pytest.mark.parametrize("count", range(8))
def test_few_images_are_each_shown_once(count):
    ids = [f"i{n}" for n in range(count)]
    scores = {key: n / 10 for n, key in enumerate(ids)}
    for given, kinds in ((scores, {"best", "worst", "random"}), ({}, {"random"})):
        found = examples.chosen(ids, given)
        assert len(found) == len({key for _, key in found}) == min(count, 6)
        assert {kind for kind, _ in found} <= kinds


def test_the_means_of_modalities_and_concepts_are_those_of_numpy(tmp_path):
    found = captions(40)
    xray, other = "C1306645", "C0000002"
    for n, caption in enumerate(found):
        caption["cuis"] = [xray, other] if n % 3 == 0 else [other] if n % 3 == 1 else []
    found[1]["scores"][1] = ""
    write_data(tmp_path, found)
    groups = data_of(report.write(write_run(tmp_path, record(), found)))["groups"]
    assert groups["metrics"] == ["bertscore", "rouge1"]
    first = {row["name"]: row for row in groups["modalities"]}
    assert {name: row["n"] for name, row in first.items()} == {"X-ray": 14, "other/unknown": 26}
    second = {row["name"]: row for row in groups["concepts"]}
    assert {name: row["n"] for name, row in second.items()} == {"Skull": 27, "C1306645": 14}
    values = np.array([caption["scores"][0] for caption in found[::3]])
    mean, low, high = first["X-ray"]["scores"][0]
    assert mean == pytest.approx(values.mean())
    random = np.random.default_rng(3)
    drawn = values[random.integers(14, size=(4_000, 14))].mean(axis=1)
    assert [low, high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
    assert second["Skull"]["scores"][1] is None, "an image of it has no such score"
    assert second["C1306645"]["scores"] == first["X-ray"]["scores"]


def test_without_concepts_or_scores_there_are_no_groups(tmp_path):
    found = [caption | {"cuis": []} for caption in captions(3)]
    write_data(tmp_path, found)
    assert data_of(report.write(write_run(tmp_path, record(), found)))["groups"] is None
    run = record("unscored", scores={}, image_gap=None, baseline=None)
    run["steps"] = {"predict-valid": run["steps"]["predict-valid"]}
    page = data_of(report.write(write_run(tmp_path, run, found)))
    assert (page["groups"], page["examples"]["metric"]) == (None, None)
    assert [kind for kind, _ in page["examples"]["chosen"]] == ["random"] * 3


def test_a_score_that_is_no_number_is_absent(tmp_path):
    found = captions(2)
    found[0]["scores"], found[1]["scores"] = ["nan", 0.5], ["", 0.25]
    rows = data_of(report.write(write_run(tmp_path, record(), found)))["captions"]["rows"]
    assert [row["scores_after"] for row in rows] == [[None, 0.5], [None, 0.25]]


def test_no_run_is_a_mistake_with_the_runs_that_there_are(tmp_path):
    assert "make some: harness run" in harness(tmp_path, "report", "runs/none", code=2)
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
    text = "".join((templates / name).read_text(encoding="utf-8") for name in ("common.css", "report.css"))
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
        assert contrast(colours["ink"], colours["tint"]) >= 4.5, "words that are marked"
