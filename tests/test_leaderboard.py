"""The leaderboard: which runs are ranked, which are not and why; the page in a real browser."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from support import leaderboards, pages
from support.leaderboards import ROOT, SIGNATURE, board, harness, record, score, write_run
from support.pages import check_readable

from harness import leaderboard
from harness.config.editions import EDITIONS
from harness.errors import UserError

EVIL = "</script><script>window.evil=1</script><img src=x onerror=window.evil=2><!--"
EVIL_FOLDER = EVIL.replace("/", "")
project = leaderboards.project  # the fixture
browser = pages.browser  # the fixture


@pytest.mark.parametrize("year", [2023, 2026])
def test_the_official_standings_are_the_given_ones(year, shared):
    ours = leaderboard.read_standings(ROOT / "leaderboard" / f"{year}.csv")
    with (shared / "golden" / f"leaderboard_{year}.csv").open(encoding="utf-8", newline="") as text:
        given = list(csv.DictReader(text))
    assert [(row.team, row.run) for row in ours] == [(row["team"], row["run"]) for row in given]
    for row, golden in zip(ours, given, strict=True):
        assert row.source
        assert all(value == float(golden[metric]) for metric, value in row.scores.items())
    primary = [row.scores["bertscore" if year == 2023 else "overall"] for row in ours]
    assert primary == sorted(primary, reverse=True)


def test_a_partial_table_says_so(project):
    text = harness(project)
    assert "2023: official standings, test (5 of the 13 teams)" in text
    assert "2026: official standings, test (8 known; there may be more teams)" in text


def test_a_row_without_source_or_number_is_refused(tmp_path):
    file = tmp_path / "2023.csv"
    file.write_text("rank,team,run,bertscore,source\n1,a,1,0.5,\n2,b,1,many,notes\n")
    with pytest.raises(UserError) as error:
        leaderboard.read_standings(file)
    assert [problem.line for problem in error.value.problems] == [2, 3]


APART = {
    "stand-in captioner": ({"standin_model": True}, "stand-in model"),
    "still running": ({"status": "RUNNING"}, "RUNNING"),
    "made-up images": ({"config": record()["config"] | {"data": {"phantom": {}}}}, "made up"),
    "stand-in metric": ({"scores": {"valid": {"after": {"bertscore": score(0.9, False)}}}}, "STAND-IN x"),
    "other images": ({"scores": {"valid": {"after": {"bertscore": score(0.9, n=197)}}}}, "197 images"),
    "no score": ({"scores": {"valid": {"after": {"bertscore": score(None, reason="no Java")}}}}, "no Java"),
    "not scored": ({"scores": {}}, "not computed"),
    "only before": ({"scores": {"valid": {"before": {"bertscore": score(0.9)}}}}, "not computed"),
    "edition without its metric": ({"edition": 2026}, "overall, the ranking score, is absent"),
    "edition without a rule": ({"edition": 2022}, "not established"),
    "another subtask": (
        {"edition": 2026, "scores": {"valid": {"after": {"overall": score(0.4, n=19_239)}}}},
        "it has 19,239 images (like the subtask Synthetic), but the validation split of 2026 has 19,240",
    ),
}


@pytest.mark.parametrize("case", APART)
def test_what_can_not_be_compared_stands_apart_and_says_why(case, project):
    changes, why = APART[case]
    write_run(project, record(**changes))
    found = board(project, changes.get("edition", 2023))
    (entry,) = found.entries
    assert why in entry.apart
    assert found.rank(entry) is None
    assert found.beats(entry) == {}
    assert all(
        "difference" not in cell for row in leaderboard.table_3(found) for cell in row["scores"].values()
    )


@pytest.mark.parametrize("year", [year for year, edition in EDITIONS.items() if edition.images])
def test_a_run_on_the_images_of_its_edition_has_a_rank(year, project):
    edition = EDITIONS[year]
    scores = {edition.primary: score(0.4, n=edition.images["valid"])}
    write_run(project, record(edition=year, scores={"valid": {"after": scores}}))
    found = board(project, year)
    assert [found.rank(entry) for entry in found.entries] == [1]


def test_all_reasons_are_given_at_once(project):
    run = record(standin_model=True, scores={"valid": {"after": {"bertscore": score(0.9, False, n=197)}}})
    write_run(project, run)
    assert board(project).entries[0].apart.count(";") == 2


def test_trials_of_a_study_are_left_out_and_its_best_run_is_in(project):
    for number in range(3):
        trial = {"number": number, "state": "COMPLETE"}
        write_run(project, record(name="study", variant=f"trial-{number:04}", bertscore=0.9, trial=trial))
    write_run(project, record(name="study/best", variant="trial-0002", bertscore=0.9))
    write_run(project, record(bertscore=0.6))
    found = board(project)
    assert [(entry.record["name"], found.rank(entry)) for entry in found.entries] == [
        ("study/best", 1),
        ("imageclef2023/table3", 2),
    ]
    assert len(json.loads(harness(project, "--edition", "2023", "--format", "json"))[0]["runs"]) == 2


def test_validation_is_ranked_among_ourselves_and_never_among_the_teams(project):
    write_run(project, record(variant="best", bertscore=0.99))
    write_run(project, record(variant="worst", bertscore=0.01))
    write_run(project, record(variant="cheat", bertscore=0.999, standin_model=True))
    found = board(project)
    assert {entry.run: found.rank(entry) for entry in found.entries} == {
        "best-s42": 1,
        "worst-s42": 2,
        "cheat-s42": None,
    }
    text = harness(project, "--edition", "2023")
    official = text.partition("our runs")[0]
    assert "CSIRO" in official
    assert "best" not in official
    assert "hypothetical" in text
    assert "ranks among our runs have no interval" in text, "these records have no scores of images"
    assert "among our runs 1st; among the teams 1st, 95 %: 1st (hypothetical)" in text


def test_a_test_score_takes_the_place_that_it_would_have_had(project):
    for variant, value in (("first", 0.65), ("third", 0.62), ("last", 0.5), ("third_too", 0.617035)):
        write_run(project, record(variant=variant, bertscore=value, split="test"))
    found = board(project)
    ranks = {entry.record["variant"]: found.rank(entry) for entry in found.entries}
    assert ranks == {"first": 1, "third": 3, "last": None, "third_too": 3}
    text = harness(project, "--edition", "2023")
    lines = [line for line in text.splitlines() if line.startswith("│")]
    names = [line.split("│")[2].strip() for line in lines[:9]]
    ours = "imageclef2023/table3"
    assert names == [ours, "CSIRO", "closeAI2023", ours, ours, "AUEB-NLP-Group", "PCLmed", "VCMI", ours]
    assert "(>5)" in text
    assert "  among the teams 3rd, 95 %: 3rd to 4th\n" in text
    assert "hypothetical" not in text
    assert "on test would have beaten" in text


def test_the_teams_that_one_would_have_beaten_by_each_official_score(project):
    write_run(project, record(bertscore=0.6200, rouge1=0.2200))
    found = board(project)
    assert found.beats(found.entries[0]) == {
        "bertscore": ["AUEB-NLP-Group", "PCLmed", "VCMI"],
        "rouge1": ["AUEB-NLP-Group", "VCMI"],
    }


def test_seeds_have_a_mean_and_a_standard_deviation_and_no_rank(project):
    for seed, value in ((1, 0.60), (2, 0.61), (3, 0.65)):
        write_run(project, record(seed=seed, bertscore=value))
    write_run(project, record(seed=4, bertscore=0.9, parameters_changed={"train.epochs": 9}))
    write_run(project, record(variant="lone", bertscore=0.9))
    found = board(project)
    assert sorted(found.rank(entry) for entry in found.entries) == [1, 1, 3, 4, 5]
    (group,) = leaderboard.over_seeds(found)
    assert (group["variant"], group["split"], group["seeds"]) == ("opt_364", "valid", [1, 2, 3])
    score = group["scores"]["bertscore"]
    assert score["mean"] == pytest.approx(0.62)
    assert score["sd"] == pytest.approx(np.std([0.60, 0.61, 0.65], ddof=1))
    text = harness(project, "--edition", "2023")
    assert "not ranked" in text.partition("over seeds")[2].partition("\n")[0]
    assert "±0.0265" in text
    rows = list(csv.DictReader(io.StringIO(harness(project, "--format", "csv"))))
    (row,) = (row for row in rows if row["kind"] == "seeds" and row["metric"] == "bertscore")
    assert (row["seed"], row["rank"], float(row["sd"])) == ("1 2 3", "", pytest.approx(0.0264575))
    seeds = {"scores": {"valid": {"after": {"bertscore": score_of_bf16()}}}}
    write_run(project, record(seed=5, **seeds))
    reason = leaderboard.over_seeds(board(project))[0]["scores"]["bertscore"]["reason"]
    assert "different signatures" in reason


def score_of_bf16() -> dict:
    return score(0.61, official=False) | {"signature": SIGNATURE.replace("fp32", "bf16")}


def test_a_score_in_another_precision_stands_apart_by_its_signature_and_has_a_star(project):
    write_run(project, record(scores={"valid": {"after": {"bertscore": score_of_bf16()}}}))
    (entry,) = board(project).entries
    assert entry.apart.endswith("no|bf16")
    text = harness(project, "--edition", "2023")
    assert "0.6100*" in text
    assert "another model, precision or reading" in text
    assert "c0ffeec0ff" in text


def test_json_and_csv_tell_where_a_score_comes_from(project):
    folder = write_run(project, record())
    mirrored = {"sqlite:////x/mlflow.db": {"runs": {folder.name: {"run_id": "abc"}}}}
    mirrored |= {"https://tracking.example": {"runs": {folder.name: {"run_id": "def"}}}}
    mirrored |= {"javascript:alert(1)": {"runs": {folder.name: {"run_id": "ghi"}}}}
    (folder.parent / "mlflow.json").write_text(json.dumps(mirrored))
    (found,) = json.loads(harness(project, "--edition", "2023", "--format", "json"))
    (run,) = found["runs"]
    assert run["scores"]["bertscore"]["low"] == pytest.approx(0.607)
    assert (run["seed"], run["date"], run["commit"]) == (42, "2026-01-02T03:04:05+00:00", "c0ffee" * 6)
    assert run["command"] == "harness run experiments/table3.yaml"
    assert (project / "leaderboard" / run["links"]["config.yaml"]).resolve() == (
        folder / "config.yaml"
    ).resolve()
    assert "report.html" not in run["links"]
    links = [place["link"] for place in run["mlflow"]]
    assert links[1:] == ["https://tracking.example/#/runs/def", None]
    assert links[0].endswith("/#/runs/abc")
    rows = list(csv.DictReader(io.StringIO(harness(project, "--format", "csv"))))
    assert len(rows) == 5 * 7 + 8 * 9 + 3
    assert {row["split"] for row in rows if row["kind"] == "team"} == {"test"}
    assert {row["split"] for row in rows if row["kind"] == "run"} == {"valid"}
    assert all(row["source"] for row in rows if row["kind"] == "team")
    ours = next(row for row in rows if row["kind"] == "run")
    assert (project / ours["config.yaml"]).samefile(folder / "config.yaml")
    assert "https://tracking.example/#/runs/def" in ours["mlflow"]


def test_mistakes_and_empty_projects(tmp_path):
    assert "no runs yet" in harness(tmp_path, "--edition", "2024")
    assert "2022, 2023" in harness(tmp_path, "--edition", "2021", code=2)
    assert json.loads(harness(tmp_path, "--format", "json")) == []
    write_run(tmp_path, record())
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text("{")
    told = harness(tmp_path)
    assert "left out: runs/broken/run.json: is not what a run writes" in told
    assert "opt_364-s42" in told


def evil_project(project: Path) -> Path:
    """Ranked, apart and hostile runs, enough of them to sort and filter."""
    for n, variant in enumerate(("opt_364", "again", "third")):
        write_run(project, record(variant=variant, bertscore=0.60 + 0.01 * n))
    write_run(project, record(name="quick", variant="tiny", bertscore=0.9, standin_model=True))
    write_run(project, record(name="quick", variant="made", bertscore=0.4, command=EVIL))
    folder = write_run(project, record(name="evil", variant="x", bertscore=0.605))
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"name": EVIL, "variant": EVIL}))
    folder.rename(folder.with_name(EVIL_FOLDER))
    harness(project, "--format", "html")
    return project / "leaderboard" / "index.html"


def test_the_page_holds_nothing_that_leaves_it_and_no_foreign_markup(project):
    page = evil_project(project).read_text(encoding="utf-8")
    assert page.count("<script") == 3
    assert page.count("</script>") == 3
    assert "{{data}}" not in page
    assert "onerror" not in page.partition('<script id="data"')[0]
    data = page.partition('type="application/json">')[2].partition("</script>")[0]
    assert "<" not in data
    assert any(run["experiment"] == EVIL for run in json.loads(data)["boards"][0]["runs"])


RANKED = "[...document.querySelectorAll('table')].find(t => t.textContent.includes('hypothetical place'))"
NAMES = f"[...{RANKED}.tBodies[0].rows].map(r => r.cells[1].querySelector('span').firstChild.textContent)"


def test_the_page_in_a_browser(project, browser):
    page = evil_project(project)
    assert browser.open(page) < 5
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.evaluate(NAMES) == ["third-s42", "again-s42", EVIL_FOLDER, "opt_364-s42", "made-s42"]
    heading = f"{RANKED}.tHead.rows[0].cells[2]"
    sort = f"{heading}.querySelector('button')"
    browser.click(sort)
    assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") == "descending"
    browser.click(sort)
    assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") == "ascending"
    assert browser.evaluate(NAMES)[0] == "made-s42"
    assert browser.evaluate(NAMES)[-1] == "third-s42"
    browser.evaluate(f"{sort}.focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") == "descending"
    dots = "['team', 'ours', 'apart'].map((kind) => document.querySelectorAll(`#chart .dot-${kind}`).length)"
    legend = [1, 1, 0]
    assert browser.evaluate(dots) == [5 + 1, 5 + 1, 0], "one run alone that has no rank is no chart"
    browser.choose("experiment", "quick")
    assert browser.evaluate(NAMES) == ["made-s42"]
    assert "2 of our 6" in browser.evaluate("document.getElementById('status').textContent")
    assert browser.evaluate(dots) == [5 + legend[0], 1 + legend[1], 0]
    browser.choose("experiment", EVIL)
    assert browser.evaluate("document.getElementById('main').textContent").count("onerror") >= 2
    browser.choose("edition", "2026")
    assert "AIstatLab" in browser.evaluate("document.getElementById('main').textContent")
    browser.choose("edition", "2023")
    assert browser.evaluate("window.evil") is None
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]


def test_the_controls_of_the_page(project, browser):
    for n, (variant, value) in enumerate((("old", 0.6300), ("new", 0.6290), ("third", 0.6000))):
        ended = f"2026-01-0{n + 1}T00:00:00+00:00"
        write_run(project, record(name=f"e{n // 2}", variant=variant, bertscore=value, ended=ended))
    for n, name in enumerate(("first", "second")):
        ended = f"2026-02-0{n + 1}T00:00:00+00:00"
        write_run(project, record(name="quick", variant=name, standin_model=True, ended=ended))
    browser.open(leaderboard.write_page([board(project)], project / "leaderboard"))
    apart = "[...document.querySelectorAll('table')].find(t => t.textContent.includes('note 1'))"
    shown = f"[...{apart}.tBodies[0].rows].map(r => r.cells[0].querySelector('span').firstChild.textContent)"
    assert browser.evaluate(shown) == ["second-s42", "first-s42"], "the newest first"
    rows = "[...document.querySelectorAll('#standings tbody tr')].map((row) => row.className)"
    teams = browser.evaluate(rows)
    assert (teams.count(""), teams.count("ours maybe")) == (5, 2), "the best of each experiment"
    tint = "getComputedStyle(document.querySelector('#standings tr.ours td')).backgroundColor"
    assert browser.evaluate(tint) != "rgba(0, 0, 0, 0)"
    place = "document.querySelector('#standings tr.ours td').textContent"
    assert browser.evaluate(place) == "2nd95 %: 2nd to 3rd"
    browser.click("document.getElementById('ours')")
    assert browser.evaluate(rows) == [""] * 5
    assert browser.evaluate(NAMES) == ["old-s42", "new-s42", "third-s42"]
    browser.choose("order", "newest")
    assert browser.evaluate(NAMES) == ["third-s42", "new-s42", "old-s42"]
    browser.click("document.getElementById('best')")
    assert browser.evaluate(NAMES) == ["third-s42", "old-s42"]
    columns = f"{RANKED}.tHead.rows[0].cells.length"
    few = browser.evaluate(columns)
    visible = (
        f"[...{RANKED}.querySelectorAll('.interval')].filter((one) => one.getClientRects().length).length"
    )
    compact = browser.evaluate(visible)
    browser.click("document.getElementById('compact')")
    assert browser.evaluate(columns) == few + 4
    assert browser.evaluate(visible) > compact
    for control, place in (("ours", "standings"), ("metric", "chart"), ("order", "runs"), ("best", "runs")):
        near = f"document.getElementById('{control}').closest('section').id"
        assert browser.evaluate(near) == place, "beside what it controls"
    assert browser.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast_and_a_phone_shows_it(scheme, project, browser):
    check_readable(browser, [evil_project(project)], scheme)


def test_a_run_is_called_by_its_folder_and_may_have_lost_its_parameters(project):
    folder = write_run(project, record() | {"parameters": {}})
    folder.rename(folder.with_name("best-of-monday"))
    (entry,) = json.loads(harness(project, "--edition", "2023", "--format", "json"))[0]["runs"]
    assert entry["run"] == "best-of-monday"


def test_a_run_whose_record_is_gone_is_named(project):
    (write_run(project, record()) / "run.json").unlink()
    said = harness(project, "--edition", "2023")
    assert (
        "left out: runs/imageclef2023/table3/opt_364-s42/run.json: is not what a run writes: it is gone"
        in said
    )
