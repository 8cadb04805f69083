"""Tables per concept and image against sklearn, baselines, and the paired test against `harness compare`."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support
from support.comparisons import system
from support.concepts import rows

from harness.concepts.baselines import BASELINES, most_frequent_concept, most_frequent_set
from harness.concepts.labels import indicators
from harness.concepts.results import (
    paired,
    per_concept,
    per_image,
    worst_first,
    write_per_concept,
    write_per_image,
)
from harness.metrics import concepts
from harness.records.files import read_rows
from harness.scoring.compare import compare

TRUE = [("C1", "C2"), ("C1",), (), ("C3", "C1", "C1"), ("C2",)]
GIVEN = [("C1", "C4"), ("C2", "C1"), (), ("C1", "C3"), ("C1",)]


def test_concepts_by_hand_and_absent_numbers():
    found = per_concept(GIVEN, TRUE, {"C1": "Lung", "C4": "Axial"})
    table = {one.cui: (one.support, one.predicted, one.correct) for one in found}
    assert table == {"C1": (3, 4, 3), "C2": (2, 1, 0), "C3": (1, 1, 1), "C4": (0, 1, 0)}
    assert [one.cui for one in found] == ["C1", "C2", "C3", "C4"]
    invented = found[-1]
    assert (invented.recall, invented.precision, invented.f1, invented.name) == (None, 0, 0, "Axial")
    assert per_concept([()], [("C9",)], {})[0].precision is None
    assert per_concept([()], [()], {}) == []
    assert [one.cui for one in worst_first(found)] == ["C2", "C4", "C1", "C3"]


def test_concepts_are_sklearns():
    rng = np.random.default_rng(0)
    labels = [f"C{n}" for n in range(12)]
    sides = [[tuple(np.array(labels)[row]) for row in rng.random((60, 12)) < 0.3] for _ in range(2)]
    found = {one.cui: one for one in per_concept(*sides, {})}
    given, true = (indicators(side, labels) for side in sides)
    oracle = precision_recall_fscore_support(true, given, average=None, zero_division=0)
    for place, cui in enumerate(labels):
        one = found[cui]
        numbers = (one.precision, one.recall, one.f1, one.support)
        assert numbers == pytest.approx([column[place] for column in oracle], abs=1e-12)


def test_tables_on_disk_leave_absent_numbers_empty(tmp_path):
    first = read_rows(
        write_per_concept(tmp_path / "c.csv", per_concept(GIVEN, TRUE, {"C1": 'a "name", odd'}))
    )
    assert first[0]["name"] == 'a "name", odd'
    assert (first[3]["CUI"], first[3]["precision"], first[3]["recall"]) == ("C4", "0.000000", "")
    second = read_rows(write_per_image(tmp_path / "i.csv", per_image("abcde", GIVEN, TRUE)))
    assert list(second[0]) == ["ID", "f1", "reference", "prediction", "missed", "invented"]
    assert list(second[0].values()) == ["a", "0.500000", "C1;C2", "C1;C4", "C2", "C4"]
    assert list(second[3].values()) == ["d", "1.000000", "C3;C1", "C1;C3", "", ""]
    assert list(second[2].values()) == ["c", "1.000000", "", "", "", ""]


def test_images_have_the_scores_of_the_metric():
    found = [one.f1 for one in per_image("abcde", GIVEN, TRUE)]
    sets = ([set(one) for one in side] for side in (GIVEN, TRUE))
    assert found == concepts.scores(*sets).tolist()


def test_baselines_by_hand():
    training = rows("C2 C1", "C1 C2", "C3", "C3", "C1", "", "", "")
    assert most_frequent_concept(training) == ("C1",)
    assert most_frequent_set(training) == ("C1", "C2"), "as often as C3, and first in order; no empty set"
    assert [rule(rows("", "")) for rule in BASELINES.values()] == [(), ()]


@pytest.mark.parametrize("images", [2, 9, 150])
def test_the_paired_test_is_that_of_compare(images):
    rng = np.random.default_rng(images)
    theirs, ours = rng.random((2, images)).round(2)
    ids = [f"{n:03}" for n in range(images)]
    found = paired(ours, theirs)
    (other,) = compare(
        [system(n, rouge1=one, ids=ids) for n, one in (("a", theirs), ("b", ours))], resamples=9999
    )
    wanted = [other.difference, other.low, other.high, other.p]
    assert list(found.values()) == pytest.approx(wanted, abs=1e-12)


def test_one_image_has_no_interval_and_none_no_difference():
    one = paired(np.array([1.0]), np.array([0.5]))
    assert one == {"difference": 0.5, "low": None, "high": None, "p": 1.0}
    assert set(paired(np.zeros(0), np.zeros(0)).values()) == {None}
    with pytest.raises(ValueError, match="2 and 1 images"):
        paired(np.zeros(2), np.zeros(1))
