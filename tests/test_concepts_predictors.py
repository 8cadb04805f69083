"""Nearest neighbours, the vote rule, names in captions and ensembles, against oracles and values by hand."""

import csv

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.neighbors import KNeighborsClassifier

from harness.concepts import ensembles, knn
from harness.concepts.names import Names, from_captions
from harness.concepts.settings import ConceptsConfig, KnnConfig
from harness.errors import UserError

LIMITS = KnnConfig().limits


def unit(count: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


@pytest.mark.parametrize("neighbours", [1, 7, 33])
def test_shares_of_neighbours_are_sklearns(neighbours):
    queries, database = unit(40, 8, 0) * 3, unit(300, 8, 1)
    has = np.random.default_rng(2).random((300, 5)) < 0.3
    labels = [f"C{n}" for n in range(5)]
    training = [tuple(np.array(labels)[row]) for row in has]
    oracle = KNeighborsClassifier(neighbours, metric="cosine", algorithm="brute").fit(database, has)
    wanted = np.array(
        [
            [1 - one[0] if len(one) == 1 else one[1] for one in column]
            for column in np.stack(oracle.predict_proba(queries), 1)
        ]
    )
    found = knn.probabilities(queries, database, training, labels, KnnConfig(neighbours=neighbours))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_weighted_shares_are_those_of_cosines_above_0():
    database = np.array([[1, 0], [1, 1], [0, 1], [-1, 0]], np.float32)
    training = [("C1",), ("C2",), ("C1", "C2"), ("C3",)]
    config = KnnConfig(neighbours=4, weighted=True)
    found = knn.probabilities(
        np.array([[2.0, 0]], np.float32), database, training, ("C1", "C2", "C3"), config
    )
    half = 0.5**0.5
    np.testing.assert_allclose(found, [[1 / (1 + half), half / (1 + half), 0]], atol=1e-6)


def test_few_training_images_vectors_of_zeros_and_concepts_without_label():
    database = np.zeros((2, 3), np.float32)
    found = knn.probabilities(unit(1, 3, 0), database, [("C1", "C9"), ("C9",)], ("C1",), KnnConfig())
    assert found.tolist() == [[0.5]]
    weighted = KnnConfig(weighted=True)
    assert knn.probabilities(unit(1, 3, 0), database, [("C1",), ()], ("C1",), weighted).tolist() == [[0]]


def test_features_that_are_no_numbers_and_no_training_images_are_refused():
    bad = unit(3, 2, 0)
    bad[1, 0] = np.nan
    with pytest.raises(UserError, match="features of 1 of 3 images are not finite"):
        knn.probabilities(bad, unit(2, 2, 0), [(), ()], ("C1",), KnnConfig())
    with pytest.raises(UserError, match="of 1 of 3 training images"):
        knn.probabilities(unit(2, 2, 0), bad, [(), (), ()], ("C1",), KnnConfig())
    with pytest.raises(UserError, match="train has no image"):
        knn.probabilities(unit(2, 2, 0), unit(0, 2, 0), [], ("C1",), KnnConfig())


@pytest.mark.parametrize(
    ("counts", "given"),
    [
        ([33, 20, 15, 12, 12], "ABCD"),  # (33-12)/33 = .636 < .65; a fifth is never given
        ([33, 20, 15, 11, 0], "ABC"),  # (33-11)/33 = .667
        ([33, 14, 13, 12, 0], "ABCD"),  # (33-14)/33 = .576 < .58
        ([33, 13, 13, 13, 0], "A"),  # .606: the second is not given, and so no third, though .606 < .65
        ([25, 10, 9, 8, 0], "A"),  # .6
        ([20, 7, 7, 7, 7], "A"),  # .65 is not below .65, nor .58
        ([20, 10, 7, 7, 7], "AB"),  # .65 is not below .65
        ([20, 10, 8, 7, 7], "ABC"),
        ([5, 5, 5, 5, 5], "ABCD"),  # ties by label
        ([0, 0, 3, 0, 4], "EC"),  # (4-3)/4 = .25
        ([1, 0, 0, 0, 0], "A"),
        ([0, 0, 0, 0, 0], "A"),  # no neighbour has a concept: the most frequent one in train
    ],
)
def test_the_vote_rule_by_hand(counts, given):
    values = np.array([counts], np.float32) / np.float32(33)
    assert knn.decide(values, "ABCDE", LIMITS) == [tuple(given)]


def test_a_ratio_at_its_limit_is_not_below_it_whatever_float32_rounds():
    for neighbours in (50, 100, 150, 250, 500, 1000):
        first = neighbours
        second = round(first * 0.42)  # (c1 - c2) / c1 = .58
        values = np.array([[first, second], [first, second + 1]], np.float32) / np.float32(neighbours)
        assert knn.decide(values, "AB", LIMITS) == [("A",), ("A", "B")]


NAMES = {
    "C01": "Lung",
    "C02": "Malignant neoplasm of lung",
    "C03": "Lung cancer",
    "C04": "Coronal (qualifier value)",
    "C05": "X-Ray Computed Tomography",
    "C06": "Nodule",
    "C07": "Cold (temperature)",
    "C08": "Cold",
    "C09": "Structure of artery",
    "C10": "Crohn's disease",
    "C11": "Mass",
    "C12": "Fracture, closed",
    "C13": "T",
    "C14": "Pelvis",
    "C15": "lung",
    "C16": "Chest wall",
    "C17": "Wall mass",
    "C18": "(unspecified)",
    "C19": "Lens",
}


@pytest.mark.parametrize(
    ("caption", "cuis"),
    [
        ("The LUNG.", "C01"),
        ("Lungs, both lungs", "C01"),
        ("lung-cancer in a lung", "C03 C01"),
        ("malignant neoplasm of lung cancer", "C02"),  # the longest from the left; what is left is no name
        ("malignant neoplasm of the lung", "C01"),
        ("Lung. Cancer was ruled out", "C01"),  # no name across sentences
        ("a coronal view (qualifier value)", "C04"),
        ("x-ray computed tomography; X ray computed tomographies", "C05"),
        ("multiple nodules and a nodular shadow", "C06"),
        ("common cold", "C08"),  # the whole name comes before one that lost its qualifier
        ("structures of arteries", "C09"),
        ("Crohn disease, Crohn’s disease", "C10"),
        ("masses", "C11"),
        ("closed fracture; fracture closed", "C12"),
        ("T weighted t", ""),
        ("pelvis and pelvi", "C14"),
        ("plunged, lunged, lung2", ""),  # whole words only
        ("chest wall mass", "C16 C11"),  # no overlap: C17 would begin within C16
        ("unspecified", "C18"),
        ("the lens", "C19"),
        ("", ""),
        ("...!? ()", ""),
    ],
)
def test_names_in_captions(caption, cuis):
    assert Names(NAMES, ("C01", "C06")).find(caption) == cuis.split()


def test_a_name_of_several_concepts_is_that_of_the_most_frequent():
    assert Names(NAMES, ("C06", "C15", "C01")).find("lung") == ["C15"]
    assert Names(NAMES, ()).find("lung") == ["C01"]
    assert Names(NAMES, ("C07",)).find("cold") == ["C08"], "a whole name is surer than one without qualifier"


def test_captions_give_0_and_1_for_labels_only():
    captions = ["lung cancer of the pelvis", "a lung"]
    found = from_captions(captions, NAMES, ("C01", "C14", "C77"))
    assert found.dtype == np.float32
    assert found.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_names_of_a_real_set_are_found_in_captions_of_them(shared):
    with (shared / "data/medpix2/cui_mapping.csv").open() as file:
        names = dict(list(csv.reader(file))[1:])
    found = Names(names, ())
    assert all(found.find(f"An image of the {name.upper()} here.") == [cui] for cui, name in names.items())


def test_a_mean_is_numpys_weighted_average():
    values = [np.random.default_rng(seed).random((4, 3)).astype(np.float32) for seed in range(3)]
    found = ensembles.mean(values, (1, 2, 0.5))
    np.testing.assert_allclose(found, np.average(values, axis=0, weights=(1, 2, 0.5)), atol=1e-6)
    assert found.dtype == np.float32
    same = np.full((2, 2), 1, np.float32)
    assert (ensembles.mean([same] * 3, (0.1, 0.2, 0.3)) == 1).all(), "rounding gives no probability above 1"


def test_votes_by_hand():
    decided = [[("A", "B"), ("A",), ()], [("B",), ("B",), ()], [("B", "C"), ("C",), ("C",)]]
    labels = ("C", "A", "B")
    assert ensembles.votes(decided, (1, 1, 1), labels, 0.5, "top1") == [("B",), ("C",), ("C",)]
    assert ensembles.votes(decided, (1, 1, 1), labels, 0.5, "none") == [("B",), (), ()]
    assert ensembles.votes(decided, (1, 1, 1), labels, 1 / 3, "none")[0] == ("B", "C", "A")
    assert ensembles.votes(decided, (2, 1, 1), labels, 0.5, "none") == [("B", "A"), ("A",), ()]
    assert ensembles.votes(decided, (1, 1, 1), labels, 1.0, "none") == [("B",), (), ()]
    assert ensembles.votes(decided, (0.1, 0.2, 0.3), labels, 0.3 / 0.6, "none")[1] == ("C",)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"own": 0}, "own is 0 and runs is empty"),
        (
            {"predictor": "knn", "knn": {"rule": "votes"}, "runs": ["a/b-s1"]},
            "use the rule thresholds, or combine",
        ),
        ({"runs": ["a/b-s1", {"run": "a/b-s1", "weight": 2}]}, "named twice"),
        ({"predictor": "cnn"}, "classifier"),
        ({"min_images": 0}, "from 1"),
        ({"vote_share": 0}, "above 0"),
        ({"thresholds": {"start": 1.5}}, "from 0 to 1"),
        ({"thresholds": {"start": True}}, "true"),
    ],
)
def test_settings_that_can_not_work_are_refused(section, words):
    with pytest.raises(ValidationError, match=words):
        ConceptsConfig.model_validate(section)


def test_settings_that_work():
    votes = {"predictor": "knn", "knn": {"rule": "votes"}, "runs": ["a/b-s1"]}
    for section in ({}, {"own": 0, "runs": ["a/b-s1"]}, votes | {"combine": "votes"}, votes | {"own": 0}):
        ConceptsConfig.model_validate(section)
    found = ConceptsConfig.model_validate({"runs": ["a/b-s1", {"run": "c", "weight": 2}]})
    assert [(run.run, run.weight) for run in found.runs] == [("a/b-s1", 1), ("c", 2)]
