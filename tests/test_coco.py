"""COCO results, the usual output of captioning code: reading, and matching with ids if unambiguous."""

import json
import zipfile
from pathlib import Path

import pytest

from harness import scoring, submission
from harness.cli import compare as cli_compare
from harness.cli.terminal import Task
from harness.data.captionfiles import read, read_ids, read_predictions
from harness.errors import UserError

IDS = [f"ImageCLEFmedCaption_2023_valid_{number:06d}" for number in (16, 7, 300)]
TEXTS = ["A CT, axial | left", 'The "sail"\nsign.', ""]
CAPTIONS = dict(zip(IDS, TEXTS, strict=True))


def coco(path: Path, ids, texts=TEXTS, **more) -> Path:
    pairs = zip(ids, texts, strict=True)
    path.write_text(json.dumps([{"image_id": key, "caption": text} | more for key, text in pairs]))
    return path


@pytest.mark.parametrize(
    ("ids", "by_number"),
    [
        (IDS, 0),
        ([f"{key}.jpg" for key in IDS], 0),
        ([f"images/valid/{key}.png" for key in IDS], 0),
        ([16, 7, 300], 3),
        ([16.0, 7.0, 300.0], 3),
        (["16", "007", "000300.jpg"], 3),
        ([IDS[0], 7, "300"], 2),
    ],
)
def test_image_ids_are_matched_and_it_is_said(ids, by_number, tmp_path):
    path = coco(tmp_path / "results.json", ids, id=1)
    assert read_predictions(path, "caption", IDS) == CAPTIONS
    references = tmp_path / "labels.csv"
    references.write_text("ID\tcaption\r\n" + "".join(f"{key}\tR\r\n" for key in reversed(IDS)), newline="")
    rows = scoring.rows(path, references)
    assert dict(zip(rows.ids, rows.predictions, strict=True)) == CAPTIONS
    assert rows.inputs[0] == "results.json: 3 captions, COCO results (JSON)"
    said = [warning for warning in rows.warnings if "by number" in warning]
    assert bool(said) == bool(by_number)
    if by_number:
        first = next(key for key, one in zip(IDS, ids, strict=True) if one != key)
        assert f"results.json: {by_number} image_ids matched by number" in said[0]
        assert f"is {first}" in said[0]
    other_way = scoring.rows(_pipes(tmp_path / "p.csv"), path)
    assert dict(zip(other_way.ids, other_way.references, strict=True)) == CAPTIONS
    both = scoring.rows(path, coco(tmp_path / "references.json", IDS))
    assert sorted(both.ids) == sorted(IDS)


def test_compare_reads_them_and_says_so(tmp_path):
    coco(tmp_path / "ours.json", [16, 7, 300])
    references = coco(tmp_path / "references.json", [f"{key}.jpg" for key in IDS], ["a", "b", "c"])
    sources = [tmp_path / "ours.json", _pipes(tmp_path / "theirs.csv")]
    systems, files = cli_compare._read(sources, _pipes(tmp_path / "labels.csv"), None, Task.caption)
    assert [system.ids for system in systems] == [IDS, IDS]
    assert files["ours.json"].predictions == TEXTS
    assert any("3 image_ids matched by number: 16 is" in w for w in files["ours.json"].warnings)
    systems, files = cli_compare._read(sources[1:], references, None, Task.caption)
    assert files["theirs.csv"].references == ["a", "b", "c"]


def _pipes(path: Path) -> Path:
    path.write_text("".join(f"{key}|x\n" for key in IDS))
    return path


AMBIGUOUS = ["valid_16", "test_000016", "valid_7"]
MISTAKES = {
    "two ids end with it": (
        [16, 7],
        AMBIGUOUS,
        ["an image_id that several ids end with", "16: valid_16, test_000016"],
    ),
    "the same id twice": (["valid_7", 7], ["valid_7", "x1"], ["same id", "valid_7 and 7 are valid_7"]),
    "another split": (["test_7"], ["valid_7"], ["no prediction", "not among the references", "test_7"]),
    "counted from 0": ([0, 1], ["v_1", "v_2"], ["not among the references in r.csv: 0"]),
    "a number in the middle": ([7], ["v7b"], ["not among the references"]),
    "given twice": (["a", "a"], ["a"], ["a repeated image_id", "a, entries 1 and 2"]),
    "no image_id": ([None, "a"], ["a"], ["no image_id", "entry 1"]),
    "half a number": ([1.5], ["a1"], ["no image_id"]),
    "true": ([True], ["a1"], ["no image_id"]),
    "NaN": ([float("nan")], ["a1"], ["no image_id"]),
    "white space": (
        ["a b"],
        ["a"],
        ["no image_id that is a whole number below 10^18 or a text without white"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_can_not_be_matched_is_said(case, tmp_path):
    keys, ids, words = MISTAKES[case]
    path = coco(tmp_path / "p.json", keys, ["x"] * len(keys))
    (tmp_path / "r.csv").write_text("".join(f"{key}|R\n" for key in ids))
    with pytest.raises(UserError) as error:
        scoring.rows(path, tmp_path / "r.csv")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"image_id": 1}]', "has no caption that is a text: entry 1, 1"),
        ('[{"image_id": 1, "caption": NaN}]', "no caption"),
        ('[{"image_id": 1, "caption": "x"},\n {"image_id": 2', "p.json:2: is damaged JSON"),
        ('[{"image_id": 1, "caption": "x"}]\n[]', "is damaged JSON"),
        ('{"image_id": 1, "caption": "x"}', "not COCO results: got 'image_id', 'caption'"),
        ('{"a1": "x"}', "not COCO results: got 'a1'"),
        ("[]", "without entries"),
        ("[[1]]", "no image_id"),
        ("[" * 100_000, "nested too deep"),
        ('[{"image_id": ' + "9" * 5000 + ', "caption": "x"}]', "no image_id that is a whole number below"),
        ('[{"image_id": 1, "caption": "x", "caption": "y"}]', "two values of 'caption' in the entry of 1"),
        ("[" + ", ".join(f'{{"image_id": {n}}}' for n in range(9999)) + "]", "(9,999 rows): entry 1, 0"),
        ("a|x\n", "is damaged JSON"),
    ],
)
def test_other_json_is_refused_by_name(text, words, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read(path)
    assert words in str(error.value)
    assert "COCO results are a list" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_repeated_key_outside_the_entries_does_not_matter(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"info": {"a": 1, "a": 2}, "annotations": [{"image_id": "x", "caption": "y"}]}')
    assert read(path).values == {"x": "y"}


def test_annotations_take_their_ids_from_the_file_names(tmp_path):
    images = [{"id": n, "file_name": f"valid/{key}.jpg"} for n, key in enumerate(IDS)]
    entries = [{"id": 90 + n, "image_id": n, "caption": text} for n, text in enumerate(TEXTS)]
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": entries}))
    assert read_predictions(path, "caption", IDS) == CAPTIONS


@pytest.mark.parametrize("ending", ["", ".jpg"])
def test_results_are_matched_with_the_image_ids_of_annotations(ending, tmp_path):
    """The number in a file name gave each caption to another image, with a score, or none was found."""
    names = {1: f"valid_000016{ending}", 16: f"valid_000001{ending}", 2: f"b/valid_7{ending}"}
    images = [{"id": key, "file_name": name} for key, name in names.items()]
    entries = [{"image_id": key, "caption": f"text {key}"} for key in names]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": entries}))
    results = coco(tmp_path / "results.json", names, [f"text {key}" for key in names])
    rows = scoring.rows(results, path)
    assert rows.predictions == rows.references
    assert any(f"1 is {names[1]}" in warning for warning in rows.warnings)
    strange = coco(tmp_path / "strange.json", [1, 16, 7])
    with pytest.raises(UserError, match="not among the references"):
        scoring.rows(strange, path)


def test_zipped_results_and_half_a_surrogate_pair(tmp_path):
    with zipfile.ZipFile(tmp_path / "results.zip", "w") as archive:
        archive.writestr("captions_val_results.json", '[{"image_id": "a", "caption": "x \\ud800 y"}]')
    found = read(tmp_path / "results.zip")
    assert dict(found.values) == {"a": "x \ufffd y"}
    assert "reads captions_val_results.json" in found.warnings[0]


@pytest.mark.parametrize("edition", [2022, 2023, 2025, 2026])
def test_check_names_the_command_and_the_command_makes_a_valid_file(edition, tmp_path):
    path = coco(tmp_path / "my results.json", [16, 7, 300])
    for do in (
        lambda: submission.check(path, IDS, edition),
        lambda: _refused(path, tmp_path / "out", edition),
    ):
        (problem,) = do()
        assert "is COCO results (JSON)" in problem.what
        command = f"submission make '{path}' --edition {edition} --ids IDS"
        assert command in problem.hint
    upload = submission.make(read_predictions(path, "caption", IDS), IDS, edition, tmp_path, {})
    assert submission.check(upload, IDS, edition) == []
    with pytest.raises(UserError, match="JSON, not a list of ids"):
        read_ids(path)


def _refused(path: Path, out: Path, edition: int):
    with pytest.raises(UserError) as error:
        submission.fix(path, out, IDS, edition)
    assert error.value.exit_code == 3
    assert not out.exists()
    return error.value.problems


def test_two_images_of_one_id_are_not_guessed_between(tmp_path):
    entries = [{"image_id": 1, "caption": "a"}]
    images = [{"id": 1, "file_name": "x_1.jpg"}, {"id": 1, "file_name": "x_2.jpg"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": entries}))
    with pytest.raises(UserError, match=r"two images of the id 1: x_1\.jpg and x_2\.jpg"):
        read_predictions(tmp_path / "a.json")


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".tif", ".dcm"])
def test_endings_of_images_do_not_matter(ending, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"image_id": f"val/scan_16{ending}", "caption": "a"}]))
    assert read_predictions(tmp_path / "a.json", ids=["scan_16"]) == {"scan_16": "a"}
