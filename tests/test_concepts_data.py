"""The concept table of `data stats`: counts against plain loops, PNG, JSON and CSV."""

import csv
import io
import json
import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import commands
from support.concepts import rows

from harness.config.sections import PhantomConfig
from harness.data import concepts, phantom
from harness.data.listing import Dataset

TRAIN = ("C1 C2", "C1", "C2 C1 C3 C3", "", "C3")
VALID = ("C1 C8", "C9 C8", "C2")


def dataset(train=TRAIN, valid=VALID, test=("", ""), names=None) -> Dataset:
    splits = {"train": tuple(rows(*train)), "valid": tuple(rows(*valid)), "test": tuple(rows(*test))}
    return Dataset(Path("."), "imageclef2023", splits, names or {"C1": "Lung"}, {}, ())


def test_concepts_by_hand():
    found = concepts.table(dataset())
    assert [(one.cui, one.name, one.images) for one in found] == [
        ("C1", "Lung", {"train": 3, "valid": 1}),
        ("C2", "", {"train": 2, "valid": 1}),
        ("C3", "", {"train": 2, "valid": 0}),
        ("C8", "", {"train": 0, "valid": 2}),
        ("C9", "", {"train": 0, "valid": 1}),
    ]
    assert [one.cui for one in concepts.unseen(found)] == ["C8", "C9"]
    assert concepts.per_image(dataset()) == {"train": {0: 1, 1: 2, 2: 1, 3: 1}, "valid": {1: 1, 2: 2}}
    told = concepts.summary(dataset(), found)
    assert told["valid"]["unseen in train"] == told["valid"]["images with an unseen one"] == 2
    assert told["train"]["per image, mean"] == 1.4
    assert (told["train"]["images without any"], told["train"]["in 1 image only"]) == (1, 0)
    assert concepts.labelled(dataset(test=("C1",))) == ["train", "valid", "test"]


def test_co_occurrence_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    cuis = [f"C{n}" for n in range(9)]
    lists = [[cui for cui in cuis if rng.random() < 0.3] for _ in range(50)]
    found = concepts.together(dataset([" ".join(one) for one in lists]), cuis)
    for one, two in combinations(cuis, 2):
        both = sum(one in held and two in held for held in lists)
        assert found[cuis.index(one), cuis.index(two)] == found[cuis.index(two), cuis.index(one)] == both
    assert found.diagonal().tolist() == [sum(cui in held for held in lists) for cui in cuis]


ODD = {"C1": "a $name$ with_under^scores " * 4, "C2": "二重 \x1b[31m", "C8": "$"}


@pytest.mark.ci
@pytest.mark.parametrize(
    "made",
    [
        dataset(names=ODD),
        dataset(("C1",), ("C1",)),
        dataset(("",), ("C1",)),  # nothing to show of train
        dataset([f"C{n} C{n // 2}" for n in range(300)], [f"C{n}" for n in range(280, 330)]),
        dataset(test=("C1 C2",)),
    ],
)
def test_every_set_with_concepts_has_a_picture(made, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Glyph")  # no font of the test's machine need have these letters
        file = concepts.plot(made, concepts.table(made), tmp_path / "deep" / "c.png")
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 3


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stats")
    phantom.ensure(root / "set", PhantomConfig(train=12, valid=6, test=4))
    return root


@pytest.mark.ci
def test_the_command_prints_the_same_numbers_in_every_format(drawn):
    outputs = {
        form: commands.harness(
            drawn, "data", "stats", "set", "--format", form, "--concept-plot", f"{form}.png"
        )
        for form in ("table", "json", "csv")
    }
    assert "concepts: json.png" in outputs["json"].stderr
    assert all((drawn / f"{form}.png").stat().st_size > 10_000 for form in outputs)
    told = json.loads(outputs["json"].stdout)["concepts"]
    (file,) = (drawn / "set").glob("*concept_detection_train_labels.csv")
    labels = file.read_text().splitlines()[1:]
    lists = [line.split("\t")[1].split(";") for line in labels]
    for one in told["frequency"]:
        assert one["images"]["train"] == sum(one["cui"] in held for held in lists)
    first = told["co_occurrence"]
    assert first["images"][0][1] == sum(set(first["concepts"][:2]) <= set(held) for held in lists)
    assert sum(told["per_image"]["train"].values()) == 12
    table = {row[0]: row[1:] for row in csv.reader(io.StringIO(outputs["csv"].stdout))}
    for one in told["frequency"]:
        wanted = [str(one["images"][split]) for split in ("train", "valid")]
        assert table[f"{one['cui']} {one['name']}"] == [*wanted, ""]
    assert table["concepts"][0] == str(sum(one["images"]["train"] > 0 for one in told["frequency"]))
    assert told["frequency"][0]["cui"] in outputs["table"].stdout
    assert ("unseen in train" in outputs["table"].stdout) == bool(told["summary"]["valid"])
