"""Table 3 of the paper and our runs: differences, their significance, and the page that shows them."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support import commands, leaderboards, pages
from support.leaderboards import board, harness, record, write_run

from harness import leaderboard

project = leaderboards.project  # the fixture
browser = pages.browser  # the fixture


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


def scored_run(project: Path, variant: str, means: dict[str, float], references="r", **more) -> Path:
    """A run with the scores of 200 single images, as its score step leaves them."""
    rng = np.random.default_rng(len(variant))
    scores = {
        metric: leaderboards.scored(rng.normal(mean, 0.1, 200), metric, f"{metric}|x")
        for metric, mean in means.items()
    }
    run = record(variant=variant, **more) | {"scores": {"valid": {"after": {}}}}
    return leaderboards.write_scored(project, run, scores, references)


def write_table_3(project: Path, seed: int = 42, **references: str) -> list[Path]:
    """Rows 1 to 4: the second is far above the first, the third equals it, the fourth is a little higher."""
    means = dict(zip(ROWS_OF_TABLE_3, (0.2, 0.4, 0.4, 0.43), strict=True))
    return [
        scored_run(
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
            done = commands.harness(project, "compare", one, two, "--format", "json")
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
    scored_run(project, "alone", {"bertscore": 0.3}, seed=7, name="other", **lone)
    assert len(leaderboard.steps(board(project))) == 3
    slower = {"parameters_changed": dict(zip(KEYS, (True, 224, False), strict=True)) | {"train.epochs": 9}}
    scored_run(project, "longer", {"bertscore": 0.3}, **slower)
    assert len(leaderboard.steps(board(project))) == 3, "it differs in more than its row"
    assert leaderboard.steps(board(project, 2026)) == []


def test_the_page_says_what_the_rows_of_table_3_change_and_is_used_by_keyboard(project, browser):
    write_table_3(project)
    write_table_3(project, seed=7)
    write_run(project, record(name="elsewhere", split="test", standin_model=True))
    write_run(project, record(name="placed", split="test", bertscore=0.62))
    harness(project, "--format", "html")
    table = "[...document.querySelectorAll('table')].find(t => t.textContent.includes('{}'))"
    browser.open(project / "leaderboard" / "index.html")
    cells = f"[...{table.format('row above')}.tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent))"
    rows = browser.evaluate(cells)
    assert len(rows) == 6
    assert rows[0][2] == "imageclef2023/table3: opt_224-s42 \u2212 qformer_224-s42"
    assert rows[0][3] == "+0.0520"
    rounded = "[digits(-1e-17), signed(-1e-17), digits(-0.5), signed(-0.5)]"
    assert browser.evaluate(rounded) == ["0.0000", "+0.0000", "-0.5000", "\u22120.5000"]
    said = "significant: opt_224-s42 higher, p = 0.0002, corrected = 0.0006"
    assert rows[0][5].replace("\u00a0", " ") == said
    assert rows[2][5].startswith("no difference shown, p\u00a0=\u00a0")
    browser.click("document.getElementById('compact')")
    placed = f"[...{table.format('would have beaten')}.tBodies[0].rows].map(r => r.textContent)"
    (line,) = browser.evaluate(placed)
    assert line.startswith("3rd95 %: 3rd to 4thopt_364-s42placed")
    assert "bertscore: AUEB-NLP-Group, PCLmed, VCMI" in line
    assert "c0ffeec0ff" in line
    seeds = f"[...{table.format('variant')}.tBodies[0].rows].map(r => r.cells[3].textContent)"
    assert browser.evaluate(seeds) == ["7, 42"] * 4
    headings = "[...document.querySelectorAll('h3')].map(h => h.textContent)"
    for words in ("Not ranked, on validation", "Not ranked, on test"):
        assert words in browser.evaluate(headings)
    assert browser.evaluate("document.querySelectorAll('table:not([aria-labelledby])').length") == 0
    assert browser.evaluate("document.querySelectorAll('tbody tr:not(:has(> th[scope=row]))').length") == 0
    browser.evaluate("document.getElementById('edition').focus()")
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
