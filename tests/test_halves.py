"""The halves of a split: fixed by the id, about equal, and with scores of their own."""

import contextlib
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import harness
from typer.testing import CliRunner

from harness import metrics, records
from harness.cli import app
from harness.data.halves import HALVES, HELD, TUNE, half
from harness.metrics.settings import ScoreConfig
from harness.scoring.compare import System, few_images, on_half, record_on_half
from harness.tracking.contents import scores_of

GOLDEN = Path(__file__).parent / "golden" / "pairs.csv"
STUDY = """
base: small.yaml
variant: opt
half: tune
objective: [rouge1]
overrides: {score: {metrics: [bertscore, rouge1]}}
space: {postprocess.deduplicate: {choices: [false, true]}}
sampler: {name: grid}
"""


def test_the_half_of_an_id_never_changes():
    """Else a run that was tuned on one half would be reported on images that it was tuned on."""
    ids = [f"ImageCLEFmedCaption_2023_valid_{number:06d}" for number in range(6)]
    assert [half(image) for image in ids] == [TUNE, HELD, HELD, TUNE, TUNE, HELD]


def test_each_half_has_about_half_of_the_images():
    halves = [half(f"image{number}") for number in range(10_000)]
    assert set(halves) == {TUNE, HELD}
    assert abs(halves.count(TUNE) - 5_000) < 200


@pytest.fixture(scope="module")
def whole() -> tuple[System, dict[str, tuple[str, str]]]:
    """All golden pairs as one system, with a metric of each kind; and the pairs by id."""
    with GOLDEN.open(newline="", encoding="utf-8") as lines:
        pairs = {row["ID"]: (row["prediction"], row["reference"]) for row in csv.DictReader(lines)}
    config = ScoreConfig(metrics=("rouge1", "bleu1", "cider"))
    scores, _ = metrics.score(*zip(*pairs.values(), strict=True), None, config, 2023, ids=list(pairs))
    return System("all", list(pairs), "same", {n: s for n, s in scores.items() if n != "cider_ptb"}), pairs


@pytest.mark.parametrize("wanted", HALVES)
def test_scores_of_a_half_are_those_of_its_captions_scored_alone(whole, wanted):
    system, pairs = whole
    found = on_half(system, wanted)
    own = [pair for image, pair in pairs.items() if half(image) == wanted]
    assert 0 < len(own) < len(pairs)
    config = ScoreConfig(metrics=("rouge1", "bleu1"))
    alone, _ = metrics.score(*zip(*own, strict=True), None, config, 2023)
    for name, score in alone.items():
        assert found.scores[name].value == pytest.approx(score.value, abs=1e-12)
        assert (found.scores[name].low, found.scores[name].high) == pytest.approx((score.low, score.high))
        assert found.scores[name].n == len(own)
        assert found.scores[name].official == system.scores[name].official


def test_cider_of_a_half_keeps_the_document_frequencies_of_all_references(whole):
    system, pairs = whole
    rows = [half(image) == HELD for image in pairs]
    value = on_half(system, HELD).scores["cider"].value
    assert value == pytest.approx(system.scores["cider"].per_image[rows].mean(), abs=1e-12)
    own = [pair for pair, kept in zip(pairs.values(), rows, strict=True) if kept]
    config = ScoreConfig(metrics=("cider",))
    alone, _ = metrics.score(*zip(*own, strict=True), None, config, 2023)
    assert value != pytest.approx(alone["cider"].value, abs=1e-3)


def test_a_mean_of_metrics_follows_its_parts_on_a_half(whole):
    system, _ = whole
    parts = [system.scores[name] for name in ("rouge1", "cider")]
    mean = np.mean([part.per_image for part in parts], axis=0)
    both = {"overall": metrics.Score("overall", float(mean.mean()), 0, 1, 1, "", True, 0.0, per_image=mean)}
    found = on_half(System("a", system.ids, "same", {**system.scores, **both}), TUNE).scores
    assert found["overall"].value == pytest.approx((found["rouge1"].value + found["cider"].value) / 2)


def test_a_score_without_numbers_or_images_is_absent_with_a_reason(whole):
    system, _ = whole
    bare = metrics.Score("rouge1", 0.5, None, None, 2, "rouge1|clef2023", True, 0.0)
    found = on_half(System("a", system.ids, "same", {"rouge1": bare}), TUNE).scores["rouge1"]
    assert (found.value, found.reason) == (None, "its scoring left no number for each image")
    held = [image for image in system.ids if half(image) == HELD]
    none = metrics.Score("rouge1", 0.5, 0.4, 0.6, len(held), "", True, 0.0, per_image=np.ones(len(held)))
    found = on_half(System("a", held, "same", {"rouge1": none}), TUNE).scores["rouge1"]
    assert (found.value, found.n, found.reason) == (None, 0, "there are no images")


def test_few_images_are_warned_of():
    assert few_images(200, HELD) is None
    assert few_images(199, HELD).startswith("the held half has 199 images")


@pytest.fixture(scope="module")
def project(small_run, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("halves")
    shutil.copytree(small_run / "kept", place, dirs_exist_ok=True)
    shutil.copy(small_run / "run" / "small.yaml", place)
    return place


def rows(project: Path, run: str = "small/opt-s42") -> dict[str, dict[str, str]]:
    record = json.loads((project / "runs" / run / "run.json").read_text())
    file = project / "runs" / record["artifacts"]["scores/valid_after_per_image.csv"]
    return {row["ID"]: row for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())}


def mean(project: Path, metric: str, wanted: str, run: str = "small/opt-s42") -> float:
    """The score of a half, from the table of a run."""
    values = [float(row[metric]) for image, row in rows(project, run).items() if half(image) == wanted]
    return pytest.approx(sum(values) / len(values), abs=1e-6)  # the table has six decimals


@pytest.mark.parametrize("wanted", HALVES)
def test_a_record_on_a_half_has_its_scores_and_image_gap(project, wanted):
    folder = project / "runs" / "small" / "opt-s42"
    found = record_on_half(folder, records.read(folder), wanted)
    scores = found["scores"]["valid"]["after"]
    own = [row for image, row in rows(project).items() if half(image) == wanted]
    for name in ("bertscore", "rouge1"):
        assert scores[name]["value"] == mean(project, name, wanted)
        assert scores[name]["n"] == len(own)
    captions = [row["prediction"] for row in own], [row["reference"] for row in own]
    alone = metrics.image_gap(*captions, ScoreConfig(), 2023, names=("rouge1",))
    assert found["image_gap"] == alone
    assert found["half"] == wanted
    kept = records.read(folder)
    assert kept["halves"][wanted] == {"scores": scores, "image_gap": alone}
    assert scores_of(kept)[f"{wanted}/rouge1"] == scores["rouge1"]["value"]


def printed(project: Path, *words: str) -> str:
    """What a command prints; it runs in this process."""
    with contextlib.chdir(project):
        return CliRunner().invoke(app, words, catch_exceptions=False).stdout


def test_compare_leaderboard_and_report_say_which_half(project):
    runs = ("runs/small/opt-s42", "runs/small/opt_dedup-s42")
    found = json.loads(printed(project, "compare", *runs, "--half", "held", "--format", "json"))
    assert found["half"] == "held"
    assert found["scores"]["opt-s42"]["rouge1"]["value"] == mean(project, "rouge1", HELD)
    assert found["n"] == sum(half(image) == HELD for image in rows(project))
    shown = printed(project, "leaderboard", "--half", "held")
    assert "our runs, validation, the held half, not ranked" in shown
    assert "warning: the held half has" in shown
    (board,) = json.loads(printed(project, "leaderboard", "--half", "tune", "--format", "json"))
    assert board["half"] == "tune"
    one = next(run for run in board["runs"] if run["run"] == "opt-s42")
    assert one["scores"]["bertscore"]["value"] == mean(project, "bertscore", TUNE)
    assert one["image_gap"]["gap"] is not None
    printed(project, "report", runs[0])
    page = (project / runs[0] / "report.html").read_text()
    start = page.index('<script id="data" type="application/json">')
    data = json.loads(page[page.index("{", start) : page.index("</script>", start)])
    assert data["halves"]["held"]["scores"]["rouge1"]["value"] == mean(project, "rouge1", HELD)
    assert data["halves"]["held"]["few"]


@pytest.mark.slow
def test_a_study_on_the_tune_half_reports_the_best_on_the_held_half(project):
    (project / "halved.yaml").write_text(STUDY)
    found = json.loads(harness(project, "study", "halved.yaml", "--format", "json").stdout)
    assert len(found) == 2
    for row in found:
        run = f"small/halved/trial-{row['number']:04}-s42"
        assert row["values"]["rouge1"] == mean(project, "rouge1", TUNE, run)
        trial = json.loads((project / "runs" / run / "run.json").read_text())["trial"]
        assert trial["half"] == "tune"
    best = next(row for row in found if row["best"])
    run = f"small/halved/trial-{best['number']:04}-s42"
    assert best["held"]["scores"]["rouge1"]["value"] == mean(project, "rouge1", HELD, run)
    study = json.loads((project / "runs" / "small" / "halved" / "study.json").read_text())
    assert (study["half"], study["best"][0]["held"]) == ("tune", best["held"])
    harness(project, "study", "best", "halved.yaml")
    text = (project / "halved_best.yaml").read_text()
    assert "on the tune half, by which it was chosen; on the held half: rouge1 " in text
    (project / "pruned.yaml").write_text(STUDY + "pruner: {name: median}\n")
    refused = harness(project, "study", "pruned.yaml", code=2).stderr
    assert "a pruner judges by validations on both halves" in refused
