"""Labels, the file of probabilities and the alignment of several runs; damaged files are refused in words."""

import subprocess
import sys

import numpy as np
import pytest
from support.concepts import rows

from harness.concepts.labels import indicators, labels_of, truth_of
from harness.concepts.probabilities import (
    PROBABILITIES,
    Probabilities,
    aligned,
    read_probabilities,
    write_probabilities,
)
from harness.errors import UserError


def made(labels=("C2", "C1"), ids=("a", "b", "c"), seed=0) -> Probabilities:
    values = np.random.default_rng(seed).random((len(ids), len(labels))).astype(np.float32)
    return Probabilities(tuple(labels), tuple(ids), values)


def test_labels_are_the_most_frequent_first_with_ties_by_cui():
    training = rows("C3 C1", "C1 C2 C2", "C2 C4", "")
    assert labels_of(training, 1) == ("C1", "C2", "C3", "C4")
    assert labels_of(reversed(training), 2) == ("C1", "C2")
    assert labels_of(rows(""), 1) == labels_of([], 1) == ()


def test_the_truth_counts_concepts_without_a_label_and_doubled_ones_once():
    truth = truth_of([("C1", "C9", "C1"), (), ("C2",)], ("C2", "C1"))
    assert truth.has.tolist() == [[False, True], [False, False], [True, False]]
    assert truth.counts.tolist() == [2, 0, 1]
    assert indicators([], ("C1",)).shape == (0, 1)


def test_a_file_gives_back_what_was_written_and_twice_the_same_bytes(tmp_path):
    found = made(ids=("b", "ü ", "c,d"))
    files = [write_probabilities(tmp_path / name / PROBABILITIES, found) for name in "12"]
    assert files[0].read_bytes() == files[1].read_bytes()
    back = read_probabilities(files[0], found.labels)
    assert (back.labels, back.ids) == (found.labels, found.ids)
    assert back.values.dtype == np.float32
    np.testing.assert_array_equal(back.values, found.values)
    turned = read_probabilities(files[0], ids=found.ids[::-1])
    np.testing.assert_array_equal(turned.values, found.values[::-1])


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (0, 0)])
def test_a_file_may_lack_images_or_labels(tmp_path, shape):
    found = Probabilities(("C1", "C2")[: shape[1]], ("a", "b", "c")[: shape[0]], np.zeros(shape, np.float32))
    assert read_probabilities(write_probabilities(tmp_path / "p.npz", found)).values.shape == shape


def refused(path, words, **wanted):
    with pytest.raises(UserError, match=words) as caught:
        read_probabilities(path, **wanted)
    assert str(path) in str(caught.value)
    assert all(problem.hint for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"values": np.array([[0.5, np.nan]] * 3, np.float32)},
            "of 3 of 3 images are not finite, the first a",
        ),
        ({"values": np.array([[0.5, np.inf]] * 3, np.float32)}, "are not finite"),
        ({"values": np.array([[0, 1], [0, 1], [0, 1.5]], np.float32)}, r"of 1 of 3 .* the first 1.5 of c"),
        ({"values": np.array([[0, -0.25]] * 3, np.float32)}, "outside 0 to 1, the first -0.25 of a"),
        ({"values": np.zeros((2, 2), np.float32)}, r"float32 \(2, 2\); float32 \(3, 2\) is allowed"),
        ({"values": np.zeros((3, 2), int)}, r"int64 \(3, 2\); float32"),
        ({"values": np.zeros(6, np.float32)}, r"\(6,\)"),
        ({"ids": np.array(["a", "b", "a"])}, "1 ids are listed twice, the first a"),
        ({"labels": np.array(["C1", "C1"])}, "1 labels are listed twice, the first C1"),
        ({"labels": np.array([1, 2])}, "labels are no list of texts, but int64"),
        ({"labels": np.array(["C1", None])}, "can't be read"),
        ({"ids": None}, "has no array ids; probabilities have labels, ids, values"),
    ],
)
def test_wrong_arrays_are_refused_with_what_was_got(tmp_path, change, words):
    arrays = {"labels": np.array(["C1", "C2"]), "ids": np.array(list("abc"))}
    arrays |= {"values": np.zeros((3, 2), np.float32)} | change
    np.savez(tmp_path / "p.npz", **{name: array for name, array in arrays.items() if array is not None})
    refused(tmp_path / "p.npz", words)


def test_damaged_files_are_refused(tmp_path):
    path = write_probabilities(tmp_path / "p.npz", made())
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"no file of arrays",
        whole[: len(whole) // 2],
        whole[:60] + b"\0" * 60 + whole[120:],
    ):
        path.write_bytes(damaged)
        refused(path, "p.npz")
    path.unlink()
    refused(path, "can't be read")


def test_other_labels_and_other_images_are_refused_in_words(tmp_path):
    path = write_probabilities(tmp_path / "p.npz", made())
    refused(path, "it lacks 1 of the 2 here, and has 1 others", labels=("C1", "C7"))
    refused(path, "the 2 labels of this run in another order", labels=("C1", "C2"))
    with pytest.raises(UserError, match=r"it lacks 1 of 3 \(first z\) and has 1 others"):
        read_probabilities(path, ids=("a", "b", "z"))
    with pytest.raises(UserError, match="it lacks 0 of 2 and has 1 others"):
        read_probabilities(path, ids=("a", "b"))


def test_what_is_no_probability_is_not_written(tmp_path):
    for values in (np.full((3, 2), np.nan, np.float32), np.full((3, 2), 2, np.float32)):
        with pytest.raises(UserError, match="images are"):
            write_probabilities(tmp_path / "p.npz", Probabilities(("C2", "C1"), ("a", "b", "c"), values))
    assert not any(tmp_path.iterdir())


def test_runs_with_other_labels_are_aligned_and_it_is_said():
    one, two = made(("C2", "C1"), "abc", 1), made(("C1", "C3", "C2"), "cab", 2)
    union, values, notes = aligned([one, two], ["x/one-s1", "x/two-s1"])
    assert union == ("C2", "C1", "C3")
    np.testing.assert_array_equal(values[0], np.hstack([one.values, np.zeros((3, 1))]).astype(np.float32))
    np.testing.assert_array_equal(values[1], two.values[[1, 2, 0]][:, [2, 0, 1]])
    assert notes == ["x/one-s1 does not know 1 of 3 concepts; their probability is 0"]
    assert aligned([one, one], ["a", "b"])[2] == []
    with pytest.raises(UserError, match=r"b: has other images than those of a: it lacks 1 of 3 \(first c\)"):
        aligned([one, made(ids=("a", "b", "d"))], ["a", "b"])


def test_the_room_needs_no_torch():
    rooms = "baselines, ensembles, knn, labels, names, probabilities, results, settings, thresholds"
    ask = f"import sys; from harness.concepts import {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask]).returncode == 0
