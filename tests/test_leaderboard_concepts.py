"""The leaderboard of concepts: standings, ranks on the half that chose nothing, both tasks together."""

import csv
import io
import json
import statistics

import pytest
from support import concept_runs, leaderboards, pages
from support.concept_runs import concepts, score
from support.leaderboards import ROOT, harness, record, write_run

from harness import leaderboard
from harness.config.editions import EDITIONS
from harness.errors import UserError
from harness.metrics import score_concepts

project = leaderboards.project  # the fixture: standings of captions alone
browser = pages.browser  # the fixture
EVIL = "</script><script>window.evil=1</script><img src=x onerror=window.evil=2><!--"
FILES = sorted((ROOT / "leaderboard").glob("concepts_*.csv"))


def board(project, edition=2023, **more):
    return leaderboard.board(edition, project / "runs", project / "leaderboard", task="concepts", **more)


def ours(variant: str, *, seed: int = 42, more=(), **changes):
    """A record whose concepts have these scores."""
    return concept_runs.record(variant, seed, concepts=concepts(**changes), **dict(more))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_official_row_has_a_source_and_scores_in_order(file):
    rows = leaderboard.read_standings(file)
    with file.open(encoding="utf-8", newline="") as text:
        header = next(csv.reader(text))
    computed = set(score_concepts([{"C1"}], [{"C1"}], None, 2023))
    assert set(header) - {"rank", "team", "run", "source"} == computed, "the names that our scores have"
    assert file.stem.removeprefix("concepts_") in map(str, EDITIONS)
    assert all(row.source and row.team for row in rows)
    assert [row.scores["f1"] for row in rows] == sorted((row.scores["f1"] for row in rows), reverse=True)
    ranks = [row.rank for row in rows if row.rank is not None]
    assert ranks == sorted(ranks)
    assert all(0 < value < 1 for row in rows for value in row.scores.values())


def test_a_row_may_lack_its_place_and_its_secondary_f1_but_no_f1(tmp_path):
    file = tmp_path / "concepts_2023.csv"
    file.write_text("rank,team,run,f1,f1_secondary,source\n,a,,0.5,,notes\n2,b,1,0.4,0.9,notes\n")
    first, second = leaderboard.read_standings(file)
    assert (first.rank, first.scores) == (None, {"f1": 0.5})
    assert (second.rank, second.scores) == (2, {"f1": 0.4, "f1_secondary": 0.9})
    file.write_text("rank,team,run,f1,f1_secondary,source\n1,a,,,0.9,notes\n1st,b,1,0.4,,notes\n2,c,,0.3,,\n")
    with pytest.raises(UserError) as error:
        leaderboard.read_standings(file)
    assert [problem.line for problem in error.value.problems] == [2, 3, 4]


def test_runs_are_ranked_on_the_half_that_chose_no_threshold(project):
    write_run(project, ours("overfitted", held=0.50, whole=0.60))
    write_run(project, ours("sound", held=0.52, whole=0.53))
    write_run(project, ours("votes", held=0.40, whole=0.41, chosen_on=None))
    found = board(project)
    ranks = {entry.record["variant"]: found.rank(entry) for entry in found.entries}
    assert ranks == {"sound": 1, "overfitted": 2, "votes": 3}
    tuned = {e.record["variant"]: bool(e.scores["f1_whole"]["tuned"]) for e in found.entries}
    assert tuned == {"sound": True, "overfitted": True, "votes": False}
    text = " ".join(harness(project, "--task", "concepts").split())
    assert "2023 concepts: our runs, validation, the held half (ranked among each other)" in text
    assert "0.6000†" in text
    assert "0.4100†" not in text
    assert "0.4100" in text
    assert "† on all of validation" in text
    on_tune = board(project, half="tune")
    ranks = {entry.record["variant"]: on_tune.rank(entry) for entry in on_tune.entries}
    assert ranks == {"overfitted": 1, "sound": 2, "votes": 3}
    assert [on_tune.beats(entry) for entry in on_tune.entries] == [{}, {}, {}]


APART = {
    "stand-in model": ({"standin_model": True}, "the concepts are by a stand-in model"),
    "still running": (
        {"status": "RUNNING", "concepts": None},
        "the run is RUNNING; f1, the ranking score, is absent",
    ),
    "trial": ({"trial": {"option": "x"}}, "it is a trial of a study"),
    "made-up images": ({"config": {"task": "concepts", "data": {"phantom": {}}}}, "the images are made up"),
    "quick look": ({"config": {"task": "concepts", "data": {"fraction": {"valid": 0.1}}}}, "10% of valid"),
    "other images": (
        {"concepts": concepts(n=200)},
        "it has 200 images, but the validation split of 2023 has 10,437",
    ),
    "unknown size": ({"edition": 2024}, "the size of the validation split of 2024 is not established"),
    "learned from validation": (
        {"concepts": concepts(scores={}, halves={}), "unscored": {"valid": "trained on validation images"}},
        "it has no scores on validation: trained on validation images",
    ),
    "no half": ({"concepts": concepts(halves={})}, "f1, the ranking score, is absent: not computed"),
    "not official": (
        {"concepts": concepts(halves={"held": {"f1": score(0.5, 5218, official=False)}})},
        "f1, the ranking score, is not the official one",
    ),
}


@pytest.mark.parametrize("case", APART)
def test_what_can_not_be_compared_stands_apart_and_says_why(case, project):
    changes, why = APART[case]
    write_run(project, concept_runs.record(**changes))
    found = board(project, changes.get("edition", 2023), trials=True)
    (entry,) = found.entries
    assert why in entry.apart
    assert found.rank(entry) is None
    assert found.beats(entry) == {}


@pytest.mark.parametrize("year", [year for year, edition in EDITIONS.items() if edition.images])
def test_a_run_on_the_images_of_its_edition_has_a_rank(year, project):
    write_run(project, ours("any", n=EDITIONS[year].images["valid"], more={"edition": year}))
    found = board(project, year)
    assert [found.rank(entry) for entry in found.entries] == [1]


def test_a_run_stands_on_the_boards_of_its_tasks(project):
    write_run(project, concept_runs.record())
    write_run(project, record(variant="captions"))
    write_run(project, record(variant="both", concepts=concepts(held=0.5)))
    began = record(variant="began", status="RUNNING", scores={})
    write_run(project, began | {"config": began["config"] | {"concepts": {"predictor": "knn"}}})
    captions = leaderboards.board(project)
    assert {e.record["variant"] for e in captions.entries} == {"captions", "both", "began"}
    found = board(project)
    assert {e.record["variant"]: found.rank(e) for e in found.entries} == {
        "classifier": 1,
        "both": 2,
        "began": None,
    }
    assert "f1" not in captions.metrics
    assert found.metrics == ["f1", "f1_secondary", "f1_whole"]


def test_places_on_test_are_given_only_where_the_standings_know_the_teams_around(project):
    file = project / "leaderboard" / "concepts_2023.csv"
    file.write_text(
        "rank,team,run,f1,f1_secondary,source\n3,a,,0.5,,x\n4,b,,0.45,,x\n,c,,0.44,,x\n6,d,,0.4,,x\n"
    )
    values = {"first": 0.6, "third": 0.5, "fourth": 0.46, "fifth": 0.445, "before d": 0.42, "last": 0.3}
    for variant, value in values.items():
        scores = {"test": {"f1": score(value, 10_473)}}
        write_run(project, concept_runs.record(variant, concepts=concepts(scores=scores, halves={})))
    found = board(project)
    ranks = {entry.record["variant"]: found.rank(entry) for entry in found.entries}
    # fewer rows are known than teams: the place is unknown unless the rows around it say it
    assert ranks == dict.fromkeys(values)
    file.write_text("rank,team,run,f1,f1_secondary,source\n1,a,,0.5,,x\n2,b,,0.45,,x\n4,d,,0.4,,x\n")
    found = board(project)
    ranks = {entry.record["variant"]: found.rank(entry) for entry in found.entries}
    assert ranks == {"first": 1, "third": 1, "fourth": 2, "fifth": None, "before d": None, "last": None}
    lines = [
        line.split("│")[1].strip()
        for line in harness(project, "--task", "concepts").splitlines()
        if "│" in line
    ]
    assert lines[:9] == ["(1)", "(1)", "1", "(2)", "2", "-", "-", "4", "(>4)"]


def test_seeds_have_means_of_the_same_half(project):
    for seed, held in ((1, 0.50), (2, 0.51), (3, 0.54)):
        write_run(project, ours("seeded", seed=seed, held=held, whole=held + 0.02))
    (group,) = leaderboard.over_seeds(board(project))
    values = (0.50, 0.51, 0.54)
    assert group["scores"]["f1"]["mean"] == pytest.approx(statistics.fmean(values))
    assert group["scores"]["f1"]["sd"] == pytest.approx(statistics.stdev(values))
    assert group["scores"]["f1"]["n"] == 5218
    assert group["scores"]["f1_whole"]["tuned"]


def test_files_hold_both_tasks_and_captions_alone_are_as_before(project):
    write_run(project, record())
    plain = {how: harness(project, "--format", how) for how in ("json", "csv", "table")}
    write_run(project, ours("classifier", secondary=None))
    captions = {how: harness(project, "--format", how, "--task", "captions") for how in plain}
    assert captions == plain
    both = json.loads(harness(project, "--format", "json"))
    assert both[:-1] == json.loads(plain["json"])
    (run,) = both[-1]["runs"]
    assert (both[-1]["task"], both[-1]["edition"], both[-1]["half"], both[-1]["primary"]) == (
        "concepts",
        2023,
        "held",
        "f1",
    )
    assert run["scores"]["f1_secondary"]["reason"] == "no manual concepts in the data"
    assert run["scores"]["f1_whole"]["tuned"] is True
    assert run["rank"] == 1
    assert run["image_gap"] is None
    rows = list(csv.DictReader(io.StringIO(harness(project, "--format", "csv"))))
    found = {row["metric"]: row for row in rows if row["task"] == "concepts"}
    assert {metric: (row["half"], row["value"]) for metric, row in found.items()} == {
        "f1": ("held", "0.52"),
        "f1_secondary": ("held", ""),
        "f1_whole": ("", "0.54"),
    }
    without = [
        {key: value for key, value in row.items() if key != "task"}
        for row in rows
        if row["task"] == "captions"
    ]
    assert without == list(csv.DictReader(io.StringIO(plain["csv"])))


def test_standings_alone_are_shown_and_an_edition_without_any_is_not(project):
    shown = harness(project, "--edition", "2023")
    assert "concepts" not in shown
    for file in FILES:
        (project / "leaderboard" / file.name).write_bytes(file.read_bytes())
    shown = " ".join(harness(project).split())
    for year in (2023, 2024, 2025, 2026):
        assert f"{year} concepts: official standings, test" in shown
    assert "2024: " not in shown, "no board of captions where there is nothing"
    assert "no official standings at hand" in harness(project, "--edition", "2022", "--task", "concepts")
    assert "captions" in harness(project, "--task", "both", code=2)


def test_the_page_shows_either_task(project, browser):
    for file in FILES:
        (project / "leaderboard" / file.name).write_bytes(file.read_bytes())
    write_run(project, record())
    write_run(project, ours("a", held=0.50, whole=0.60))
    write_run(project, ours("b", held=0.52, whole=0.53))
    write_run(project, ours("tiny", more={"standin_model": True}))
    folder = write_run(project, ours("evil", held=0.51))
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"name": EVIL, "command": EVIL}))
    harness(project, "--format", "html")
    page = project / "leaderboard" / "index.html"
    main = "document.getElementById('main').textContent"
    years = "[...document.getElementById('edition').options].map((one) => one.value)"
    browser.open(page)
    assert browser.evaluate("document.getElementById('task').value") == "captions"
    assert browser.evaluate(years) == ["2026", "2023"]
    assert "concept" not in browser.evaluate(main)
    browser.choose("task", "concepts")
    assert browser.evaluate(years) == ["2026", "2025", "2024", "2023"]
    tables = "[...document.querySelectorAll('table')]"
    ranked = f"{tables}.find((one) => one.textContent.includes('hypothetical place')).tBodies[0].rows"
    assert browser.evaluate(
        f"[...{ranked}].map((row) => row.cells[1].querySelector('span').firstChild.textContent)"
    ) == [
        "b-s42",
        "evil-s42",
        "a-s42",
    ]
    text = browser.evaluate(main)
    assert "0.6000†" in text
    assert "the concepts are by a stand-in model" in text
    assert "image gap" not in text
    assert browser.evaluate("document.getElementById('metric').value") == "f1"
    browser.choose("edition", "2026")
    assert "UIT_Worker" in browser.evaluate(main)
    browser.choose("task", "captions")
    assert browser.evaluate("document.getElementById('edition').value") == "2026"
    assert "AIstatLab" in browser.evaluate(main)
    assert browser.evaluate("window.evil") is None
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]


def test_a_page_of_captions_alone_offers_no_other_task(project, browser):
    write_run(project, record())
    harness(project, "--format", "html")
    browser.open(project / "leaderboard" / "index.html")
    assert browser.evaluate("document.getElementById('task').getClientRects().length") == 0
    assert browser.problems == []
