"""Thresholds against exhaustive search, naive recomputation and sklearn's F1 of each image."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from harness.concepts import thresholds
from harness.concepts.labels import truth_of
from harness.concepts.settings import ThresholdsConfig
from harness.concepts.thresholds import Thresholds, choose, decide
from harness.errors import UserError

ALWAYS = "C9999999"  # a true concept that is no label


def drawn(seed: int, images: int, labels: int, levels: int | None = None):
    """Labels, probabilities (few distinct ones with `levels`), and references that fit them more or less."""
    rng = np.random.default_rng(seed)
    names = tuple(f"C{number:07d}" for number in range(labels))
    has = rng.random((images, labels)) < rng.uniform(0.05, 0.6, labels)
    values = np.clip(0.35 * has + rng.random((images, labels)) * 0.65, 0, 1)
    if levels:
        values = np.round(values * levels) / levels
    references = [
        {name for name, one in zip(names, row, strict=True) if one}
        | ({ALWAYS} if rng.random() < 0.2 else set())
        for row in has
    ]
    return names, values.astype(np.float32), references


def sklearn_f1(given_cuis, true_cuis) -> float:
    """As the organisers': binary F1 over the union of both lists; 1 if both are empty."""
    union = sorted({*given_cuis, *true_cuis})
    if not union:
        return 1.0
    sides = ([cui in side for cui in union] for side in (true_cuis, given_cuis))
    return f1_score(*sides, zero_division=0)


def mean_f1(values, names, references, limits, fallback) -> float:
    """By the plain rule, image by image."""
    total = 0.0
    for row, true in zip(values.tolist(), references, strict=True):
        cuis = {name for name, value, limit in zip(names, row, limits, strict=True) if value > limit}
        if not cuis and fallback == "top1" and names:
            cuis = {names[row.index(max(row))]}
        total += 2 * len(cuis & true) / (len(cuis) + len(true)) if cuis or true else 1.0
    return total / len(values)


def between(upper: float, lower: float) -> float:
    return float(np.float32((upper + lower) / 2))


def naive_pass(values, names, references, start: float, fallback) -> list[float]:
    """The documented rule with the F1 of all images computed again for each candidate."""
    limits = [float(np.float32(start))] * len(names)

    def score(place, limit):
        return mean_f1(values, names, references, [*limits[:place], limit, *limits[place + 1 :]], fallback)

    for place, name in enumerate(names):
        column = values[:, place].astype(float)
        levels = sorted({0.0, *column.tolist()}, reverse=True)
        mine = {value for value, true in zip(column, references, strict=True) if name in true and value > 0}
        candidates = [between(1.0, levels[0])] if levels[0] > 0 else []
        candidates += [between(high, low) for high, low in itertools.pairwise(levels) if high in mine]
        scores = {limit: score(place, limit) for limit in candidates}
        best = max(scores.values(), default=0)
        if best > score(place, limits[place]) + 1e-9:
            near = [limit for limit in candidates if scores[limit] >= best - 1e-9]
            limits[place] = min(near, key=lambda limit: (abs(limit - limits[place]), -limit))
    return limits


@pytest.mark.parametrize("fallback", ["top1", "none"])
@pytest.mark.parametrize("levels", [None, 5, 1])
@pytest.mark.parametrize("seed", range(4))
def test_one_pass_equals_naive_recomputation(seed, levels, fallback):
    names, values, references = drawn(seed, 40, 7, levels)
    config = ThresholdsConfig(fallback=fallback)
    found = choose(values, names, references, config)
    naive = naive_pass(values, names, references, 0.4, fallback)
    assert found.values.tolist() == pytest.approx(naive, abs=0), (
        "the thresholds are the same, not only as good"
    )
    before, after = (mean_f1(values, names, references, one, fallback) for one in ([0.4] * 7, naive))
    assert after >= before


def test_no_place_in_any_column_is_better_than_those_below_true_images():
    """The last label's threshold is the best of all places in its column, as exhaustive search finds it."""
    for seed, fallback in itertools.product(range(6), ("top1", "none")):
        names, values, references = drawn(seed, 30, 4, 8)
        found = choose(values, names, references, ThresholdsConfig(fallback=fallback)).values.tolist()
        levels = [-1.0, *np.unique(values[:, -1]).tolist()]
        places = [mean_f1(values, names, references, [*found[:-1], limit], fallback) for limit in levels[1:]]
        assert mean_f1(values, names, references, found, fallback) == pytest.approx(max(places), abs=1e-12)


@pytest.mark.parametrize("fallback", ["top1", "none"])
@pytest.mark.parametrize(
    ("images", "labels", "levels"), [(25, 6, None), (25, 6, 4), (12, 90, None), (1, 1, 1)]
)
def test_the_global_threshold_is_the_best_of_all(images, labels, levels, fallback):
    for seed in range(5):
        names, values, references = drawn(seed, images, labels, levels)
        config = ThresholdsConfig(kind="global", fallback=fallback)
        found = choose(values, names, references, config)
        assert len(set(found.values.tolist())) == 1
        every = [0.0, *np.unique(values).tolist()]
        scores = {limit: mean_f1(values, names, references, [limit] * labels, fallback) for limit in every}
        mine = mean_f1(values, names, references, found.values.tolist(), fallback)
        assert mine == pytest.approx(max(scores.values()), abs=1e-12)
        highest = max(limit for limit, score in scores.items() if score >= max(scores.values()) - 1e-12)
        assert highest <= found.values[0], "of several equal ones the highest"


def test_a_search_among_few_probabilities_widens_until_nothing_lower_can_be_better(monkeypatch):
    monkeypatch.setattr(thresholds, "_LARGEST", 1)
    seen = []
    swept = thresholds._swept
    monkeypatch.setattr(thresholds, "_swept", lambda *given: seen.append(given[-1]) or swept(*given))
    for seed in range(5):
        names, values, references = drawn(seed, 20, 40)
        found = choose(values, names, references, ThresholdsConfig(kind="global")).values[0]
        every = [mean_f1(values, names, references, [x] * 40, "top1") for x in np.unique(values)]
        mine = mean_f1(values, names, references, [found] * 40, "top1")
        assert mine == pytest.approx(max(every), abs=1e-12)
    assert len(seen) > 5, "the first look alone is not enough here"


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 5), st.sampled_from([1, 3, None]))
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_f1_never_falls_and_is_sklearns(seed, images, labels, levels):
    names, values, references = drawn(seed, images, labels, levels)
    for kind, fallback in itertools.product(("global", "per_concept"), ("top1", "none")):
        found = choose(values, names, references, ThresholdsConfig(kind=kind, fallback=fallback))
        lists = decide(values, found)
        oracle = np.mean([sklearn_f1(*pair) for pair in zip(lists, references, strict=True)])
        assert oracle == pytest.approx(mean_f1(values, names, references, found.values, fallback), abs=1e-12)
        start = np.float32(0.4)
        assert oracle >= mean_f1(values, names, references, [start] * labels, fallback) - 1e-12
        assert ((found.values >= 0) & (found.values <= 1)).all()
        assert fallback == "none" or all(lists)


def test_auto_starts_at_the_best_global_threshold():
    names, values, references = drawn(3, 60, 6)
    best = choose(values, names, references, ThresholdsConfig(kind="global")).values[0]
    found = choose(values, names, references, ThresholdsConfig(start="auto"))
    assert found.values.tolist() == naive_pass(values, names, references, best, "top1")


def test_ties_keep_the_start_and_empty_lists_count_1():
    names, references = ("C1", "C2"), [set(), {"C1"}]
    values = np.array([[0.1, 0.1], [0.9, 0.1]], np.float32)
    found = choose(values, names, references, ThresholdsConfig(fallback="none"))
    assert found.values.tolist() == [np.float32(0.4)] * 2
    assert decide(values, found) == [(), ("C1",)]
    assert mean_f1(values, names, references, found.values, "none") == 1


def test_a_concept_that_only_costs_is_not_given_any_more():
    values = np.array([[0.9, 0.8], [0.9, 0.7], [0.9, 1.0]], np.float32)
    found = choose(values, ("C1", "C2"), [{"C1"}] * 3, ThresholdsConfig())
    assert found.values.tolist() == [np.float32(0.4), 1.0]
    assert decide(values, found) == [("C1",)] * 3


def test_decisions_are_the_most_probable_first_and_at_most_so_many():
    found = Thresholds(("C1", "C2", "C3", "C4"), np.full(4, 0.4, np.float32), "top1")
    values = np.array([[0.5, 0.9, 0.5, 0.4], [0.1, 0.3, 0.3, 0.2], [0, 0, 0, 0]], np.float32)
    assert decide(values, found) == [("C2", "C1", "C3"), ("C2",), ("C1",)]
    assert decide(values, found, most=2)[0] == ("C2", "C1")
    assert decide(values, Thresholds(found.labels, found.values, "none"))[1:] == [(), ()]


def test_a_probability_of_0_is_never_given_and_the_truth_is_not_written_to():
    values = np.zeros((3, 1), np.float32)
    truth = truth_of([{"C1"}] * 3, ("C1",))
    floor = thresholds.floor_of(values, truth, "none")
    found = thresholds.one_pass(values, truth, floor, np.array([0.4], np.float32))
    assert truth.has.all()
    assert decide(values, Thresholds(("C1",), found, "none")) == [()] * 3
    assert thresholds.best_global(values, truth, floor) >= 0


def test_thresholds_are_the_same_after_json():
    names, values, references = drawn(1, 50, 9)
    found = choose(values, names, references, ThresholdsConfig())
    back = Thresholds.from_dict(found.as_dict())
    assert back.values.tolist() == found.values.tolist()
    assert (back.labels, back.fallback) == (found.labels, "top1")
    assert found.as_dict()["thresholds"][names[0]] == float(str(found.values[0]))


def test_neighbouring_floats_are_still_told_apart():
    low = np.float32(0.6)
    high = np.nextafter(low, np.float32(1))
    values = np.array([[high], [low]], np.float32)
    for kind in ("global", "per_concept"):
        found = choose(values, ("C1",), [{"C1"}, set()], ThresholdsConfig(kind=kind, fallback="none"))
        assert decide(values, found) == [("C1",), ()]


def test_without_images_nothing_is_chosen_and_the_error_says_why():
    with pytest.raises(UserError, match="no image of the half tune"):
        choose(np.zeros((0, 2), np.float32), ("C1", "C2"), [], ThresholdsConfig())
