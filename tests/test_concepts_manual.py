"""Manually validated concepts of ROCOv2: how they are read and checked, and the score against them."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score
from support.small_sets import config, problems, write_comma

from harness import data
from harness.config.schema import Config
from harness.data.halves import HELD, half
from harness.errors import UserError
from harness.metrics.concepts import SECONDARY
from harness.records.files import LISTS, write_lists
from harness.steps.inputs import Inputs, Undeclared
from harness.steps.plan import Plan

CT, XRAY, CHEST, OTHER = "C0040405", "C1306645", "C0817096", "C0000001"
ROWS = [("a word", [CT, OTHER]), ("two words", [XRAY]), ("three words", [CT]), ("four", [OTHER])]
MANUAL = ["valid_0,C0040405", "valid_1,C1306645;C0817096", "valid_2,C0000001", "valid_3,C0040405"]
COUNTED = {0: {CT}, 1: {XRAY, CHEST}, 3: {CT}}
"""The manual concepts by row, of rows with one of the 15 of the secondary score."""
PREDICTED = {0: [CT, OTHER], 1: [XRAY, CT], 2: [CT], 3: [OTHER]}


@pytest.fixture
def root(tmp_path):
    """A set in the layout of ROCOv2 with manual concepts of valid."""
    place = tmp_path / "set"
    place.mkdir()
    write_comma(place, ROWS)
    names = "".join(f"{cui},{cui.lower()}\n" for cui in (CT, XRAY, CHEST, OTHER))
    (place / "cui_mapping.csv").write_text(f"CUI,Canonical name\n{names}")
    for n, path in enumerate(sorted(place.rglob("*.jpg"))):
        Image.new("L", (9, 9), 20 * n).save(path)
    manual(place, MANUAL)
    return place


def manual(root, rows, split="valid") -> None:
    (root / f"{split}_concepts_manual.csv").write_text("\n".join(["ID,CUIs", *rows]) + "\n")


def loaded(root, tmp_path, **changes):
    return data.load(config(root, layout="rocov2", **changes), tmp_path / "runs")


def test_manual_concepts_are_read_beside_the_others_and_leave_fingerprints_as_they_were(root, tmp_path):
    found = loaded(root, tmp_path)
    assert found.manual == {
        "valid": {
            f"valid_{n}": tuple(cuis.split(";")) for n, (_, cuis) in enumerate(r.split(",") for r in MANUAL)
        }
    }
    assert found.splits["valid"][0].cuis == (CT, OTHER)
    assert found.notes == found.left_out == ()
    other = data.load(config(root, layout="imageclef2024"), tmp_path / "runs")
    assert other.manual == {}  # another layout has no such file
    (root / "valid_concepts_manual.csv").unlink()
    without = loaded(root, tmp_path)
    assert without.manual == {}
    assert without.fingerprints == found.fingerprints == other.fingerprints


def test_a_check_names_wrong_rows_of_manual_concepts_and_they_alone_are_left_out(root, tmp_path):
    manual(root, [MANUAL[0], "valid_1,C13;C0817096", "valid_9,C0040405", MANUAL[0], MANUAL[2], "valid_3"])
    file = "valid_concepts_manual.csv"
    assert sorted(problems(root, tmp_path, layout="rocov2")) == [
        (file, 3, "got the CUI 'C13'; C and seven digits are allowed"),
        (file, 4, "valid_9 is not an id of valid"),
        (file, 5, "duplicate id valid_0, first on line 2; this later row is wrong"),
        (file, 7, "got 1 field; 2 are allowed"),
    ]
    found = loaded(root, tmp_path, skip_bad=True)
    assert found.manual["valid"] == {"valid_0": (CT,), "valid_2": (OTHER,)}
    assert [len(found.splits[split]) for split in ("train", "valid")] == [4, 4]
    assert len(found.left_out) == 4
    told = "no manually validated concepts of valid_{}: f1_secondary leaves it out"
    assert [note.problem.what for note in found.notes] == [told.format(n) for n in (1, 3)]


def test_a_wrong_row_of_manual_concepts_of_train_costs_no_training_image(root, tmp_path):
    manual(root, ["train_0,C0040405", "train_1", "train_2,x"], "train")
    assert [line for _, line, _ in problems(root, tmp_path, layout="rocov2")] == [3, 4]
    assert len(loaded(root, tmp_path, skip_bad=True).splits["train"]) == 4


def test_a_file_of_manual_concepts_that_cannot_be_read_stops_a_run(root, tmp_path):
    (root / "valid_concepts_manual.csv").write_text("ID;CUIs\n")
    assert any("got the header" in what for _, _, what in problems(root, tmp_path, layout="rocov2"))
    with pytest.raises(UserError, match="got the header"):
        loaded(root, tmp_path, skip_bad=True)


def test_a_share_of_validation_has_its_manual_concepts_only(root, tmp_path):
    found = loaded(root, tmp_path, fraction={"valid": 0.5})
    assert 0 < len(found.splits["valid"]) < 4
    assert list(found.manual["valid"]) == [example.id for example in found.splits["valid"]]


# --- the score -------------------------------------------------------------------------------------------


def planned(root, tmp_path) -> Plan:
    given = {"name": "e", "task": "concepts", "data": {"root": root, "layout": "rocov2"}}
    model = {"family": "encoder", "vision_checkpoint": "tiny", "image_size": 28, "tiny": {"patch_size": 14}}
    settings = {"model": model, "train": {"stages": []}, "concepts": {"predictor": "knn"}}
    run = Config.model_validate(given | settings | {"score": {"bootstrap": 200}})
    return Plan(run, loaded(root, tmp_path), tmp_path / "runs")


def scored(root, tmp_path) -> dict:
    """What the step writes about these predictions; the steps before it are not built."""
    plan = planned(root, tmp_path)
    lists = {f"valid_{n}": cuis for n, cuis in PREDICTED.items()}
    decided = plan.steps["concepts-valid"].directory
    decided.mkdir(parents=True, exist_ok=True)
    write_lists(decided / LISTS, lists)
    step = plan.steps["score-concepts"]
    step.directory.mkdir(parents=True, exist_ok=True)
    step.build(None, step.directory)
    return json.loads((step.directory / "scores.json").read_text())


def by_sklearn(rows) -> float:
    """The secondary score as the organisers compute it: binary F1 over the union, of the 15 concepts."""
    found = []
    for n in rows:
        own = {*PREDICTED[n]} & SECONDARY
        every = sorted(own | COUNTED[n])
        found.append(f1_score([c in COUNTED[n] for c in every], [c in own for c in every], zero_division=0))
    return float(np.mean(found))


def test_the_secondary_score_compares_with_the_manual_concepts_and_is_official(root, tmp_path):
    found = scored(root, tmp_path)
    secondary = found["scores"]["f1_secondary"]
    assert secondary["value"] == pytest.approx(by_sklearn(COUNTED))
    assert secondary["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert (secondary["n"], secondary["official"]) == (3, True)
    assert "15 concepts, manual" in secondary["signature"]
    on_held = [n for n in COUNTED if half(f"valid_{n}") == HELD]
    on_half = found["halves"]["held"]["f1_secondary"]
    assert on_half["n"] == len(on_held)
    assert on_half["value"] == pytest.approx(by_sklearn(on_held))
    (root / "valid_concepts_manual.csv").unlink()
    without = scored(root, tmp_path)
    assert without["scores"]["f1"]["value"] == found["scores"]["f1"]["value"]
    assert not without["scores"]["f1_secondary"]["official"]
    assert without["scores"]["f1_secondary"]["value"] != secondary["value"]


def test_an_image_without_a_manual_row_does_not_count(root, tmp_path):
    manual(root, MANUAL[:1] + MANUAL[2:])
    secondary = scored(root, tmp_path)["scores"]["f1_secondary"]
    assert (secondary["n"], secondary["value"]) == (2, pytest.approx(by_sklearn([0, 3])))


def test_manual_concepts_are_in_the_fingerprint_of_the_step_that_scores_and_of_no_other(root, tmp_path):
    def steps() -> dict[str, str]:
        return {name: step.directory.name for name, step in planned(root, tmp_path).steps.items()}

    before = steps()
    manual(root, [*MANUAL[:3], "valid_3,C1306645"])
    after = steps()
    assert {name for name in before if before[name] != after[name]} == {"score-concepts"}
    with pytest.raises(Undeclared, match="no fact declares them"):
        Inputs(planned(root, tmp_path), {}, ("valid",)).data.manual("valid")
