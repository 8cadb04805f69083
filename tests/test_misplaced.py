"""A whole set that is not as it is asked for: one problem with its remedy, and nothing that follows."""

import shutil
from pathlib import Path

import pytest
from support import small_sets
from support.small_sets import CAPTIONS, CONCEPTS, config, write_comma

from harness import data

whole, root = small_sets.whole, small_sets.root  # fixtures


def found(root: Path, **changes):
    return data.examine(config(root, **changes)).causes


def change_ids(root: Path, change, names=(CAPTIONS, CONCEPTS), split="train") -> None:
    for name in names:
        file = root / name.format(split)
        head, *rows = file.read_text().splitlines()
        changed = ["\t".join([change(row.split("\t")[0]), *row.split("\t")[1:]]) for row in rows]
        file.write_text("\n".join([head, *changed]) + "\n")


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("manual", "layout"), [(False, "imageclef2024"), (True, "rocov2")])
def test_another_layout_is_recognised(tmp_path, manual, layout):
    write_comma(tmp_path / "set", [("a scan", ["C0000001"])])
    if manual:
        (tmp_path / "set" / "valid_concepts_manual.csv").write_text("ID,CUIs\n")
    (problem,) = found(tmp_path / "set")
    assert f"these look like {layout}, not imageclef2023: found train_captions.csv" in problem.what
    assert f"--set data.layout={layout}" in problem.hint
    assert f"--layout {layout}" in problem.hint


def test_a_set_of_2023_is_recognised(root):
    (problem,) = found(root, layout="rocov2")
    assert "these look like imageclef2023, not rocov2" in problem.what


@pytest.mark.parametrize("layout", ["imageclef2023", "imageclef2024"])
def test_a_set_one_folder_deeper_is_recognised(root, layout):
    outer = root.with_name("outer")
    outer.mkdir()
    shutil.move(root, outer / "inner")
    (problem,) = found(outer, layout=layout)
    assert "the data set lies one folder deeper" in problem.what
    assert ("in the layout imageclef2023" in problem.what) == (layout != "imageclef2023")
    assert f"--set data.root={outer}/inner" in problem.hint


def test_images_one_folder_deeper_are_found(root):
    (root / "train" / "part 1").mkdir()
    for image in (root / "train").glob("*.*"):
        image.rename(image.parent / "part 1" / image.name)
    (problem,) = found(root)
    assert problem.what == "no train images in train/, but 12 in train/part 1/"
    assert f"mv '{root}/train/part 1'/* {root}/train/" in problem.hint


@pytest.mark.parametrize("form", ["{}.jpg", "train\\{}", "train/{}.jpg"])
@pytest.mark.parametrize("names", [(CAPTIONS, CONCEPTS), (CAPTIONS,), (CONCEPTS,)])
def test_ids_with_a_folder_or_an_ending_are_one_problem_of_their_file(root, form, names):
    change_ids(root, form.format, names)
    problems = found(root)
    assert [Path(problem.file).name for problem in problems] == [name.format("train") for name in names]
    for problem in problems:
        shown = form.format("phantom_train_000001")
        assert problem.what == f"12 of 12 ids are not names of images, such as {shown!r}"
        assert problem.line == 2
        assert "Write 'phantom_train_000001'" in problem.hint


def test_ids_of_a_minority_are_problems_of_their_rows(root):
    change_ids(root, lambda id: f"{id}.jpg" if id.endswith("1") else id)
    assert any("leave the ending out of the id" in problem.what for problem in found(root))


def test_bad_concepts_are_reported_in_the_file_of_concepts(root):
    file = root / CONCEPTS.format("train")
    lines = file.read_text().splitlines()
    lines = [lines[0], *(f"{line};C12" for line in lines[1:])]
    lines[3:5] = [lines[4], lines[3]]  # another order than the captions
    file.write_text("\n".join(lines) + "\n")
    (problem,) = found(root)
    assert (Path(problem.file).name, problem.line) == (file.name, 2)
    assert "and 11 more like it (lines 3, 5, 4, 6, 7, ...)" in problem.what
