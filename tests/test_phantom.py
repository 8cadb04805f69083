"""The made-up set: the same everywhere, complete or absent, learnable only from the image."""

import hashlib
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from harness.cli.data import data_phantom
from harness.config.sections import PhantomConfig
from harness.data import phantom
from harness.data.phantom_grammar import MODALITIES, caption, concept_names, cuis, make_up
from harness.errors import UserError

SMALL = PhantomConfig(train=12, valid=4, test=4, seed=3)


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    total = hashlib.sha256()
    for path in files:
        total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def words(text: str) -> Counter:
    cleaned = re.sub(r"\d+", "number", text.lower()).translate(str.maketrans("", "", string.punctuation))
    return Counter(cleaned.split())


def rouge1(a: str, b: str) -> float:
    one, other = words(a), words(b)
    return 2 * (one & other).total() / (one.total() + other.total())


def cases(count: int):
    for number in range(count):
        rng = np.random.default_rng([1, number])
        case = make_up(rng)
        yield case, caption(case, rng)


def test_the_same_bytes_in_another_process(tmp_path):
    phantom.draw(tmp_path / "here", SMALL)
    program = (
        "import sys; from pathlib import Path; from harness.config.sections import PhantomConfig; "
        "from harness.data import phantom; "
        "phantom.draw(Path(sys.argv[1]), PhantomConfig(train=12, valid=4, test=4, seed=3))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there")], check=True)
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


def test_another_seed_draws_another_set(tmp_path):
    phantom.draw(tmp_path / "a", SMALL)
    phantom.draw(tmp_path / "b", SMALL.model_copy(update={"seed": 4}))
    a, b = (sorted((tmp_path / name / "train").iterdir()) for name in "ab")
    assert not {p.read_bytes() for p in a} & {p.read_bytes() for p in b}


def test_files_are_those_of_2023(tmp_path):
    phantom.draw(tmp_path / "set", SMALL)
    prefix = "ImageCLEFmedical_Caption_2023_"
    names = {path.relative_to(tmp_path / "set").as_posix() for path in (tmp_path / "set").rglob("*.csv")}
    assert names == {
        "test_ids.csv",
        f"{prefix}cui_mapping.csv",
        *(f"{prefix}caption_prediction_{split}_labels.csv" for split in ("train", "valid")),
        *(f"{prefix}concept_detection_{split}_labels.csv" for split in ("train", "valid")),
        f"withheld/{prefix}caption_prediction_test_labels.csv",
        f"withheld/{prefix}concept_detection_test_labels.csv",
    }
    captions = (tmp_path / "set" / f"{prefix}caption_prediction_train_labels.csv").read_bytes()
    assert captions.startswith(b"ID\tcaption\r\nphantom_train_000001\t")
    assert captions.count(b"\r\n") == captions.count(b"\n") == 13


def test_no_two_images_are_alike(tmp_path):
    phantom.draw(tmp_path / "set", PhantomConfig(train=60, valid=20, test=20))
    images = [path.read_bytes() for path in (tmp_path / "set").rglob("*.jpg")]
    assert len(set(images)) == len(images) == 100


def test_an_interrupted_drawing_is_begun_anew(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from harness.config.sections import PhantomConfig\n"
        "from harness.data import phantom; phantom.write_json = lambda *_: os._exit(9)\n"
        "phantom.draw(Path(sys.argv[1]), PhantomConfig(train=12, valid=4, test=4, seed=3))"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "set")])
    assert killed.returncode == 9
    assert not (tmp_path / "set").exists()
    phantom.ensure(tmp_path / "set", SMALL)
    phantom.draw(tmp_path / "whole", SMALL)
    assert digest(tmp_path / "set") == digest(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"set", "whole"}


def test_real_data_is_never_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("real")
    phantom.ensure(tmp_path, SMALL)
    with pytest.raises(UserError, match="is not an empty folder"):
        phantom.draw(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_phantom_of_other_settings_is_not_taken_for_this_one(tmp_path):
    phantom.draw(tmp_path / "set", SMALL)
    phantom.ensure(tmp_path / "set", SMALL)
    with pytest.raises(UserError, match="other settings") as caught:
        phantom.ensure(tmp_path / "set", SMALL.model_copy(update={"train": 13}))
    assert caught.value.problems[0].key == "data.phantom"


@pytest.mark.ci
def test_captions_follow_from_the_image():
    """Who sees everything scores 0.85 to 0.95; the best constant stays below 0.45."""
    made = list(cases(600))
    seeing = np.mean([rouge1(caption(case, None), text) for case, text in made])
    texts = [text for _, text in made]
    constants = {caption(case, None) for case, _ in made}
    best = max(np.mean([rouge1(constant, text) for text in texts[:150]]) for constant in constants)
    assert 0.85 < seeing < 0.95
    assert best < 0.45


def test_captions_are_as_long_as_real_ones():
    lengths = np.array([len(text.split()) for _, text in cases(2000)])
    assert 0.14 < (lengths > 32).mean() < 0.24
    assert ((lengths >= 8) & (lengths <= 25)).mean() > 0.65


def test_every_modality_anatomy_and_finding_occurs_and_is_named():
    made = [case for case, _ in cases(1500)]
    shown = {(case.modality.name, case.anatomy) for case in made}
    assert shown == {(m.name, anatomy) for m in MODALITIES for anatomy in m.anatomies}
    used = {cui for case in made for cui in cuis(case)}
    assert used == set(concept_names())
    assert sum(m.weight for m in MODALITIES) == pytest.approx(1)


def test_side_size_and_finding_show_in_the_pixels():
    """Averaged over noise, a left lesion is on the image's right, and a large one covers more."""
    brightness = {(side, size): [] for side in ("left", "right") for size in ("small", "large")}
    for number in range(600):
        rng = np.random.default_rng([2, number])
        case = make_up(rng)
        if case.lesion is None or case.lesion.name != "mass" or case.modality.name != "CT":
            continue
        pixels = np.asarray(phantom.picture(case, rng).resize((224, 224)), float)
        spots = pixels[:, 35:-35] > 220
        brightness[case.side, case.size].append((spots[:, 77:].sum() - spots[:, :77].sum(), spots.sum()))
    means = {key: np.mean(values, axis=0) for key, values in brightness.items()}
    for size in ("small", "large"):
        assert means["left", size][0] > 100
        assert means["right", size][0] < -100
    for side in ("left", "right"):
        assert means[side, "large"][1] > 2 * means[side, "small"][1]


def test_the_command_does_not_say_that_it_drew_into_what_it_leaves_alone(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is not an empty folder"):
            data_phantom(place, 2, 1, 1, 0)
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for _ in range(2):
        data_phantom(tmp_path / "new", 2, 1, 1, 0)
    assert len(list((tmp_path / "new" / "train").iterdir())) == 2
