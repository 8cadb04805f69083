"""The leaderboard: who is ranked, who stands apart and why; the page in a real browser."""

import csv
import io
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser

from harness import leaderboard
from harness.errors import UserError
from harness.metrics import Score, write_arrays
from harness.store import write_json

ROOT = Path(__file__).parents[1]
SIGNATURE = "bertscore|clef2023|microsoft/deberta-xlarge-mnli|layer:40|idf:no|rescale:no|fp32"
EVIL = "</script><script>window.evil=1</script><img src=x onerror=window.evil=2><!--"


def score(value: float | None, official: bool = True, n: int = 10_437, **more) -> dict:
    low, high = (None, None) if value is None else (value - 0.003, value + 0.003)
    signature = SIGNATURE if official else "bertscore|clef2023|STAND-IN x"
    base = {"value": value, "low": low, "high": high, "n": n, "signature": signature, "official": official}
    return base | more


def record(
    name="imageclef2023/table3",
    variant="opt_364",
    bertscore=0.61,
    rouge1=0.25,
    split="valid",
    seed=42,
    parameters_changed=None,
    **more,
) -> dict:
    scores = {"bertscore": score(bertscore), "rouge1": score(rouge1), "bleurt": score(0.9, official=False)}
    if split == "test":
        scores = {metric: one | {"n": 10_473} for metric, one in scores.items()}
    parameters = {
        "variant": variant,
        "seed": seed,
        "model.language_model": True,
        "model.image_size": 364,
        "postprocess.deduplicate": False,
    }
    found = {
        "name": name,
        "variant": variant,
        "seed": seed,
        "status": "FINISHED",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-02T03:04:05+00:00",
        "command": "python -m harness run experiments/table3.yaml",
        "edition": 2023,
        "config": {"data": {"phantom": None}},
        "parameters": parameters | (parameters_changed or {}),
        "standin_model": False,
        "git": {"commit": "c0ffee" * 6, "dirty": False},
        "scores": {split: {"before": scores, "after": scores}},
        "image_gap": {"rouge1": {"gap": 0.02, "low": 0.01, "high": 0.03}},
    }
    return found | more


def write_run(root: Path, run: dict) -> Path:
    folder = root / "runs" / run["name"] / f"{run['variant']}-s{run['seed']}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.yaml").write_text("name: x\n")
    return folder


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with the official standings and no runs."""
    (tmp_path / "leaderboard").mkdir()
    for year in (2023, 2026):
        text = (ROOT / "leaderboard" / f"{year}.csv").read_bytes()
        (tmp_path / "leaderboard" / f"{year}.csv").write_bytes(text)
    return tmp_path


def board(project: Path, edition: int = 2023) -> leaderboard.Board:
    return leaderboard.board(edition, project / "runs", project / "leaderboard")


def harness(folder: Path, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "harness", "leaderboard", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


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
    "edition without its metric": ({"edition": 2026}, "overall, which ranks, is absent"),
    "edition without a rule": ({"edition": 2022}, "not established"),
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


def test_all_reasons_are_given_at_once(project):
    run = record(standin_model=True, scores={"valid": {"after": {"bertscore": score(0.9, False, n=197)}}})
    write_run(project, run)
    assert board(project).entries[0].apart.count(";") == 2


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
    assert "hypothetical" not in text
    assert "on test would have beaten" in text


def test_the_teams_that_one_would_have_beaten_by_each_official_score(project):
    write_run(project, record(bertscore=0.6200, rouge1=0.2200))
    found = board(project)
    assert found.beats(found.entries[0]) == {
        "bertscore": ["AUEB-NLP-Group", "PCLmed", "VCMI"],
        "rouge1": ["AUEB-NLP-Group", "VCMI"],
    }


def test_table_3_has_a_difference_where_it_is_one_and_its_significance(project):
    write_run(project, record(bertscore=0.6090, rouge1=0.2700))
    rows = leaderboard.table_3(board(project))
    assert [(row["scores"]["bertscore"]["paper"], row["scores"]["rouge1"]["paper"]) for row in rows] == [
        (0.541, 0.160),
        (0.593, 0.249),
        (0.608, 0.255),
        (0.628, 0.253),
    ]
    assert [row["run"] for row in rows] == [None, None, "imageclef2023/table3/opt_364-s42", None]
    bertscore, rouge1 = rows[2]["scores"]["bertscore"], rows[2]["scores"]["rouge1"]
    assert bertscore["difference"] == pytest.approx(0.001)
    assert bertscore["significant"] is False
    assert rouge1["difference"] == pytest.approx(0.015)
    assert rouge1["significant"] is True


ROWS_OF_TABLE_3 = {
    "qformer_224": (False, 224, False),
    "opt_224": (True, 224, False),
    "opt_364": (True, 364, False),
    "opt_364_dedup": (True, 364, True),
}
KEYS = ("model.language_model", "model.image_size", "postprocess.deduplicate")


def write_scored(project: Path, variant: str, means: dict[str, float], references="r", **more) -> Path:
    """A run with the scores of 200 single images, as its score step leaves them."""
    rng = np.random.default_rng(len(variant))
    arrays = {metric: rng.normal(mean, 0.1, 200) for metric, mean in means.items()}
    scores = {
        metric: Score(metric, float(rows.mean()), None, None, 200, f"{metric}|x", True, 0.0, per_image=rows)
        for metric, rows in arrays.items()
    }
    plain = {metric: one.as_dict() for metric, one in scores.items()}
    run = record(variant=variant, scores={"valid": {"after": plain}}, artifacts={}, **more)
    step = f"steps/score-{variant}-{run['seed']}"
    write_arrays(project / "runs" / step / "arrays.npz", [f"i{n}" for n in range(200)], scores)
    write_json(project / "runs" / step / "scores.json", {"scores": plain, "references": references})
    return write_run(project, run | {"steps": {"score-after": step}})


def write_table_3(project: Path, seed: int = 42, **references: str) -> list[Path]:
    """Rows 1 to 4: the second is far above the first, the third equals it, the fourth is a little higher."""
    means = dict(zip(ROWS_OF_TABLE_3, (0.2, 0.4, 0.4, 0.43), strict=True))
    return [
        write_scored(
            project,
            variant,
            {"bertscore": means[variant], "rouge1": 0.2},
            references.get(variant, "r"),
            seed=seed,
            parameters_changed=dict(zip(KEYS, kind, strict=True)),
        )
        for variant, kind in ROWS_OF_TABLE_3.items()
    ]


def test_what_each_row_of_table_3_changes_is_what_compare_says_corrected_over_the_steps(project):
    folders = write_table_3(project)
    steps = leaderboard.steps(board(project))
    assert [(row["a"], row["b"]) for row in steps] == [
        ("qformer_224-s42", "opt_224-s42"),
        ("opt_224-s42", "opt_364-s42"),
        ("opt_364-s42", "opt_364_dedup-s42"),
    ]
    assert [round(row["paper"]["bertscore"], 3) for row in steps] == [0.052, 0.015, 0.020]
    for metric in ("bertscore", "rouge1"):
        for (one, two), row in zip(pairwise(folders), steps, strict=True):
            command = [sys.executable, "-m", "harness", "compare", one, two, "--format", "json"]
            done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
            (alone,) = (
                found for found in json.loads(done.stdout)["differences"] if found["metric"] == metric
            )
            ours = row["scores"][metric]
            assert {key: ours[key] for key in ("difference", "low", "high", "p")} == {
                key: alone[key] for key in ("difference", "low", "high", "p")
            }
        p = sorted((row["scores"][metric] for row in steps), key=lambda score: score["p"])
        least = 0.0
        for rank, score in enumerate(p):  # Holm 1979, step by step
            least = max(least, min(1.0, score["p"] * (3 - rank)))
            assert score["adjusted_p"] == pytest.approx(least)
    said = [row["scores"]["bertscore"]["verdict"] for row in steps]
    assert said[:2] == ["opt_224-s42 higher", "not shown"]


def test_rows_that_can_not_be_compared_say_why_and_other_seeds_and_settings_are_never_mixed(project):
    write_table_3(project, opt_364="other references")
    steps = leaderboard.steps(board(project))
    assert steps[0]["scores"]["bertscore"]["real"]
    for row in steps[1:]:
        assert "other references" in row["scores"]["bertscore"]["reason"]
        assert row["scores"]["bertscore"]["difference"] is None
    (project / "runs/steps/score-opt_224-42/arrays.npz").unlink()
    assert "older version" in leaderboard.steps(board(project))[0]["scores"]["rouge1"]["reason"]
    lone = {"parameters_changed": dict(zip(KEYS, (True, 224, False), strict=True))}
    write_scored(project, "alone", {"bertscore": 0.3}, seed=7, name="other", **lone)
    assert len(leaderboard.steps(board(project))) == 3
    slower = {"parameters_changed": dict(zip(KEYS, (True, 224, False), strict=True)) | {"train.epochs": 9}}
    write_scored(project, "longer", {"bertscore": 0.3}, **slower)
    assert len(leaderboard.steps(board(project))) == 3, "it differs in more than its row"
    assert leaderboard.steps(board(project, 2026)) == []


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
    assert "not scored alike" in reason


def score_of_bf16() -> dict:
    return score(0.61, official=False) | {"signature": SIGNATURE.replace("fp32", "bf16")}


def test_a_score_in_another_precision_stands_apart_by_its_signature_and_has_a_star(project):
    write_run(project, record(scores={"valid": {"after": {"bertscore": score_of_bf16()}}}))
    (entry,) = board(project).entries
    assert entry.apart.endswith("no|bf16")
    text = harness(project, "--edition", "2023")
    assert "0.6100*" in text
    assert "another model or precision" in text
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
    assert run["command"] == "python -m harness run experiments/table3.yaml"
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
    assert "broken/run.json" in harness(tmp_path, code=2)


def evil_project(project: Path) -> Path:
    """Ranked, apart and hostile runs, enough of them to sort and filter."""
    for n, variant in enumerate(("opt_364", "again", "third")):
        write_run(project, record(variant=variant, bertscore=0.60 + 0.01 * n))
    write_run(project, record(name="quick", variant="tiny", bertscore=0.9, standin_model=True))
    write_run(project, record(name="quick", variant="made", bertscore=0.4, command=EVIL))
    folder = write_run(project, record(name="evil", variant="x", bertscore=0.605))
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"name": EVIL, "variant": EVIL}))
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


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)")
def test_the_page_in_a_browser(project, tmp_path_factory):
    page = evil_project(project)
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path_factory.mktemp("shots")))
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        assert browser.open(page) < 5
        assert browser.requests == [page.resolve().as_uri()]
        cells = "[...document.querySelectorAll('table')].find(t => t.textContent.includes('would have'))"
        names = f"[...{cells}.tBodies[0].rows].map(r => r.cells[2].textContent)"
        assert browser.evaluate(names) == [
            "third-s42",
            "again-s42",
            f"{EVIL}-s42",
            "opt_364-s42",
            "made-s42",
        ]
        heading = f"{cells}.tHead.rows[0].cells[3]"
        button = f"{heading}.querySelector('button')"
        browser.click(button)
        assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") == "descending"
        browser.click(button)
        assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") == "ascending"
        assert browser.evaluate(names)[0] == "made-s42"
        assert browser.evaluate(names)[-1] == "third-s42"
        browser.evaluate(f"{button}.focus()")
        browser.press("Enter", 13, "\r")
        assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") == "descending"
        assert browser.evaluate("document.querySelectorAll('svg rect').length") == 5 + 5 + 1
        browser.screenshot(shots / "leaderboard.png")
        browser.choose("experiment", "quick")
        assert browser.evaluate(names) == ["made-s42"]
        assert "2 of our 6" in browser.evaluate("document.getElementById('status').textContent")
        assert browser.evaluate("document.querySelectorAll('svg rect').length") == 5 + 1 + 1
        browser.choose("experiment", EVIL)
        assert browser.evaluate("document.getElementById('main').textContent").count("onerror") >= 2
        browser.choose("edition", "2026")
        assert "AIstatLab" in browser.evaluate("document.getElementById('main').textContent")
        browser.choose("edition", "2023")
        browser.resize(375, 800)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 375
        browser.screenshot(shots / "leaderboard-phone.png")
        assert browser.evaluate("window.evil") is None
        assert browser.problems == []
        assert browser.requests == [page.resolve().as_uri()]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)")
def test_the_page_says_what_the_rows_of_table_3_change_and_is_used_by_keyboard(project, tmp_path_factory):
    write_table_3(project)
    write_table_3(project, seed=7)
    write_run(project, record(name="elsewhere", split="test", standin_model=True))
    write_run(project, record(name="placed", split="test", bertscore=0.62))
    harness(project, "--format", "html")
    table = "[...document.querySelectorAll('table')].find(t => t.textContent.includes('{}'))"
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(project / "leaderboard" / "index.html")
        cells = (
            f"[...{table.format('row above')}.tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent))"
        )
        rows = browser.evaluate(cells)
        assert len(rows) == 6
        assert rows[0][2] == "imageclef2023/table3: opt_224-s42 \u2212 qformer_224-s42"
        assert rows[0][3] == "+0.0520"
        said = "significant: opt_224-s42 higher, p = 0.0002, corrected = 0.0006"
        assert rows[0][5].replace("\u00a0", " ") == said
        assert rows[2][5].startswith("no difference shown, p\u00a0=\u00a0")
        placed = f"[...{table.format('would have beaten')}.tBodies[0].rows].map(r => r.textContent)"
        (line,) = browser.evaluate(placed)
        assert line.startswith("(3)placed")
        assert "bertscore: AUEB-NLP-Group, PCLmed, VCMI" in line
        assert "c0ffeec0ff" in line
        seeds = f"[...{table.format('variant')}.tBodies[0].rows].map(r => r.cells[3].textContent)"
        assert browser.evaluate(seeds) == ["7, 42"] * 4
        headings = "[...document.querySelectorAll('h3')].map(h => h.textContent)"
        for words in ("Our runs on validation that are not ranked", "Our runs on test that are not ranked"):
            assert words in browser.evaluate(headings)
        assert browser.evaluate("document.querySelectorAll('table:not([aria-labelledby])').length") == 0
        assert (
            browser.evaluate("document.querySelectorAll('tbody tr:not(:has(> th[scope=row]))').length") == 0
        )
        browser.evaluate("document.getElementById('metric').focus()")
        for wanted in ("scroll", "rank", "team"):
            browser.press("Tab", 9)
            active = "document.activeElement"
            assert browser.evaluate(f"{active}.className || {active}.textContent") == wanted
            assert browser.evaluate(f"getComputedStyle({active}).outlineStyle") == "solid"
        browser.press("Enter", 13, "\r")
        assert browser.evaluate(f"{active}.closest('th').getAttribute('aria-sort')") == "ascending"
        browser.choose("experiment", "elsewhere")
        assert not any("Table 3 changes" in words for words in browser.evaluate(headings))
        assert browser.problems == []
