"""Odd rows: each is used as far as possible, and no id of a split to submit is lost."""

import csv
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from support import small_sets
from support.commands import harness
from support.experiments import EXPERIMENT
from support.reports import data_of
from support.small_sets import CAPTIONS, CONCEPTS, config, edit, one, problems, write_2023, write_comma

from harness import data, leaderboard, scoring
from harness.config.editions import EDITIONS
from harness.data.captionfiles import read_ids
from harness.data.images import DAMAGE, damage, decode
from harness.errors import UserError
from harness.records.files import read_captions
from harness.submission import check

whole, root = small_sets.whole, small_sets.root  # fixtures
ROWS = [("A CT image.", ["C0000001"]), ("\u202f", []), ("An MR image.", []), ("...", ["C0000001"])]


def real_images(root: Path) -> None:
    for number, path in enumerate(sorted(root.rglob("*.jpg"))):
        Image.new("L", (8, 8), 10 * number).save(path)


# --- captions without a word -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["imageclef2023", "rocov2"])
def test_published_sets_with_a_blank_caption_pass_and_lose_no_row(tmp_path, layout):
    """As the validation labels of 2023 (CRLF, one caption is U+202F) and ROCOv2."""
    root = tmp_path / "set"
    root.mkdir()
    if layout == "rocov2":
        write_comma(root, ROWS, ("train", "valid", "test"))
    else:
        write_2023(root, ROWS, "\r\n")
    real_images(root)
    assert problems(root, tmp_path, layout=layout) == []
    found = data.load(config(root, layout=layout), tmp_path / "runs")
    assert [e.id for e in found.splits["train"]] == ["train_0", "train_2"]
    assert [e.id for e in found.splits["valid"]] == ["valid_0", "valid_1", "valid_2", "valid_3"]
    assert [e.trains for e in found.splits["valid"]] == [True, False, True, False]
    assert found.left_out == ()
    told = [str(note.problem) for note in found.notes]
    assert "set/" in told[0]
    assert "no word in the caption of train_1: training leaves the row out" in told[0]
    splits = ("train", "valid", "test") if layout == "rocov2" else ("train", "valid")
    assert [note.row for note in found.notes] == [(split, f"{split}_{n}") for split in splits for n in (1, 3)]


def test_data_check_has_notes_and_passes(tmp_path):
    (tmp_path / "set").mkdir()
    write_2023(tmp_path / "set", ROWS, "\r\n")
    real_images(tmp_path / "set")
    done = harness(tmp_path, "data", "check", "set")
    assert done.stdout.count("note: ") == 4
    assert (
        f"set/{CAPTIONS.format('valid')}:3: no word in the caption of valid_1: the row is captioned, scored"
        in (done.stdout)
    )
    assert done.stdout.splitlines()[-1].startswith("ok: no problems (images: train ")
    rows = json.loads(harness(tmp_path, "data", "check", "set", "--format", "json").stdout)
    assert [row["kind"] for row in rows] == ["note"] * 4


# --- rows that can't be read, and skip_bad ---------------------------------------------------------------


def test_a_caption_row_that_cannot_be_read_is_captioned_and_not_scored(root, tmp_path):
    edit(root / CAPTIONS.format("valid"), lambda lines: lines.__setitem__(2, lines[2] + "\tmore"))
    found = data.load(config(root, skip_bad=True), tmp_path / "runs")
    rows = {example.id: example for example in found.splits["valid"]}
    assert list(rows) == [f"phantom_valid_00000{n}" for n in range(1, 7)]
    assert rows["phantom_valid_000002"].caption is None
    assert not rows["phantom_valid_000002"].damage
    assert "not scored" in found.notes[0].problem.what


def test_concepts_that_cannot_be_read_cost_no_row_of_validation(root, tmp_path):
    edit(root / CONCEPTS.format("valid"), lambda lines: lines.pop(3))
    edit(root / CONCEPTS.format("train"), lambda lines: lines.pop(3))
    found = data.load(config(root, skip_bad=True), tmp_path / "runs")
    assert [len(found.splits[split]) for split in ("train", "valid", "test")] == [11, 6, 4]


@pytest.mark.parametrize("id", [" valid_1", "valid_1 ", "\tvalid_1", "valid_1\u00a0"])
@pytest.mark.parametrize("text", ["a word", '"a" word'])
def test_white_space_beside_an_id_costs_no_row_of_validation(tmp_path, id, text):
    write_comma(tmp_path, [("a word", [])] * 3)
    real_images(tmp_path)
    path = tmp_path / "valid_captions.csv"
    path.write_text(path.read_text().replace("valid_1,a word", f"{id},{text}"))
    assert "valid_captions.csv" in problems(tmp_path, tmp_path, layout="rocov2")[0]
    found = data.load(config(tmp_path, layout="rocov2", skip_bad=True), tmp_path / "runs")
    captions = {example.id: example.caption for example in found.splits["valid"]}
    assert captions == {
        "valid_0": "a word",
        "valid_1": "a word" if text == "a word" else None,
        "valid_2": "a word",
    }


def test_a_label_file_that_cannot_be_read_is_one_problem(root, tmp_path):
    for content in ("", "ID\tcaption\n", "image;text\n"):
        (root / CAPTIONS.format("valid")).write_text(content)
        assert one(root, tmp_path)[0] == CAPTIONS.format("valid")


def test_cr_ends_lines_where_nothing_else_does(root, tmp_path):
    for path in root.glob("*.csv"):
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r"))
    assert problems(root, tmp_path) == []


def test_an_id_with_the_ending_of_an_image_is_told_as_such(root, tmp_path):
    path = root / "test_ids.csv"
    path.write_bytes(path.read_bytes().replace(b"000002", b"000002.jpg"))
    assert one(root, tmp_path)[2].endswith("found phantom_test_000002.jpg: leave the ending out of the id")


def test_what_only_looks_like_an_id_is_no_row(tmp_path):
    """The second line of a caption whose quotes are broken begins with no id."""
    write_comma(tmp_path, [("a word", [])] * 3, ("train", "valid", "test"))
    real_images(tmp_path)
    text = 'ID,Caption\ntest_0,a\ntest_1,"b "c"\nsecond\ntest_2,c\n'
    (tmp_path / "test_captions.csv").write_text(text)
    found = data.load(config(tmp_path, layout="rocov2", skip_bad=True), tmp_path / "runs")
    assert [e.id for e in found.splits["test"]] == ["test_0", "test_1", "test_2"]
    assert [e.caption for e in found.splits["test"]] == ["a", None, "c"]


def test_a_cause_is_told_once_however_many_rows_have_it(root, tmp_path):
    edit(
        root / CAPTIONS.format("train"),
        lambda lines: lines.__setitem__(slice(2, 10), [x + "\ty" for x in lines[2:10]]),
    )
    with pytest.raises(UserError) as caught:
        data.load(config(root), tmp_path / "runs")
    (problem,) = caught.value.problems
    assert (problem.line, problem.what) == (
        3,
        "got 3 fields; 2 are allowed; and 7 more like it (lines 4, 5, 6, 7, 8, ...)",
    )
    assert len(problems(root, tmp_path)) == 8  # each for a program


def test_an_ids_file_without_ids_is_no_empty_split(root, tmp_path):
    (root / "test_ids.csv").write_text("ID\n")
    with pytest.raises(UserError, match="holds no id that can be read"):
        data.load(config(root, skip_bad=True), tmp_path / "runs")


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_split_without_any_image_that_can_be_read_stops(root, tmp_path, split):
    for path in (root / split).glob("*.jpg"):
        path.write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match=f"no (good row is left in|image of) {split}"):
        data.load(config(root, skip_bad=True), tmp_path / "runs")


# --- which file is the image of an id --------------------------------------------------------------------


def second_image(root: Path, name: str, split: str = "test") -> Path:
    first = root / split / f"phantom_{split}_000002.jpg"
    path = root / name.format(first.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(first.read_bytes())
    return path


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("name", ["{}.png", "{}.JPG", "{}.jpeg"])
def test_two_images_of_one_id_are_never_guessed_between(root, tmp_path, split, name):
    second_image(root, f"{split}/{name}", split)
    for skip in (False, True):
        with pytest.raises(UserError, match="more than one image of an id: ") as caught:
            data.load(config(root, skip_bad=skip), tmp_path / "runs")
        (problem,) = caught.value.problems
        assert f"{split}/phantom_{split}_000002.jpg" in problem.what
        assert name.format(f"{split}/phantom_{split}_000002") in problem.what


@pytest.mark.parametrize(
    "folder", ["test_images", "x_test_images", "images/test", "test/test", "test/images"]
)
def test_nor_between_folders(root, tmp_path, folder):
    second_image(root, f"{folder}/{{}}.jpg")
    with pytest.raises(UserError, match="more than one image of an id: phantom_test_000002: "):
        data.load(config(root), tmp_path / "runs")


def test_nor_in_a_split_that_has_no_list_of_ids(root, tmp_path):
    (root / "test_ids.csv").unlink()
    second_image(root, "test/{}.png")
    with pytest.raises(UserError, match="more than one image of an id"):
        data.load(config(root), tmp_path / "runs")


def test_two_names_of_one_file_are_one_image(root, tmp_path):
    image = root / "test" / "phantom_test_000002.jpg"
    image.with_suffix(".png").symlink_to(image.name)
    os.link(image, image.with_suffix(".jpeg"))
    (root / "images").mkdir()
    (root / "images" / "test").symlink_to(root / "test")
    assert problems(root, tmp_path) == []


def test_names_that_differ_in_their_unicode_form_alone_are_not_guessed_between(tmp_path):
    write_comma(tmp_path, [("a word", [])])
    (tmp_path / "test").mkdir()
    (tmp_path / "test_ids.csv").write_text("ID\n" + unicodedata.normalize("NFC", "é1") + "\n")
    decomposed = tmp_path / "test" / (unicodedata.normalize("NFD", "é1") + ".jpg")
    decomposed.touch()
    (tmp_path / "test" / "other.jpg").touch()
    real_images(tmp_path)
    found = one(tmp_path, tmp_path, layout="imageclef2024")
    assert found[:2] == ("test_ids.csv", 2)
    assert found[2].endswith(r"found 'e\u03011.jpg': rename it")
    decomposed.with_name(unicodedata.normalize("NFC", "é1") + ".jpg").write_bytes(decomposed.read_bytes())
    assert "more than one image of an id" in one(tmp_path, tmp_path, layout="imageclef2024")[2]


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".bmp", ".webp", ".dcm", ".nii.gz"])
@pytest.mark.parametrize("ids", [True, False])
def test_an_image_that_is_not_read_is_named(root, tmp_path, suffix, ids):
    image = root / "test" / "phantom_test_000002.jpg"
    image.rename(image.with_name(image.stem + suffix))
    if not ids:
        (root / "test_ids.csv").unlink()
    what = one(root, tmp_path)[2]
    assert (
        what == f"no image {image}; found {image.stem}{suffix}, which is not read: convert it to PNG or JPEG"
    )


def test_a_blank_or_another_case_in_a_name_is_named(root, tmp_path):
    for number, name in ((1, "phantom_test_000001 .jpg"), (2, "PHANTOM_test_000002.jpg")):
        (root / "test" / f"phantom_test_00000{number}.jpg").rename(root / "test" / name)
    assert [what.partition("; ")[2] for *_, what in problems(root, tmp_path)] == [
        "found 'phantom_test_000001 .jpg': rename it",
        "found 'PHANTOM_test_000002.jpg': rename it",
    ]


def test_what_lies_in_place_of_an_image_is_told_once_a_kind(root, tmp_path):
    """Five rows without a file are one cause; folders and another suffix are not more like them."""
    images = sorted((root / "train").glob("*.jpg"))
    for image in images[:5]:
        image.unlink()
    for image in images[5:7]:
        image.unlink()
        image.mkdir()
    images[7].rename(images[7].with_suffix(".bmp"))
    with pytest.raises(UserError) as caught:
        data.load(config(root), tmp_path / "runs")
    told = [problem.what.partition("; ")[2] for problem in caught.value.problems]
    assert told == [
        "and 4 more like it (lines 3, 4, 5, 6)",
        f"{images[5].name} is a folder, not a file",
        f"{images[6].name} is a folder, not a file",
        f"found {images[7].stem}.bmp, which is not read: convert it to PNG or JPEG",
    ]


def test_what_macos_adds_to_an_archive_is_no_image(root, tmp_path):
    (root / "test_ids.csv").unlink()
    (root / "test" / "._phantom_test_000001.jpg").write_bytes(b"\0\5\x16\7")
    assert problems(root, tmp_path) == []
    assert len(data.load(config(root), tmp_path / "runs").splits["test"]) == 4


def test_images_to_score_are_not_guessed_between(tmp_path):
    (tmp_path / "p.csv").write_text("a|x\nb|y\n")
    (tmp_path / "r.csv").write_text("ID\tcaption\na\tx\nb\ty\n")
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.jpg", "a.PNG", "b.tif"):
        (images / name).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv", images)
    text = str(caught.value)
    assert "more than one image of an id: a: a.PNG, a.jpg" in text
    assert f"no image in {images}: b (found b.tif, which is not read: convert it to PNG or JPEG)" in text


# --- images that are too large ---------------------------------------------------------------------------


def test_too_large_is_told_as_such(tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(DAMAGE) as caught:
        decode(tmp_path / "large.png")
    assert damage(caught.value) == "too large: 200 megapixels; 179 are allowed. Make it smaller"


def test_pil_warns_nobody_of_a_large_image(tmp_path):
    Image.new("1", (9_500, 9_500)).save(tmp_path / "large.png")
    program = (
        "from pathlib import Path; from harness.data.images import open_image; open_image(Path('large.png'))"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, check=True, cwd=tmp_path).stderr == b""


# --- a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory, empty_store) -> Path:
    """A run of a set with a blank caption; then of each split to caption one image can't be read."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "mlflow.db").write_bytes(empty_store)
    sizes = ["--train", "48", "--valid", "12", "--test", "6", "--seed", "3"]
    experiment = EXPERIMENT.partition("variants:")[0].replace("bleu1, cider", "bleu1")
    (folder / "small.yaml").write_text(experiment)
    harness(folder, "data", "phantom", "data/phantom", *sizes)
    edit(
        folder / "data" / "phantom" / CAPTIONS.format("valid"),
        lambda lines: lines.__setitem__(4, "phantom_valid_000004\t\u202f"),
    )
    harness(folder, "run", "small.yaml", "--set", "name=before")
    for split in ("valid", "test"):
        image = folder / "data" / "phantom" / split / f"phantom_{split}_000003.jpg"
        image.write_bytes(image.read_bytes()[:500])
    return folder


@pytest.mark.ci
def test_without_skip_bad_nothing_is_trained(project):
    steps = sorted(project.glob("runs/steps/*"))
    done = harness(project, "run", "small.yaml", code=None)
    assert done.returncode == 2
    assert "2 problems; nothing was run." in done.stderr
    assert sorted(project.glob("runs/steps/*")) == steps


@pytest.mark.ci
def test_with_skip_bad_every_id_is_captioned_scored_and_submitted(project):
    done = harness(project, "run", "small.yaml", "--set", "data.skip_bad=true")
    record = json.loads((project / "runs/small/base-s42/run.json").read_text())
    constant = record["baseline"]["caption"]
    for split, n in (("valid", 12), ("test", 6)):
        image = f"phantom_{split}_000003"
        assert record["fallback"][split] == {"caption": constant, "ids": [image]}
        folder = project / "submissions/small/base-s42" / f"caption-{split}"
        assert json.loads((folder / "manifest.json").read_text())["fallback"] == record["fallback"][split]
        ids = [f"phantom_{split}_{number:06d}" for number in range(1, n + 1)]
        file = folder / f"caption_prediction_{split}.csv"
        assert check(file, ids, 2023) == []
        assert f"{image}|{constant}" in file.read_text().splitlines()
        assert any(f"{split}: no readable image for 1 id ({image})" in x for x in record["data"]["notes"])
        assert f"{split}: no readable image" in done.stdout
        assert any(image in text for text in data_of(project / "runs/small/base-s42/report.html")["warnings"])
    assert {score["n"] for score in record["scores"]["valid"]["after"].values()} == {12}
    before = json.loads((project / "runs/before/base-s42/run.json").read_text())
    assert {score["n"] for score in before["scores"]["valid"]["after"].values()} == {12}
    assert before["fallback"] == {}


@pytest.mark.ci
@pytest.mark.parametrize("name", ["before", "small"])
@pytest.mark.parametrize(("images", "is_apart"), [(12, False), (11, True), (13, True)])
def test_a_blank_caption_sets_no_run_apart(project, monkeypatch, name, images, is_apart):
    """A run of a whole split with such a row, as the real one of 2023, counts all its images."""
    monkeypatch.setitem(EDITIONS[2023].images, "valid", images)
    found = leaderboard.board(2023, project / "runs").entries
    (entry,) = [entry for entry in found if entry.record["name"] == name]
    assert (f"it has 12 images, but the validation split of 2023 has {images}" in entry.apart) == is_apart


@pytest.mark.ci
def test_mlflow_and_a_later_submission_say_so_too(project):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "small"]
    tags = [run.data.tags.get("data.notes", "") for run in client.search_runs([experiment.experiment_id])]
    assert any("test: no readable image for 1 id (phantom_test_000003)" in tag for tag in tags)
    harness(project, "submission", "make", "runs/small/base-s42", "--out", "made")
    made = json.loads((project / "made/caption-test/manifest.json").read_text())
    assert made["fallback"]["ids"] == ["phantom_test_000003"]
    (project / "ids.txt").write_text("".join(f"phantom_test_{n:06d}\n" for n in range(6, 0, -1)))
    make = ["submission", "make", "runs/small/base-s42", "--edition", "2026", "--ids", "ids.txt"]
    harness(project, *make, "--out", "made")
    other = json.loads((project / "made/caption-test/manifest.json").read_text())
    assert other["fallback"] == made["fallback"]
    with (project / "made/caption-test/submission.csv").open(encoding="utf-8", newline="") as file:
        rows = dict(csv.reader(file))
    assert list(rows)[1:] == read_ids(project / "ids.txt")
    assert rows["phantom_test_000003"] == made["fallback"]["caption"]
    record = json.loads((project / "runs/small/base-s42/run.json").read_text())
    for key in ("splits", "layout"):
        del record["data"][key]
    old = project / "runs/old/base-s42/run.json"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps(record | {"name": "old"}))
    harness(project, "submission", "make", "runs/old/base-s42", "--out", "made/old")
    old.unlink()
    assert check(project / "made/old/caption-test/caption_prediction_test.csv", list(rows)[:0:-1], 2023) == []


@pytest.mark.slow
def test_the_others_keep_their_own_captions(project):
    """One damaged test image moves no caption to another image."""
    harness(project, "run", "small.yaml", "--set", "data.skip_bad=true")
    image = project / "data/phantom/test/phantom_test_000003.jpg"
    image.write_bytes((project / "data/phantom/test/phantom_test_000002.jpg").read_bytes())
    harness(project, "run", "small.yaml", "--set", "data.skip_bad=true", "--set", "name=whole")
    damaged, whole = (
        read_captions(project / "runs" / record["artifacts"]["predictions/test_after.csv"])
        for name in ("small", "whole")
        for record in [json.loads((project / f"runs/{name}/base-s42/run.json").read_text())]
    )
    assert damaged.pop(image.stem) != whole.pop(image.stem)
    assert damaged == whole
