"""A share of a data set: which images are chosen, what is not decoded, and that results say so."""

import hashlib
import json
import random
import shutil
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from support.experiments import EXPERIMENT, messages, write

from harness.config.experiment import load as load_experiment
from harness.config.sections import DataConfig
from harness.data import fraction, load, unchecked
from harness.data.halves import TUNE, half
from harness.leaderboard.entries import _apart
from harness.steps.plan import Plan, dry
from harness.tracking.contents import tags_of
from harness.training.forecast import forecast, lines

IDS = [f"ImageCLEFmedical_Caption_2023_valid_{n:06d}" for n in range(4000)]


def test_the_choice_is_nested_and_of_the_right_size_and_independent_of_the_halves():
    shares = [0.01, 0.1, 0.2, 0.5, 0.9]
    found = [{image for image in IDS if fraction.chosen(image, share)} for share in shares]
    for smaller, larger in pairwise(found):
        assert smaller < larger
    for share, images in zip(shares, found, strict=True):
        assert abs(len(images) - share * len(IDS)) < 4 * np.sqrt(share * (1 - share) * len(IDS))
    tuned = sum(half(image) == TUNE for image in found[3])
    assert abs(tuned - len(found[3]) / 2) < 4 * np.sqrt(len(found[3]) / 4)
    assert all(fraction.chosen(image, 1.0) for image in IDS)


def test_the_choice_of_an_image_is_a_fixed_number():
    """By hand from the id's SHA-256, so that no other machine or version chooses otherwise."""
    for image in IDS[:50]:
        place = int(hashlib.sha256(image.encode()).hexdigest()[2:18], 16) / 16**16
        assert fraction.chosen(image, place + 1e-9)
        assert not fraction.chosen(image, place - 1e-9)


@pytest.fixture
def place(small_run, tmp_path, monkeypatch):
    """A folder with the images of the small run, without what was found out about them."""
    shutil.copytree(small_run / "kept" / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**shares):
    return DataConfig(root="data/phantom", fraction=shares)


def test_test_is_whole_and_the_order_of_rows_changes_nothing(place):
    whole, part = load(config()), load(config(train=0.5, valid=0.4))
    assert part.splits["test"] == whole.splits["test"]
    assert part.fingerprints["test"] == whole.fingerprints["test"]
    for split, share in (("train", 0.5), ("valid", 0.4)):
        wanted = [e for e in whole.splits[split] if fraction.chosen(e.id, share)]
        assert list(part.splits[split]) == wanted
        assert 0 < len(wanted) < len(whole.splits[split])
        assert part.fingerprints[split] != whole.fingerprints[split]
    (file,) = (place / "data" / "phantom").glob("*caption_prediction_train_labels.csv")
    header, *rows = file.read_text().splitlines()
    random.Random(1).shuffle(rows)
    file.write_text("\n".join([header, *rows]) + "\n")
    mixed = load(config(train=0.5, valid=0.4))
    assert {e.id for e in mixed.splits["train"]} == {e.id for e in part.splits["train"]}


def test_images_that_are_not_chosen_are_not_opened(place):
    ids = [e.id for e in load(config()).splits["train"]]
    shutil.rmtree(place / "runs")
    left_out = [image for image in ids if not fraction.chosen(image, 0.3)]
    before = unchecked(config(train=0.3))
    assert before == unchecked(config()) - len(left_out)
    for image in left_out:
        next((place / "data/phantom").rglob(f"{image}.*")).write_bytes(b"not an image")
    assert len(load(config(train=0.3)).splits["train"]) == len(ids) - len(left_out)
    assert unchecked(config(train=0.3)) == 0


def test_too_small_a_share_says_which_key_to_change(place):
    with pytest.raises(Exception, match=r"no good row is left in valid \(data.fraction.valid is 1e-09\)"):
        load(config(valid=1e-9))


def test_a_share_is_above_0_and_never_of_test(tmp_path):
    file = write(tmp_path, EXPERIMENT)
    (problem,) = messages(file, "data.fraction.train=0")
    assert "got 0.0; a number above 0 and up to 1 is allowed" in problem
    (problem,) = messages(file, "data.fraction={test: 0.5}")
    assert "data.fraction.test" in problem


def test_a_quick_look_is_marked_in_forecast_notes_leaderboard_and_mlflow(small_run, place):
    file = write(place, EXPERIMENT)
    looks = "data.fraction={train: 0.5, valid: 0.4}"
    whole, part = load_experiment(file)[0], load_experiment(file, [looks])[0]
    said = "a quick look at 50% of train and 40% of valid"
    assert said in lines(forecast(part))
    assert "quick look" not in " ".join(lines(forecast(whole)))
    plan = Plan(part, load(part.data))
    assert plan.notes == [f"data.fraction: {said}; its scores get no rank"]
    assert dry(part)["train"] != dry(whole)["train"]
    record = json.loads((small_run / "kept/runs/small/opt-s42/run.json").read_text())
    assert "quick look" not in (_apart(record, "valid") or "")
    assert "data.fraction" not in tags_of(record)
    record["config"]["data"]["fraction"] = {"train": 0.5, "valid": 0.4}
    assert f"it is {said} (data.fraction)" in _apart(record, "valid").split("; ")
    assert tags_of(record)["data.fraction"] == "50% of train and 40% of valid"


def test_what_is_made_from_quick_looks_is_marked_too(small_run, place):
    """An ensemble whose own data are whole, of a run that learned from a share of train."""
    shutil.copytree(small_run / "kept/runs", place / "runs", dirs_exist_ok=True)
    file = place / "runs/small/opt-s42/run.json"
    record = json.loads(file.read_text())
    record["config"]["data"]["fraction"] = {"train": 0.5, "valid": 1}
    file.write_text(json.dumps(record))
    sets = ["consensus={own: 0, runs: [small/opt-s42]}"]
    (_, config) = load_experiment(write(place, EXPERIMENT), sets)
    plan = Plan(config, load(config.data))
    assert plan.looks == {"small/opt-s42": "50% of train"}
    assert plan.notes == [
        "data.fraction: a quick look at 50% of train in small/opt-s42; its scores get no rank"
    ]
    made = record | {"config": plan.config.model_dump(mode="json"), "looks": plan.looks}
    said = "it is a quick look at 50% of train in small/opt-s42 (data.fraction)"
    assert said in _apart(made, "valid").split("; ")
    assert tags_of(made)["data.fraction"] == "50% of train in small/opt-s42"


def test_pixels_of_a_share_are_those_of_the_whole(place):
    """The cache of a share holds its images only."""
    from harness.data.images import open_pixels

    whole, part = load(config()).splits["train"], load(config(train=0.3)).splits["train"]
    every = open_pixels(whole, 28, place / "cache")
    some = open_pixels(part, 28, place / "cache")
    assert len(some) == len(part) < len(every)
    for number, example in enumerate(part):
        assert np.array_equal(some[number], every[whole.index(example)])
    with Image.open(part[0].image) as image:
        assert np.array_equal(some[0], np.asarray(image.convert("RGB").resize((28, 28), Image.BICUBIC)))
