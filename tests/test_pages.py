"""The page of a run in a real browser: mouse and keys, hostile text, large sets, a phone."""

import csv
import json
import time
from collections import Counter
from pathlib import Path

import pytest
from rouge_score import tokenizers
from support import pages
from support.pages import button, check_readable, tabbed
from support.reports import captions, record, score, write_data, write_run

from harness import leaderboard, report
from harness.decoding.postprocess import deduplicate

browser = pages.browser  # the fixture
HOSTILE = (
    "</script><script>window.evil=1</script>",
    "<img src=x onerror=window.evil=2>",
    "<!-- <script> {{data}} {{common}}",
    "one\u2028two\u2029three",
    "\u202edesrever \u2066isolated",
    "'\"><svg onload=window.evil=3> &lt;b&gt;",
)


def written_out(text: str) -> str:
    return text.translate({ord(c): f"\\u{ord(c):04x}" for c in "\u2028\u2029\u202e\u2066"})


IDS = "[...document.querySelectorAll('#list h3')].map((one) => one.textContent)"
STATUS = "document.getElementById('status').textContent"


@pytest.mark.ci
def test_sorting_searching_filtering_and_paging_with_mouse_and_keys(tmp_path, browser):
    found = captions(45)
    write_data(tmp_path, found)
    for n in (3, 4):  # captions that post-processing left alone
        found[n]["before"] = found[n]["after"]
    page = report.write(write_run(tmp_path, record(), found))
    scores = [[(caption["scores"][at], n) for n, caption in enumerate(found)] for at in (0, 1)]
    worst, best = (
        [f"valid_{n}" for _, n in sorted(scores[0], key=key)] for key in (None, lambda s: (-s[0], s[1]))
    )
    browser.open(page)
    assert browser.evaluate(IDS) == worst[:20], "first of all the worst by the score that ranks"
    assert browser.evaluate(STATUS) == "1 to 20 of 45 captions"
    browser.click(button("best first", "#captions"))
    assert browser.evaluate(IDS) == best[:20]
    browser.click(button("Next", "#pages-above"))
    assert browser.evaluate(IDS) == best[20:40]
    browser.click(button("Last", "#pages-below"))
    assert browser.evaluate(IDS) == best[40:]
    assert browser.evaluate(STATUS) == "41 to 45 of 45 captions"
    browser.click(button("Next", "#pages-below"))
    assert browser.evaluate(IDS) == best[40:], "there is no page after the last"
    browser.click(button("First", "#pages-below"))
    browser.choose("sort", "score rouge1")
    assert (
        browser.evaluate(IDS)
        == [f"valid_{n}" for _, n in sorted(scores[1], key=lambda s: (-s[0], s[1]))][:20]
    )
    browser.type("document.getElementById('search')", "NUMBER 44")
    assert browser.evaluate(IDS) == ["valid_44"]
    assert browser.evaluate(STATUS) == "1 to 1 of 1 caption, out of 45"
    browser.type("document.getElementById('search')", "skull valid_1")
    assert sorted(browser.evaluate(IDS)) == [f"valid_{n}" for n in (1, 10, 13, 16, 19)], "concepts by name"
    browser.type("document.getElementById('search')", "C0000003 nowhere")
    assert browser.evaluate(STATUS) == "0 captions, out of 45"
    browser.type("document.getElementById('search')", "")
    browser.choose("filter", "same")
    assert sorted(browser.evaluate(IDS)) == ["valid_3", "valid_4"]
    browser.choose("filter", "all")
    browser.choose("concept", "2")
    assert browser.evaluate(STATUS) == "1 to 15 of 15 captions, out of 45"
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()], "no request leaves the page"


def test_every_control_is_reached_by_keyboard_and_shows_its_focus(tmp_path, browser):
    write_data(tmp_path, captions(25))
    browser.open(report.write(write_run(tmp_path, record(), captions(25))))
    reached = tabbed(browser, "captions-title", 8)
    assert reached == ["search", "sort", "low", "high", "filter", "concept", "First", "Previous"]
    browser.evaluate(f"{button('Next', '#pages-above')}.focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate(STATUS) == "21 to 25 of 25 captions"
    for what, has in (
        ("table", "one.tHead && one.querySelector('th[scope=row]')"),
        ("#list img", "one.alt && one.loading === 'lazy'"),
        ("#lengths svg[role]", "one.getAttribute('aria-label')"),
    ):
        found = browser.evaluate(f"[...document.querySelectorAll('{what}')].map((one) => Boolean({has}))")
        assert found, what
        assert all(found), what


@pytest.mark.ci
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast_and_a_phone_shows_it(scheme, tmp_path, browser):
    write_data(tmp_path, captions(25))
    stage = {"bertscore": score(0.4, official=False), "rouge1": score(0.3)}
    for seed in (1, 2):
        run = record(seed=seed, scores={"valid": {"before": stage, "after": stage}})
        written = [report.write(write_run(tmp_path, run, captions(25)))]
    board = leaderboard.board(2023, tmp_path / "runs", tmp_path / "leaderboard")
    written.append(leaderboard.write_page([board], tmp_path / "leaderboard"))
    check_readable(browser, written, scheme)


def test_hostile_text_stays_text(tmp_path, browser):
    found = captions(len(HOSTILE))
    for caption, text in zip(found, HOSTILE, strict=True):
        caption |= {"reference": text, "before": f"{text} again and again", "after": text}
    mean = {"warnings": list(HOSTILE), "command": HOSTILE[0], "environment": {HOSTILE[1]: HOSTILE[2]}}
    stage = {HOSTILE[1]: score(None, reason=HOSTILE[0]), "rouge1": score(0.5, signature=HOSTILE[1])}
    run = record(**mean, scores={"valid": {"before": stage, "after": stage}})
    ids = [text.replace("\u2028", " ").replace("\u2029", " ") for text in HOSTILE]
    page = report.write(write_run(tmp_path, run, found, ids))
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 3
    assert not any(line in text for line in HOSTILE if "evil" in line)
    data = text.partition('type="application/json">')[2].partition("</script>")[0]
    assert data.isascii()
    assert not set("<>&") & set(data)
    browser.open(page)
    browser.choose("sort", "order")
    shown = [written_out(text) for text in HOSTILE]
    for at in (0, 1):  # reference and prediction
        lists = "[...document.querySelectorAll('#list dl')]"
        texts = f"{lists}.map((one) => one.querySelectorAll('dd')[{at}].textContent)"
        assert browser.evaluate(texts) == shown
    assert browser.evaluate(IDS) == [written_out(text) for text in ids]
    assert browser.evaluate("document.querySelectorAll('#list dd.caption *:not(del, mark)').length") == 0
    for node in ("dd.caption", "h3 bdi"):  # an override of the direction ends where the text does
        assert (
            browser.evaluate(f"getComputedStyle(document.querySelector('#list {node}')).unicodeBidi")
            == "isolate"
        )
    warnings = "[...document.querySelectorAll('.warnings li')].map((one) => one.textContent)"
    assert browser.evaluate(warnings) == shown
    assert browser.evaluate("document.querySelectorAll('script, svg[onload], img').length") == 3
    assert browser.evaluate("window.evil") is None
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]


def test_removed_words_are_struck_through_and_no_others(tmp_path, browser):
    with (Path(__file__).parent / "golden" / "dedup_table2.csv").open(encoding="utf-8", newline="") as text:
        golden = [(row["before"], row["after"]) for row in csv.DictReader(text)]
    ours = [
        "a a chest chest radiograph",
        "no words go",
        "the first the second the first the second the first the second",
    ]
    pairs = [*golden, *((before, deduplicate(before)) for before in ours)]
    found = [
        {**caption, "before": b, "after": a}
        for caption, (b, a) in zip(captions(len(pairs)), pairs, strict=True)
    ]
    browser.open(report.write(write_run(tmp_path, record(), found)))
    browser.choose("sort", "order")
    cards = browser.evaluate(
        """[...document.querySelectorAll('#list > li')].map((one) => {
          const line = one.querySelectorAll('dd')[2];
          if (!line) return null;
          const kept = line.cloneNode(true);
          kept.querySelectorAll('del').forEach((gone) => gone.remove());
          const styles = [...line.querySelectorAll('del')].map((gone) => getComputedStyle(gone));
          return [line.textContent, kept.textContent, styles.map((style) => style.textDecorationLine)];
        })"""
    )

    def bare(text: str) -> list[str]:
        return [word.strip(".,").casefold() for word in text.split()]

    for (before, after), card in zip(pairs, cards, strict=True):
        assert (card is None) == (bare(before) == bare(after)), "shown where words differ"
        if card is None:
            continue
        whole, kept, lines = card
        assert whole == before
        assert bare(kept) == bare(after)
        assert set(lines) <= {"line-through"}
        assert lines
    assert None in cards


def test_words_that_reference_and_prediction_share_are_marked_as_often_as_in_both(tmp_path, browser):
    pairs = [
        ("The left lung, and the left hilum.", "Left left LEFT lung of the hilum"),
        ("Nothing alike", "entirely other words"),
        ("Fluid (arrow) is seen.", "arrow: fluid"),
    ]
    found = [
        {**caption, "reference": reference, "before": said, "after": said}
        for caption, (reference, said) in zip(captions(len(pairs)), pairs, strict=True)
    ]
    browser.open(report.write(write_run(tmp_path, record(), found)))
    browser.choose("sort", "order")
    marked = browser.evaluate(
        """[...document.querySelectorAll('#list > li')].map((one) =>
          [...one.querySelectorAll('dd')].map((text) =>
            [...text.querySelectorAll('mark')].map((mark) => mark.textContent).join(' ')))"""
    )
    tokens = tokenizers.DefaultTokenizer(use_stemmer=False).tokenize
    for (reference, said), (one, other) in zip(pairs, marked, strict=True):
        shared = Counter(tokens(reference)) & Counter(tokens(said))
        assert Counter(tokens(one)) == Counter(tokens(other)) == shared


def test_each_loss_of_each_stage_has_its_own_chart_and_one_point_has_none(tmp_path, browser):
    run = record()
    folder = write_run(tmp_path, run, captions(2))
    at = {"stage": 1, "epoch": 1}
    rows = [
        {"step": n, **at, "loss": 8 - n / 9, "caption_loss": 1 - n / 90, "concept_loss": 7.0 - n / 10}
        for n in range(1, 10)
    ]
    rows += [{"step": 9, **at, "valid_loss": 0.8}]
    at["stage"] = 2
    rows += [{"step": n, **at, "loss": 0.5 - n / 100, "caption_loss": 0.5 - n / 100} for n in range(10, 20)]
    rows += [{"step": 19, **at, "valid_loss": 0.4, "valid_rouge1": 0.3}]
    losses = tmp_path / "runs" / run["steps"]["train"] / "losses.jsonl"
    losses.parent.mkdir()
    losses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    browser.open(report.write(folder))
    titles = "[...document.querySelectorAll('#training .charts h3')].map((one) => one.textContent)"
    assert browser.evaluate(titles) == [
        "Caption loss, stage 1, nats per token",
        "Concept loss, stage 1, nats per token",
        "Caption loss, stage 2, nats per token",
    ]
    ticks = """[...document.querySelectorAll('#training .charts svg[role]')].map((one) =>
      [...one.querySelectorAll('text[text-anchor=end]')].map((tick) => Number(tick.textContent)))"""
    first, second, third = browser.evaluate(ticks)
    assert max(first) <= 1 < min(second)
    assert max(third) < 0.5
    assert "0.3000" in browser.evaluate("document.querySelector('#training table').textContent")
    assert browser.problems == []


def test_the_page_opens_with_scores_and_examples_and_ends_with_the_config(tmp_path, browser):
    found = captions(31)
    for caption in found[::2]:
        caption["cuis"] = ["C1306645"]
    write_data(tmp_path, found)
    browser.open(report.write(write_run(tmp_path, record(), found)))
    shown = browser.evaluate("[...document.querySelectorAll('main > [id]')].map((one) => one.id)")
    assert shown[:3] == ["overview", "examples", "scores"]
    assert shown[-1] == "config"
    tiles = browser.evaluate("[...document.querySelectorAll('.tiles li')].map((one) => one.textContent)")
    assert tiles[0] == "bertscore0.6100[0.6000, 0.6200]"
    assert tiles[1].startswith("image gap+0.0500[0.0100, 0.0900]")
    kinds = "[...document.querySelectorAll('.openers h3')].map((one) => one.textContent)"
    assert browser.evaluate(kinds) == ["Best", "Worst", "At random"]
    assert browser.evaluate("document.querySelectorAll('.openers img').length") == 6
    names = "[...document.querySelectorAll('#groups svg title')].map((one) => one.textContent)"
    values = "[...document.querySelectorAll('#groups svg text.axis')].map((one) => one.textContent)"
    by_bertscore, before = sorted(browser.evaluate(names)), browser.evaluate(values)
    assert {"X-ray (16)", "other/unknown (15)"} < set(by_bertscore)
    browser.choose("group-metric", "rouge1")
    assert sorted(browser.evaluate(names)) == by_bertscore
    assert browser.evaluate(values) != before
    assert browser.evaluate("document.querySelectorAll('#groups .dot').length") == len(by_bertscore)
    assert browser.problems == []


@pytest.mark.slow
def test_ten_thousand_captions_open_and_sort_quickly(tmp_path, browser):
    found = captions(10_000)
    write_data(tmp_path, found)
    began = time.monotonic()
    page = report.write(write_run(tmp_path, record(), found))
    written = time.monotonic() - began
    opened = browser.open(page)
    assert opened < 10
    assert browser.evaluate(STATUS) == "1 to 20 of 10,000 captions"
    assert "images are too many to embed" in browser.evaluate("document.getElementById('notes').textContent")
    times = {}
    for name, act in (
        ("sort", lambda: browser.click(button("best first", "#captions"))),
        ("search", lambda: browser.type("document.getElementById('search')", "r 9999")),
    ):
        began = time.monotonic()
        act()
        assert browser.evaluate(IDS)
        times[name] = round(time.monotonic() - began, 3)
    assert browser.evaluate(IDS) == ["valid_9999"]
    image = "document.querySelector('#list img')"
    browser.evaluate(f"{image}.scrollIntoView()")
    assert browser.evaluate(f"{image}.decode().then(() => {image}.naturalWidth)") == 300, (
        "shown from its file"
    )
    assert browser.problems == []
    assert all(url.startswith("file:") for url in browser.requests)
    print(
        f"{page.stat().st_size / 1e6:.1f} MB, written in {written:.1f} s, opened in {opened:.2f} s, {times}"
    )


@pytest.mark.ci
def test_a_phone_and_a_page_of_200_images(tmp_path, browser):
    found = captions(200)
    write_data(tmp_path, found)
    page = report.write(write_run(tmp_path, record(), found))
    assert page.stat().st_size < 15e6
    assert browser.open(page) < 2
    browser.resize(375, 800)
    try:
        assert browser.evaluate("document.documentElement.scrollWidth") <= 375
        image = "document.querySelector('#list img')"
        assert browser.evaluate(f"{image}.decode().then(() => {image}.naturalWidth)") == report.SIDE
        assert browser.problems == []
    finally:
        browser.resize(1280, 900)


def test_the_leaderboard_draws_the_chosen_metric_and_leads_to_the_report(tmp_path, browser):
    for variant, bertscore, rouge1 in (("one", 0.4, 0.3), ("two", 0.5, 0.2)):
        stage = {"bertscore": score(bertscore), "rouge1": score(rouge1)}
        report.write(write_run(tmp_path, record(variant, scores={"valid": {"after": stage}}), captions(2)))
    board = leaderboard.board(2023, tmp_path / "runs", tmp_path / "leaderboard")
    browser.open(leaderboard.write_page([board], tmp_path / "leaderboard"))
    names = "[...document.querySelectorAll('svg title')].map((one) => one.textContent)"
    assert browser.evaluate(names) == ["small/two-s42, validation", "small/one-s42, validation"]
    browser.choose("metric", "rouge1")
    assert browser.evaluate(names) == ["small/one-s42, validation", "small/two-s42, validation"]
    lines = "[...document.querySelectorAll('tr')].find((one) => one.textContent.includes('two-s42'))"
    assert browser.problems == []
    browser.follow(f"[...{lines}.querySelectorAll('a')].find((one) => one.textContent === 'report')")
    assert browser.evaluate("document.title") == "small/two-s42"
    assert browser.problems == []


def test_every_number_by_a_standin_has_a_star(tmp_path, browser):
    stage = {"bertscore": score(0.61, official=False), "rouge1": score(0.25)}
    gap = {"value": 0.25, "permuted": 0.2, "gap": 0.05, "low": 0.01, "high": 0.09}
    run = record(
        scores={"valid": {"before": stage, "after": stage}},
        image_gap={"bertscore": gap, "rouge1": gap, "n": 3},
    )
    found = captions(3)
    write_data(tmp_path, found)
    browser.open(report.write(write_run(tmp_path, run, found)))
    rows = "[...document.querySelectorAll('tr')].filter((row) => row.cells[0].textContent === '{}')"
    numbers = f"{rows}.map((row) => [...row.querySelectorAll('td.number')].map((cell) => cell.textContent))"
    starred, plain = (browser.evaluate(numbers.format(name)) for name in ("bertscore", "rouge1"))
    assert [len(row) for row in starred] == [len(row) for row in plain] == [5, 3, 2, 2, 2]
    assert all("*" in cell for row in starred[1:] for cell in row)
    assert not any("*" in cell for row in plain for cell in row)


def test_a_run_that_failed_opens_with_the_reason(tmp_path, browser):
    failure = {"step": "train", "reason": "the loss is not finite", "hint": "Lower train.learning_rate."}
    run = record(status="FAILED", failure=failure, scores={}, image_gap=None, baseline=None, steps={})
    browser.open(report.write(write_run(tmp_path, run, [])))
    said = browser.evaluate("document.getElementById('overview').textContent")
    assert all(text in said for text in ("FAILED", "train", failure["reason"], failure["hint"]))
    assert browser.evaluate("document.getElementById('examples')") is None
    assert browser.problems == []


def test_a_run_without_training_says_so(tmp_path, browser):
    run = record(changes={"train": {"stages": []}}, steps={})
    browser.open(report.write(write_run(tmp_path, run, [])))
    assert "Nothing is trained in this run" in browser.evaluate("document.body.textContent")
