"""Reading and counting data sets: every layout, against files written by other code."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import small_sets
from support.small_sets import CONCEPTS, SMALL, config, write_2023, write_comma

from harness import data
from harness.data import statistics
from harness.data.readers import read

whole, root = small_sets.whole, small_sets.root  # fixtures

SHARED = Path(__file__).parents[2] / "shared"
MEDPIX = SHARED / "data" / "medpix2"
needs_medpix = pytest.mark.skipif(not MEDPIX.is_dir(), reason="needs ../shared/data/medpix2")


def test_a_phantom_is_drawn_checked_and_read(tmp_path):
    drawn = config(tmp_path / "set", phantom=SMALL)
    dataset = data.load(drawn, tmp_path / "runs")
    assert {split: len(rows) for split, rows in dataset.splits.items()} == {
        "train": 12,
        "valid": 6,
        "test": 4,
    }
    first = dataset.splits["train"][0]
    assert first.id == "phantom_train_000001"
    assert first.image.is_file()
    assert first.line == 2
    assert all(cui in dataset.concept_names for cui in first.cuis)
    assert all(example.caption is None and not example.cuis for example in dataset.splits["test"])
    assert dataset.left_out == ()


@pytest.mark.ci
@needs_medpix
def test_medpix_is_whole(tmp_path):
    dataset = data.load(config(MEDPIX), tmp_path)
    assert [len(dataset.splits[split]) for split in ("train", "valid", "test")] == [1653, 197, 200]
    first = dataset.splits["train"][0]
    assert first.caption == "CT of the chest reveals an obstructing mass and resultant LUL collapse."
    assert dataset.concept_names["C0205123"] == "Coronal (qualifier value)"
    assert data.load(config(MEDPIX), tmp_path) == dataset
    assert statistics.modalities(dataset)["train"] | {"CT": 0, "MRI": 0} == dict.fromkeys(
        statistics.MODALITIES.values(), 0
    )


LINE = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=("Cs",)), min_size=1)
ANY = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)
CUIS = st.lists(st.from_regex(r"C\d{7}", fullmatch=True), max_size=4)


@pytest.mark.ci
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(LINE, CUIS), min_size=1, max_size=5), end=st.sampled_from(["\n", "\r\n"]))
def test_2023_captions_are_read_as_they_stand(tmp_path, rows, end):
    """Quotes, pipes, U+2028 and their kin are parts of a caption; only the line's end is not."""
    root = tmp_path / "set"
    shutil.rmtree(root, ignore_errors=True)
    write_2023(root, rows, end)
    listing = read(root, "imageclef2023")
    assert not listing.fatal
    assert not listing.findings
    assert [(e.caption, list(e.cuis)) for e in listing.splits["valid"]] == rows
    assert [e.line for e in listing.splits["valid"]] == list(range(2, len(rows) + 2))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(ANY, CUIS), min_size=1, max_size=5))
def test_comma_captions_survive_pythons_own_writer(tmp_path, rows):
    root = tmp_path / "set"
    shutil.rmtree(root, ignore_errors=True)
    write_comma(root, rows)
    listing = read(root, "imageclef2024")
    assert not listing.fatal
    assert not listing.findings
    assert [(e.caption, list(e.cuis)) for e in listing.splits["train"]] == rows


def test_comma_captions_as_pandas_reads_them(tmp_path):
    import pandas

    captions = ["plain", 'says "here", twice', "two\nlines", "", "ends in space ", "ü → 5 µm"]
    write_comma(tmp_path, [(caption, []) for caption in captions])
    ours = read(tmp_path, "imageclef2024").splits["train"]
    theirs = pandas.read_csv(tmp_path / "train_captions.csv", keep_default_na=False)
    assert [e.caption for e in ours] == list(theirs["Caption"])
    assert [e.line for e in ours] == [2, 3, 4, 6, 7, 8]  # where each begins, after the one of two lines


def test_rocov2_with_test_captions_and_zipped_folders(tmp_path):
    write_comma(tmp_path, [("a", ["C0000001"])], ("train", "valid", "test"), "{}_images")
    (tmp_path / "train_concepts_manual.csv").write_text("ID,CUIs\ntrain_0,C9999999\n")
    listing = read(tmp_path, "rocov2")
    assert listing.concept_names == {"C0000001": "one, or first"}
    assert listing.splits["test"][0].caption == "a"
    assert listing.splits["train"][0].cuis == ("C0000001",)
    assert listing.splits["train"][0].image == tmp_path / "train_images" / "train_0.jpg"


@pytest.mark.parametrize(
    "folder", ["{}", "{}_images", "images/{}", "{0}/{0}", "{0}_images/{0}", "x_{}_images"]
)
def test_images_are_found_however_the_archive_was_unpacked(tmp_path, folder):
    write_comma(tmp_path, [("a", [])], folder=folder)
    listing = read(tmp_path, "imageclef2024")
    assert listing.files["valid", "valid_0"].path == listing.splits["valid"][0].image


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png"])
def test_other_suffixes_are_images_too(root, tmp_path, suffix):
    path = root / "train" / "phantom_train_000001.jpg"
    Image.open(path).save(path.with_suffix(".x"), "PNG" if suffix == ".png" else "JPEG")
    path.unlink()
    path.with_suffix(".x").rename(path.with_suffix(suffix))
    dataset = data.load(config(root), tmp_path / "runs")
    assert dataset.splits["train"][0].image.suffix == suffix


def test_without_an_ids_file_the_images_are_the_test_split(root, tmp_path):
    (root / "test_ids.csv").unlink()
    dataset = data.load(config(root), tmp_path / "runs")
    assert [(e.id, e.line) for e in dataset.splits["test"]] == [
        (f"phantom_test_00000{n}", None) for n in range(1, 5)
    ]


def test_without_any_test_files_the_test_split_is_empty(root, tmp_path):
    (root / "test_ids.csv").unlink()
    shutil.rmtree(root / "test")
    assert data.load(config(root), tmp_path / "runs").splits["test"] == ()


def test_statistics_count_modalities_and_words(whole, tmp_path):
    dataset = data.load(config(whole), tmp_path / "runs")
    counts = statistics.modalities(dataset)
    assert {split: sum(row.values()) for split, row in counts.items()} == {"train": 12, "valid": 6, "test": 4}
    labels = (whole / CONCEPTS.format("train")).read_text()
    assert counts["train"]["CT"] == labels.count("C0040405")
    assert counts["test"]["other/unknown"] == 4
    assert statistics.OTHER not in counts["train"]
    lengths = statistics.caption_lengths(dataset)
    assert lengths["valid"] == [len(e.caption.split()) for e in dataset.splits["valid"]]
    assert lengths["test"] == []
    picture = Image.open(statistics.plot_lengths(dataset, tmp_path / "deep" / "lengths.png"))
    assert picture.format == "PNG"
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 3
