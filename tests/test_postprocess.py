"""De-duplication against the paper's Table 2, 8,180 real captions, and any Unicode text."""

import csv
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.decoding.postprocess import PostprocessConfig, deduplicate, postprocess

GOLDEN = Path(__file__).parent / "golden" / "dedup_table2.csv"
REAL = Path(__file__).parents[2] / "shared" / "data" / "roco_captions" / "references.tsv"
TABLE2 = list(csv.DictReader(GOLDEN.read_text(encoding="utf-8").splitlines()))

WORDS = st.sampled_from(
    [
        "the",
        "of",
        "left",
        "lung",
        "lungs",
        "ap",
        "a",
        "ct,",
        "mass.",
        "mass",
        "(arrow)",
        "3",
        "×",
        "A",
        "a,",
        "the,",
        "t",
        "x",
    ]
)
PHRASES = st.lists(WORDS, min_size=1, max_size=6)
REPETITIVE = st.lists(st.tuples(PHRASES, st.integers(1, 7)), min_size=1, max_size=8).map(
    lambda parts: " ".join(" ".join(phrase * times) for phrase, times in parts)
)


@pytest.mark.parametrize("row", TABLE2, ids=[row["ID"] for row in TABLE2])
def test_table_2_of_the_paper_exactly(row):
    assert deduplicate(row["before"]) == row["after"]
    assert deduplicate(row["after"]) == row["after"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("heaaaaart of a dog!!!!!", "heart of a dog!"),
        ("ct hahahahaha of the chest", "ct ha of the chest"),
        ("ct of the the chest", "ct of the chest"),
        ("fracture of the humerus humerus humerus humerus humerus", "fracture of the humerus."),
        ("ct of the left kidney left kidney left kidney left kid", "ct of the left kidney."),
        ("the right lung, the right lung.", "the right lung."),
        ("left and right kidney right kidney right kidney right kidney", "left and right kidney."),
        ("A mass is seen. No fracture. A mass is seen. A mass is seen.", "A mass is seen. No fracture."),
        ("scan of the liver. Scan of the liver. Scan of the liver", "scan of the liver."),
        ("ct with a a small hernia", "ct with a small hernia"),
        ("A a mass is seen. A a cyst", "A mass is seen. A cyst"),
        ("ct with a, a small hernia", "ct with a small hernia"),
        ("ct with a, a, a small hernia", "ct with a small hernia"),
        ("the wall of the, the abdomen", "the wall of the abdomen"),
        ("hepatitis c c of the liver", "hepatitis c of the liver"),
        ("axial T2-weighted T2-weighted image", "axial T2-weighted image"),
        ("the patient's patient's left x-ray x-ray of", "the patient's left x-ray of"),
        ("η η αορτή αορτή του ασθενούς", "η αορτή του ασθενούς"),
        ("e\u0301chographie e\u0301chographie du foie", "e\u0301chographie du foie"),
        ("हृदय हृदय का चित्र", "हृदय का चित्र"),
    ],
)
def test_characters_words_phrases_and_sentences(before, after):
    assert deduplicate(before, capitalise=False) == after


@pytest.mark.parametrize(
    "caption",
    [
        "A cyst of 3 × 3 × 3 cm and 10000 cells.",
        "Abdominal CT. Abdominal CT shows a stage III tumour...",
        "Inferior vena cava (CAVA), vena cava (VENA CAVA), aorta, aorta (AO)",
        "Light blue, blue and dark blue rings.",
        "pH of the fluid, 7.1",
        "Pineal cyst is present. (A) A 4 mm pars intermedia cyst.",
        "Shaft (according to method B). B = axis of the shaft.",
        "Point A A and point B B at L1 L1, type I I.",
        "A, a mass is seen; b, b lines.",
        "A lesion of 5 5 mm, 2 2 mm, 3 m m and 3 x x 4 cm, 3mm 3mm.",
        "Voxel (MNI coordinates): (-12, 20, 20); p < .001).",
    ],
)
def test_what_is_no_repetition_stays(caption):
    assert deduplicate(caption) == caption


def test_without_repetition_only_the_configured_marks_change():
    caption = "  chest \u2028 radiograph\tof a dog "
    assert deduplicate(caption) == "Chest radiograph of a dog"
    assert postprocess(caption, PostprocessConfig()) == "Chest radiograph of a dog."
    assert postprocess(caption, PostprocessConfig(full_stop=False)) == "Chest radiograph of a dog"
    assert postprocess(caption, PostprocessConfig(capitalise=False)) == "chest radiograph of a dog."
    assert postprocess("the the dog (arrow)", PostprocessConfig()) == "The the dog (arrow)."
    assert postprocess("the the dog (arrow).", PostprocessConfig(deduplicate=True)) == "The dog (arrow)."
    assert postprocess(" \x85\n", PostprocessConfig(deduplicate=True)) == ""


@pytest.mark.ci
@pytest.mark.skipif(not REAL.exists(), reason="shared/data/roco_captions is not on this machine")
def test_at_most_one_real_caption_in_a_hundred_loses_a_word():
    lines = REAL.read_text(encoding="utf-8").split("\n")[1:]
    captions = [line.split("\t", 1)[1] for line in lines if line]
    assert len(captions) > 8000
    lost = 0
    for caption in captions:
        words, left = caption.split(), deduplicate(caption).split()
        same = [word.casefold() for word in words] == [word.casefold() for word in left]
        lost += not same
    assert lost / len(captions) <= 0.01, f"{lost} of {len(captions)}"


@pytest.mark.ci
@settings(max_examples=500, deadline=None)
@given(
    st.one_of(st.text(), REPETITIVE, st.text(alphabet="aAbB .,(\nß1", max_size=60)),
    st.booleans(),
    st.booleans(),
)
def test_idempotent_and_never_empty(caption, capitalise, full_stop):
    once = deduplicate(caption, capitalise, full_stop)
    assert deduplicate(once, capitalise, full_stop) == once
    assert bool(once) == bool(caption.split())
    config = PostprocessConfig(deduplicate=True, capitalise=capitalise, full_stop=full_stop)
    assert postprocess(postprocess(caption, config), config) == postprocess(caption, config)


@settings(max_examples=300, deadline=None)
@given(REPETITIVE)
def test_says_nothing_that_was_not_said(caption):
    said = {word.strip(".,").casefold() for word in caption.split()}
    assert {word.strip(".,").casefold() for word in deduplicate(caption).split()} <= said


def test_fast_whatever_is_repeated():
    row = TABLE2[1]["before"]
    start = time.process_time()
    for _ in range(100):
        deduplicate(row)
    assert (time.process_time() - start) / 100 < 1e-2
    for caption in (
        row * 25,
        "ao aoa " * 1400,
        "a b c d e " * 1000,
        "x" * 10_000,
        "ab" * 5_000,
        "a. " * 3_333,
    ):
        start = time.process_time()
        deduplicate(caption)
        assert time.process_time() - start < 1
