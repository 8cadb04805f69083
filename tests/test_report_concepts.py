"""The page of a run that detects concepts: its contents against scikit-learn, and in a real browser."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer
from support import concept_runs, pages
from support.concept_runs import both_tasks, concepts, report_record, score, sklearn_f1, write_run
from support.pages import button, check_readable, tabbed
from support.reports import NAMES, captions, data_of, write_data

from harness import report

CUIS = [*NAMES, "C0000004", "C0000005", "C0000006"]
HOSTILE = (
    "</script><script>window.evil=1</script>",
    "<img src=x onerror=window.evil=2>",
    "‮desrever {{data}}",
)
IDS = "[...document.querySelectorAll('#image-list h3')].map((one) => one.textContent)"
browser = pages.browser  # the fixture
STATUS = "document.getElementById('image-status').textContent"


def drawn(count: int, cuis=CUIS, seed: int = 0) -> list[concept_runs.Image]:
    """Images with random concepts; the last but one is only true, the last is only predicted."""
    random_ = random.Random(seed)
    found = []
    for n in range(count):
        true = random_.sample(cuis[:-1], random_.randint(0, 3))
        predicted = random_.sample([*cuis[:-2], cuis[-1]], random_.randint(0, 3))
        found.append((f"valid_{n}", true, predicted))
    return found


def test_every_number_is_that_of_sklearn(tmp_path):
    images = drawn(60)
    write_data(
        tmp_path,
        [caption | {"cuis": true} for caption, (_, true, _) in zip(captions(60), images, strict=True)],
    )
    page = data_of(report.write(write_run(tmp_path, report_record(images), images)))["concepts"]
    binary = MultiLabelBinarizer(classes=CUIS).fit([])
    true, predicted = (binary.transform([one[at] for one in images]) for at in (1, 2))
    ratios = precision_recall_fscore_support(true, predicted, zero_division=np.nan)[:3]
    expected = {}
    for at, cui in enumerate(CUIS):
        counts = [int(true[:, at].sum()), int(predicted[:, at].sum()), int((true & predicted)[:, at].sum())]
        expected[cui] = [cui, NAMES.get(cui, ""), *counts, *(part[at] for part in ratios)]
    assert {row[0] for row in page["table"]} == set(CUIS)
    for row in page["table"]:
        absent = [np.nan if value is None else value for value in row[5:]]
        assert row[:5] == expected[row[0]][:5]
        np.testing.assert_allclose(absent, [float(value) for value in expected[row[0]][5:]], atol=5e-5)
    assert any(row[5] is None for row in page["table"]), "never predicted: no precision"
    assert any(row[6] is None for row in page["table"]), "in no image: no recall"
    wrong = [row[2] + row[3] - 2 * row[4] for row in page["table"]]
    assert wrong == sorted(wrong, reverse=True), "worst first"
    cui = [row[0] for row in page["table"]]
    for row, (key, one, other) in zip(page["rows"], images, strict=True):
        assert row["id"] == key
        assert ([cui[at] for at in row["true"]], [cui[at] for at in row["predicted"]]) == (one, other)
        assert row["f1"] == pytest.approx(sklearn_f1(one, other), abs=5e-5)
        assert "thumbnail" in row
    assert page["notes"] == []


def test_scores_baselines_and_differences_are_those_of_the_record(tmp_path):
    images = drawn(6)
    own = concepts(held=0.41, whole=0.52, n=6, secondary=None)
    page = data_of(report.write(write_run(tmp_path, report_record(images, concepts=own), images)))
    found = page["concepts"]
    f1, secondary = found["scores"]
    assert (f1["whole"]["value"], f1["held"]["value"], f1["tune"]["value"]) == (
        0.52,
        0.41,
        pytest.approx(0.63),
    )
    assert secondary["whole"]["reason"] == "no manual concepts in the data"
    one = found["baselines"][0]
    assert one["name"] == "most frequent concept"
    assert (one["whole"]["value"], one["held"]["value"]) == (0.31, pytest.approx(0.311))
    assert (one["gain"]["difference"], one["gain_held"]["p"]) == (pytest.approx(0.21), 0.0002)
    assert found["tuned"]
    assert len(found["few"]) == 2
    assert (page["tasks"], page["main_metric"]) == (["concepts"], "f1")
    assert page["siblings"]["runs"][0]["score"]["value"] == 0.41, "the half that chose nothing"
    assert page["facts"]["checkpoint"] == "tiny"
    assert "captions by" not in page["facts"]


@pytest.mark.parametrize(
    ("thresholds", "predictor", "tuned"),
    [
        ({"chosen_on": "tune"}, "knn", True),
        ({}, "knn", False),
        ({"chosen_on": "a/b-s1"}, "knn", False),
        ({}, "votes", True),
    ],
)
def test_a_score_on_images_that_chose_thresholds_is_told_so(thresholds, predictor, tuned, tmp_path):
    own = concepts(n=6, thresholds=thresholds, predictor=predictor)
    page = data_of(report.write(write_run(tmp_path, report_record(drawn(6), concepts=own), drawn(6))))
    assert page["concepts"]["tuned"] is tuned


def test_a_run_of_captions_alone_has_no_concepts_and_one_of_both_has_each_image_once(tmp_path):
    found, images = captions(4), drawn(4)
    write_data(tmp_path, found)
    page = data_of(report.write(both_tasks(images, found, tmp_path)))
    assert page["tasks"] == ["captions", "concepts"]
    assert all("thumbnail" in row for row in page["captions"]["rows"])
    assert not any("thumbnail" in row or "image" in row for row in page["concepts"]["rows"])
    assert [row["id"] for row in page["concepts"]["rows"]] == [row["id"] for row in page["captions"]["rows"]]
    assert page["concepts"]["notes"][0].startswith(
        "The data folder has changed since the run: the concepts of"
    )


def test_a_run_that_has_just_begun_and_one_without_scores(tmp_path):
    images = drawn(5)
    begun = report_record(images, status="RUNNING", steps={}, concepts=None, ended=None)
    page = data_of(report.write(write_run(tmp_path, begun, [])))
    assert page["concepts"]["notes"] == ["This run has no concepts of validation images yet."]
    assert (page["concepts"]["rows"], page["concepts"]["scores"], page["concepts"]["told"]) == ([], [], None)
    steps = {"concepts-valid": "steps/concepts-x"}
    later = report_record(
        images, "later", status="RUNNING", steps=steps, concepts={"predictor": "knn", "labels": 6}
    )
    page = data_of(report.write(write_run(tmp_path, later, images)))["concepts"]
    assert page["notes"][0] == "These concepts have no scores yet."
    assert all("true" not in row and "f1" not in row for row in page["rows"])
    counts = [row[3] for row in page["table"]]
    assert counts == sorted(counts, reverse=True)
    assert all(value is None for row in page["table"] for value in (row[2], *row[4:]))
    fitted = report_record(images, "fitted", steps=steps, concepts={"predictor": "knn"})
    fitted["unscored"] = {"valid": "trained on validation images"}
    page = data_of(report.write(write_run(tmp_path, fitted, images)))["concepts"]
    assert page["notes"][0] == "There are no references to compare with: trained on validation images."


@pytest.mark.parametrize(
    "text", ["ID,f1\nvalid_0,0.5\n", "nothing", "ID,f1,reference,prediction\nvalid_0,nan,C1,C1\n"]
)
def test_a_damaged_file_is_left_out_and_told(text, tmp_path):
    images = drawn(3)
    folder = write_run(tmp_path, report_record(images), images)
    (tmp_path / "runs" / "steps" / "score-concepts-base" / "per_image.csv").write_text(text)
    page = data_of(report.write(folder))
    assert any("left out" in warning for warning in page["warnings"]) or text == "nothing"
    assert page["concepts"]["rows"][0].keys() == {"id", "predicted"}


@pytest.mark.ci
def test_images_are_sorted_searched_and_filtered_by_concept(tmp_path, browser):
    images = drawn(45)
    write_data(tmp_path, captions(45))
    page = report.write(write_run(tmp_path, report_record(images), images))
    scores = [round(sklearn_f1(true, predicted), 4) for _, true, predicted in images]
    worst, best = (
        [f"valid_{n}" for n in sorted(range(45), key=lambda n: (sign * scores[n], n))] for sign in (1, -1)
    )
    browser.open(page)
    assert browser.evaluate(IDS) == worst[:20], "first of all the worst"
    browser.click(button("best first", "#images"))
    assert browser.evaluate(IDS) == best[:20]
    browser.click(button("Last", "#image-pages-below"))
    assert browser.evaluate(IDS) == best[40:]
    assert browser.evaluate(STATUS) == "41 to 45 of 45 images"
    places = {row[0]: str(at) for at, row in enumerate(data_of(page)["concepts"]["table"])}
    browser.choose("image-sort", "order")
    browser.click(button("lowest first", "#images"))

    def chosen(test) -> list[str]:
        return [key for key, true, predicted in images if test(set(true), set(predicted))][:20]

    cui = CUIS[0]
    browser.choose("image-concept", places[cui])
    assert browser.evaluate(IDS) == chosen(lambda true, predicted: cui in true | predicted)
    browser.choose("image-filter", "missed")
    assert browser.evaluate(IDS) == chosen(lambda true, predicted: cui in true - predicted)
    browser.choose("image-filter", "invented")
    assert browser.evaluate(IDS) == chosen(lambda true, predicted: cui in predicted - true)
    browser.choose("image-concept", "")
    assert browser.evaluate(IDS) == chosen(lambda true, predicted: predicted - true)
    browser.choose("image-filter", "right")
    assert browser.evaluate(IDS) == chosen(lambda true, predicted: true == predicted)
    browser.choose("image-filter", "all")
    browser.type("document.getElementById('image-search')", "SKULL valid_1")
    assert browser.evaluate(IDS) == [
        key for key, true, predicted in images if "C0000002" in {*true, *predicted} and "valid_1" in key
    ]
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()], "no request leaves the page"


def test_missed_and_invented_concepts_are_marked_by_words_and_frames(tmp_path, browser):
    images = [("valid_0", ["C0000001", "C0000002"], ["C0000001", "C0000003"]), ("valid_1", [], [])]
    write_data(tmp_path, captions(2))
    browser.open(report.write(write_run(tmp_path, report_record(images), images)))
    found = browser.evaluate(
        """[...document.querySelectorAll('#image-list > li')].map((card) =>
          [...card.querySelectorAll('dd')].map((list) => [...list.querySelectorAll('li')].map((one) => {
            const style = getComputedStyle(one);
            return [one.textContent, style.borderTopStyle + style.borderTopWidth];
          })))"""
    )
    right, missed, invented = "✓ChestC0000001", "missedSkullC0000002", "inventedAxialC0000003"
    assert found[0] == [
        [[right, "solid1px"], [missed, "dashed2px"]],
        [[right, "solid1px"], [invented, "solid2px"]],
    ]
    assert found[1] == [[], []], "an image with two empty lists"
    values = "[...document.querySelectorAll('#image-list .scores')].map((one) => one.textContent)"
    assert browser.evaluate(values) == ["f10.5000right1missed1invented1", "f11.0000right0missed0invented0"]


@pytest.mark.ci
def test_the_table_of_concepts_is_sorted_paged_and_leads_to_images(tmp_path, browser):
    cuis = [f"C{n:07}" for n in range(40)]
    images = drawn(300, cuis, seed=3)
    write_data(tmp_path, captions(300))
    page = report.write(write_run(tmp_path, report_record(images), images))
    rows = data_of(page)["concepts"]["table"]
    browser.open(page)
    place = "[...document.querySelectorAll('#concepts table')].at(-1)"
    shown = f"[...{place}.tBodies[0].rows].map((row) => row.cells[0].querySelector('bdi').textContent)"
    label = {row[0]: row[1] or row[0] for row in rows}
    assert browser.evaluate(shown) == [label[row[0]] for row in rows[:15]]
    browser.click(button("Last", "#concepts .pages"))
    assert browser.evaluate(shown) == [label[row[0]] for row in rows[30:]]

    def header(name: str) -> str:
        return f"[...{place}.tHead.querySelectorAll('button')].find((one) => one.textContent === '{name}')"

    browser.click(header("precision"))

    def by(at, sign):
        return sorted(rows, key=lambda row: (row[at] is None, sign * (row[at] or 0)))

    assert browser.evaluate(shown) == [label[row[0]] for row in by(5, -1)[:15]]
    browser.click(header("precision"))
    assert browser.evaluate(shown) == [label[row[0]] for row in by(5, 1)[:15]]
    assert browser.evaluate(f"{header('precision')}.parentElement.getAttribute('aria-sort')") == "ascending"
    browser.click(button("Last", "#concepts .pages"))
    assert browser.evaluate(shown)[-1] == label[by(5, 1)[-1][0]], "absent numbers come last"
    assert by(5, 1)[-1][5] is None
    browser.type("document.getElementById('table-search')", "c0000017")
    assert browser.evaluate(shown) == ["C0000017"]
    browser.click(f"{place}.tBodies[0].querySelector('button')")
    wanted = [key for key, true, predicted in images if "C0000017" in {*true, *predicted}]
    assert browser.evaluate(STATUS).endswith(f"of {len(wanted)} images, out of 300")
    assert browser.evaluate("document.activeElement.id") == "image-title"
    assert browser.problems == []


def test_only_the_sections_of_the_tasks_are_on_the_page(tmp_path, browser):
    sections = "[...document.querySelectorAll('main > section')].map((one) => one.id)"
    links = "[...document.querySelectorAll('nav a')].map((one) => one.getAttribute('href').slice(1))"
    write_data(tmp_path, captions(4))
    alone = report.write(write_run(tmp_path, report_record(drawn(4), "alone"), drawn(4)))
    browser.open(alone)
    assert browser.evaluate(sections) == ["examples", "concepts", "training", "images", "origin", "config"]
    assert sorted(browser.evaluate(links)) == sorted(browser.evaluate(sections))
    titles = browser.evaluate("[...document.querySelectorAll('h2, h3, dt')].map((one) => one.textContent)")
    assert not any("caption" in title.lower() for title in titles)
    text = browser.evaluate("document.body.innerText")
    assert "Thresholds (per_concept) chosen on the half tune of valid" in text
    browser.open(report.write(both_tasks(drawn(4), captions(4), tmp_path)))
    assert browser.evaluate(sections) == [
        *("examples", "scores", "groups", "concepts", "training", "lengths", "captions", "images"),
        *("origin", "config"),
    ]
    assert browser.evaluate("document.querySelectorAll('#list img').length") == 4
    assert browser.evaluate("document.querySelectorAll('#image-list img').length") == 4, (
        "the images of the captions"
    )
    assert browser.problems == []


@pytest.mark.ci
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast_and_a_phone_shows_it(scheme, tmp_path, browser):
    images = drawn(25)
    write_data(tmp_path, captions(25))
    own = concepts(n=25)
    own["scores"]["valid"]["f1_secondary"] = score(0.8, 20, official=False)
    written = [
        report.write(
            write_run(tmp_path, report_record(images, "alone", concepts=own, warnings=["one"]), images)
        ),
        report.write(both_tasks(images, captions(25), tmp_path)),
    ]
    check_readable(browser, written, scheme)


def test_every_control_is_reached_by_keyboard_and_shows_its_focus(tmp_path, browser):
    write_data(tmp_path, captions(25))
    browser.open(report.write(write_run(tmp_path, report_record(drawn(25)), drawn(25))))
    reached = [name.replace("image-", "") for name in tabbed(browser, "image-title", 8)]
    assert reached == ["search", "sort", "low", "high", "concept", "filter", "First", "Previous"]
    browser.evaluate(f"{button('Next', '#image-pages-above')}.focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate(STATUS) == "21 to 25 of 25 images"


def test_hostile_names_and_ids_stay_text(tmp_path, browser):
    images = [(key, ["C0000001", "C0000002"], ["C0000003", HOSTILE[0]]) for key in HOSTILE]
    root = write_data(tmp_path, captions(3))
    names = dict(zip(NAMES, HOSTILE, strict=True))
    mapping = "".join(f"{cui}\t{name}\n" for cui, name in names.items())
    next(root.glob("*cui_mapping.csv")).write_text(mapping, encoding="utf-8")
    own = concepts(n=3)
    own["thresholds"]["told"] = HOSTILE[1]
    own["scores"]["valid"][HOSTILE[1]] = score(None, 3, reason=HOSTILE[0])
    own["baselines"][HOSTILE[0]] = own["baselines"]["most frequent set"]
    page = report.write(write_run(tmp_path, report_record(images, concepts=own, warnings=[*HOSTILE]), images))
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 3
    data = text.partition('type="application/json">')[2].partition("</script>")[0]
    assert not set("<>&") & set(data)
    browser.open(page)
    shown = [text.replace("‮", "\\u202e") for text in HOSTILE]
    assert sorted(browser.evaluate(IDS)) == sorted(shown)
    found = browser.evaluate(
        "[...document.querySelectorAll('#image-list li li bdi')].map((one) => one.textContent)"
    )
    assert set(found) == set(shown)
    options = "[...document.querySelectorAll('#image-concept option')].map((one) => one.textContent).join()"
    assert all(name in browser.evaluate(options) for name in shown)
    assert browser.evaluate("document.querySelectorAll('script').length") == 3
    assert browser.evaluate("document.querySelectorAll('#images [onerror], #concepts [onerror]').length") == 0
    assert browser.evaluate("window.evil") is None
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]


@pytest.mark.slow
def test_ten_thousand_images_and_2500_concepts_stay_usable(tmp_path, browser):
    cuis = [f"C{n:07}" for n in range(2_500)]
    images = drawn(10_000, cuis)
    write_data(tmp_path, captions(10_000))
    folder = write_run(tmp_path, report_record(images), images)
    began = time.monotonic()
    page = report.write(folder)
    written = time.monotonic() - began
    opened = browser.open(page)
    assert opened < 10
    assert browser.evaluate(STATUS) == "1 to 20 of 10,000 images"
    assert "too many to embed" in browser.evaluate("document.getElementById('image-notes').textContent")
    times = {}
    for name, act in (
        ("sort images", lambda: browser.click(button("best first", "#images"))),
        ("search", lambda: browser.type("document.getElementById('image-search')", "d_9999")),
        ("concept", lambda: browser.click("document.querySelector('#concepts tbody button')")),
        (
            "sort concepts",
            lambda: browser.click(
                "[...document.querySelectorAll('#concepts table')].at(-1).querySelectorAll('thead button')[7]"
            ),
        ),
    ):
        began = time.monotonic()
        act()
        assert browser.evaluate(IDS)
        times[name] = round(time.monotonic() - began, 3)
        assert times[name] < 3
    assert browser.problems == []
    print(
        f"{page.stat().st_size / 1e6:.1f} MB, written in {written:.1f} s, opened in {opened:.2f} s, {times}"
    )


def test_the_record_keeps_the_page_as_an_artifact(tmp_path):
    folder = write_run(tmp_path, report_record(drawn(3)), drawn(3))
    report.write(folder)
    record = json.loads((folder / "run.json").read_text())
    assert record["artifacts"] == {"report.html": "small/base-s42/report.html"}
    assert Path(tmp_path / "runs" / record["artifacts"]["report.html"]).is_file()
