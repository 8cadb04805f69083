"""Concept F1 against sklearn, CIDEr against pycocoevalcap; CLIPScore's text and pixels against OpenAI's."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from harness import metrics
from harness.metrics import base, clipscore, concepts, lexical, text
from harness.metrics.settings import ScoreConfig

CUIS = st.frozensets(st.sampled_from([*sorted(concepts.SECONDARY)[:6], "C0000001", "C0000002", "C0000003"]))


@pytest.mark.ci
@settings(max_examples=200, deadline=None)
@given(CUIS, CUIS)
def test_concept_f1_equals_sklearn(prediction, reference):
    from sklearn.metrics import f1_score

    union = sorted(prediction | reference)
    if not union:
        assert concepts.f1(prediction, reference) == 1.0
        return
    truth, guess = ([concept in found for concept in union] for found in (reference, prediction))
    expected = f1_score(truth, guess, average="binary", zero_division=0)
    assert concepts.f1(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_the_primary_score_is_over_all_concepts_and_the_secondary_over_fifteen():
    guesses = [{"C0024485"}, {"C0040405", "C0000001"}]
    truth = [{"C0024485", "C0000001"}, {"C0040405"}]
    scores = metrics.score_concepts(guesses, truth, truth, 2023, bootstrap=50)
    assert scores["f1"].per_image == pytest.approx([2 / 3, 2 / 3])
    assert scores["f1_secondary"].per_image.tolist() == [1.0, 1.0]
    assert len(concepts.SECONDARY) == 15
    lacking = metrics.score_concepts(guesses, truth, None, 2026)
    assert lacking["f1"].signature == "f1|clef2026|all concepts|like:sklearn"
    assert lacking["f1_secondary"].value is None
    assert "manual" in lacking["f1_secondary"].reason


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(CUIS, CUIS), min_size=1, max_size=8))
def test_concept_scores_equal_the_organisers_loop(rows):
    """Per image sklearn's binary F1 over the union of its concepts; then the mean over images."""
    from sklearn.metrics import f1_score

    expected = []
    for prediction, reference in rows:
        union = sorted(prediction | reference)
        vectors = [[concept in side for concept in union] for side in (reference, prediction)]
        expected.append(f1_score(*vectors, average="binary") if union else 1.0)
    guesses, truth = zip(*rows, strict=True)
    for year in (2022, 2023, 2024, 2025, 2026):
        found = metrics.score_concepts(guesses, truth, None, year, bootstrap=0)["f1"]
        assert found.value == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A photo depicts  CT\tscan ", "a photo depicts ct scan"),
        ("T1 &amp;lt; T2 &amp; PD", "t1 < t2 & pd"),
        ("aneurysmâ€™s neck", "aneurysm's neck"),
        ("“double‑wall”", '"double‑wall"'),
    ],
)
def test_clip_text_is_cleaned_as_openai_does(raw, clean):
    """The right sides are simple_tokenizer.py's `whitespace_clean(basic_clean(text)).lower()`, by hand."""
    assert clipscore.clean(raw) == clean


@pytest.mark.parametrize("size", [(300, 300), (384, 256), (256, 448), (224, 224)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_clip_pixels_equal_the_processor_where_the_margins_are_even(tmp_path, size, mode):
    """transformers rounds odd margins down, OpenAI's torchvision to even; elsewhere they are one."""
    from transformers import CLIPImageProcessor

    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(noise).convert(mode).save(path)
    expected = CLIPImageProcessor()(Image.open(path).convert("RGB"), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(clipscore.pixels(path, 224), expected, atol=1e-5)


def test_clip_pixels_of_16_bit_grey_are_not_all_white(tmp_path):
    ramp = np.linspace(0, 4000, 300 * 300, dtype=np.uint16).reshape(300, 300)
    Image.fromarray(ramp).save(tmp_path / "ct.png")
    found = clipscore.pixels(tmp_path / "ct.png", 224)
    assert np.ptp(found) > 3


def cider_oracle(predictions: list[str], references: list[str]) -> np.ndarray:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for prediction, reference in zip(predictions, references, strict=True):
        scorer += (prediction, [reference])
    return np.asarray(scorer.compute_score()[1])


def test_cider_of_random_captions_equals_pycocoevalcap():
    """Few words, so that n-grams repeat; empty captions, one row, and predictions that copy a reference."""
    draw = random.Random(0)

    def words() -> str:
        return " ".join(draw.choices("abcdefg", k=draw.choice([0, 1, 2, 5, 9, 20, 60])))

    for _ in range(60):
        references = [words() for _ in range(draw.randint(1, 30))] + ["a b c"]
        predictions = [draw.choice([words(), one, f"{one} zz zz"]) for one in references]
        expected = cider_oracle(predictions, references)
        np.testing.assert_allclose(lexical.cider_scores(predictions, references), expected, rtol=0, atol=1e-9)


def test_cider_with_other_documents_equals_pycocoevalcap_with_their_frequencies():
    """Document frequencies of training captions, for rewards and for comparing candidates."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    draw = random.Random(1)

    def words() -> str:
        return " ".join(draw.choices("abcdefgh", k=draw.choice([0, 1, 2, 5, 9, 20])))

    for _ in range(20):
        documents = [words() for _ in range(draw.randint(1, 30))] + ["a b c"]
        references = [words() for _ in range(draw.randint(1, 10))]
        predictions = [draw.choice([words(), one, f"{one} zz zz"]) for one in references]
        counted, oracle = CiderScorer(), CiderScorer()
        for document in documents:
            counted += (document, [document])
        for prediction, reference in zip(predictions, references, strict=True):
            oracle += (prediction, [reference])
        counted.compute_doc_freq()
        oracle.document_frequency = counted.document_frequency
        oracle.ref_len = np.log(float(len(documents)))
        # the original sets `ref_len` from its own references at the start of `compute_cider`
        oracle.crefs = LengthOf(oracle.crefs, len(documents))
        found = lexical.cider_scores(predictions, references, documents)
        np.testing.assert_allclose(found, oracle.compute_cider(), rtol=0, atol=1e-9)


def test_documents_are_counted_once_and_other_rows_change_no_bit(monkeypatch):
    """Two calls with the same documents, as a self-critical training makes in each step."""
    draw, made = random.Random(2), []
    captions = [" ".join(draw.choices("abcdefgh", k=9)) for _ in range(60)]
    documents = base.Documents(captions[:30])
    counting = base.Frequencies.__init__
    monkeypatch.setattr(
        base.Frequencies, "__init__", lambda self, given: (made.append(1), counting(self, given))[1]
    )

    def cider(rows: slice) -> np.ndarray:
        ours, theirs = captions[rows], [f"{caption} zz" for caption in captions[::-1][rows]]
        inputs = base.Inputs(ours, theirs, None, ScoreConfig(), 2023, documents=documents)
        return lexical.cider(inputs).per_image

    whole, part = cider(slice(0, 60)), cider(slice(20, 50))
    assert made == [1]
    assert part.tolist() == whole[20:50].tolist()
    assert whole.min() > 0


class LengthOf(list):
    """A list with another length."""

    def __init__(self, content: list, length: int) -> None:
        super().__init__(content)
        self.length = length

    def __len__(self) -> int:
        return self.length


def test_cider_of_real_captions_equals_pycocoevalcap_and_is_five_times_as_fast(shared):
    def captions(name: str) -> list[str]:
        lines = (shared / "data" / "roco_captions" / name).read_text(encoding="utf-8").split("\n")[1:2001]
        return [text.official(line.split("\t")[1]) for line in lines]

    predictions, references = captions("predictions_dropped.tsv"), captions("references.tsv")
    predictions[5] = references[9] = ""
    predictions[20:40], references[20:40] = predictions[:20], references[:20]
    begun = time.process_time()
    found = lexical.cider_scores(predictions, references)
    ours = time.process_time() - begun
    expected = cider_oracle(predictions, references)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert expected.mean() > 1
    assert 5 * ours < time.process_time() - begun - ours
