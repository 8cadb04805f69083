"""Concept F1 against sklearn; the text and pixels of CLIPScore against OpenAI's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from harness.metrics import clipscore, concepts

CUIS = st.frozensets(st.sampled_from([*sorted(concepts.SECONDARY)[:6], "C0000001", "C0000002", "C0000003"]))


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


def test_concept_scores_follow_the_references():
    guesses = {"b": {"C0040405", "C0000001"}, "a": {"C0024485"}}
    truth = {"a": {"C0024485", "C0000001"}, "b": {"C0040405"}}
    assert concepts.scores(guesses, truth) == pytest.approx([2 / 3, 2 / 3])
    assert concepts.secondary_scores(guesses, truth).tolist() == [1.0, 1.0]
    assert len(concepts.SECONDARY) == 15


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
