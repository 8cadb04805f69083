"""Retrieval: exact search, features of the model, and the captions of neighbours."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import harness
from support.experiments import EXPERIMENT

from harness.decoding import retrieval
from harness.records.files import read_captions

VARIANTS = """variants:
  nearest: {retrieval: {neighbours: 1}}
  both: {retrieval: {neighbours: 5, utility: {rouge1: 1}}}
  sure: {retrieval: {neighbours: 5, threshold: 0, utility: {rouge1: 1}}}
"""


@pytest.mark.parametrize("seed", range(4))
def test_the_search_is_exact_and_in_the_order_of_the_database_for_equal_cosines(seed):
    random = np.random.default_rng(seed)
    database = random.integers(-2, 3, (60, 3)).astype(np.float32)  # many rows are equal
    queries = random.integers(-2, 3, (300, 3)).astype(np.float32)
    found = retrieval.nearest(queries, database, 7)
    for query, rows, cosines in zip(queries, found.rows, found.cosines, strict=True):
        products = database @ query
        expected = sorted(range(60), key=lambda row: (-products[row], row))[:7]
        assert rows.tolist() == expected
        np.testing.assert_array_equal(cosines, products[expected])


def test_an_image_that_is_there_twice_is_found_first_where_it_is_first():
    """Products of matrices round by the place of a row."""
    random = np.random.default_rng(0)
    database = random.standard_normal((1003, 768)).astype(np.float32)
    database /= np.linalg.norm(database, axis=1, keepdims=True)
    database[1002] = database[3]
    queries = np.concatenate([database[3:4], database[:200]])
    found = retrieval.nearest(queries, database, 2)
    assert found.rows[0].tolist() == [3, 1002]
    assert found.rows[4].tolist() == [3, 1002]
    np.testing.assert_allclose(found.cosines[:, 0], 1, atol=1e-6)


def test_a_small_database_gives_all_of_its_rows():
    found = retrieval.nearest(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)[:1], 9)
    assert found.rows.tolist() == [[0], [0]]


@pytest.fixture(scope="module")
def project(small_run, tmp_path_factory) -> Path:
    """The small run with rows of retrieval beside it."""
    place = tmp_path_factory.mktemp("retrieval")
    for name in ("data", "runs"):
        shutil.copytree(small_run / "kept" / name, place / name)
    shutil.copy(small_run / "kept" / "mlflow.db", place)
    (place / "ret.yaml").write_text(
        EXPERIMENT.partition("variants:")[0].replace("name: small", "name: ret") + VARIANTS
    )
    harness(place, "run", "ret.yaml")
    return place


def record_of(project: Path, variant: str) -> dict:
    return json.loads((project / "runs" / "ret" / f"{variant}-s42" / "run.json").read_text())


def table(project: Path, variant: str) -> list[dict[str, str]]:
    file = project / "runs" / record_of(project, variant)["artifacts"]["retrieval/valid.csv"]
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def captions_of(project: Path, split: str) -> dict[str, str]:
    (file,) = (project / "data").rglob(f"*caption_prediction_{split}_labels.csv")
    rows = csv.DictReader(
        file.read_text(encoding="utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE
    )
    return {row["ID"]: row["caption"] for row in rows}


@pytest.mark.ci
def test_retrieval_shares_the_training_and_decodes_nothing(project):
    steps = record_of(project, "nearest")["steps"]
    assert (project / "runs" / steps["train"] / "DONE").exists()
    small = json.loads((project / "runs" / "small" / "opt-s42" / "run.json").read_text())
    assert steps["train"] == small["steps"]["train"]
    assert not [name for name in steps if name.startswith("predict")]


@pytest.mark.ci
def test_the_nearest_image_gives_its_caption(project):
    training, rows = captions_of(project, "train"), table(project, "nearest")
    record = record_of(project, "nearest")
    written = read_captions(project / "runs" / record["artifacts"]["predictions/valid_before.csv"])
    found = {
        split: np.load(project / "runs" / record["steps"][f"features-{split}"] / "features.npy")
        for split in ("train", "valid")
    }
    assert found["train"].shape == (48, 32)
    np.testing.assert_allclose(np.linalg.norm(found["valid"], axis=1), 1, atol=1e-6)
    best = (found["valid"].astype(float) @ found["train"].astype(float).T).argmax(1)
    ids = list(training)
    assert [row["source"] for row in rows] == [ids[row] for row in best]
    assert all(written[row["ID"]] == training[row["source"]] for row in rows)
    assert record["scores"]["valid"]["before"]["rouge1"]["n"] == 12


@pytest.mark.ci
def test_the_neighbours_agree_on_a_caption_unless_one_is_near_enough(project):
    training = captions_of(project, "train")
    near, both, sure = (table(project, variant) for variant in ("nearest", "both", "sure"))
    assert [row["caption"] for row in sure] == [row["caption"] for row in near]
    assert [row["caption"] for row in both] != [row["caption"] for row in near]
    assert all(row["caption"] == training[row["source"]] for row in both)


@pytest.mark.ci
def test_retrieval_without_training_uses_the_checkpoint(project):
    text = (
        (project / "ret.yaml").read_text().partition("variants:")[0].replace("name: ret", "name: untrained")
    )
    text = text[: text.index("\ntrain:")] + "\ntrain: {stages: []}\n" + text[text.index("predict:") :]
    (project / "untrained.yaml").write_text(text + "retrieval: {neighbours: 1}\n")
    harness(project, "run", "untrained.yaml")
    record = json.loads((project / "runs" / "untrained" / "base-s42" / "run.json").read_text())
    assert "train" not in record["steps"]
    assert record["status"] == "FINISHED"
