"""What `harness compare` must refuse: too few swaps, scores that are not numbers, other checkpoints."""

import numpy as np
import pytest
from support.comparisons import given, harness, system, write_file

from harness import metrics
from harness.errors import UserError
from harness.scoring import compare
from harness.scoring.compare import Difference


def several(count: int, rows: int = 40, seed: int = 0) -> list[compare.System]:
    """Systems so far apart that enough swaps tell each from each."""
    noise = np.random.default_rng(seed).random((count, rows)) / 100
    return [system(f"s{i}", rouge1=row + i) for i, row in enumerate(noise)]


@pytest.mark.parametrize(("count", "enough"), [(3, 120), (4, 240), (5, 400)])
def test_too_few_swaps_for_the_pairs_are_refused_and_the_number_named_would_do(count, enough):
    with pytest.raises(UserError, match=f"use --resamples {enough} or more"):
        compare.compare(several(count), resamples=enough - 1)
    assert all(one.real for one in compare.compare(several(count), resamples=enough))


def test_all_swaps_of_few_images_are_not_too_few():
    assert len(compare.compare(several(3, rows=6), resamples=99)) == 3


def test_too_few_swaps_are_said_before_anything_is_scored(tmp_path):
    ids = [f"i{n}" for n in range(8)]
    files = [write_file(tmp_path / f"{name}.csv", ids, [f"ct {name}"] * 8) for name in "abc"]
    references = write_file(tmp_path / "r.csv", ids, ["ct"] * 8)
    done = harness(tmp_path, *files, "--references", references, "--resamples", "99", "--metrics", "rouge1")
    assert done.returncode == 2
    assert "--resamples: 99 are too few for any difference between 3 systems to be real" in done.stderr
    assert "scoring" not in done.stderr


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_not_compared(bad):
    a, b = np.random.default_rng(0).random((2, 20))
    spoilt = np.where(np.arange(20) < 2, bad, b)
    rouge, cider = compare.compare([system("a", rouge1=a, cider=a), system("b", rouge1=b, cider=spoilt)])
    assert rouge.reason is None
    assert cider.reason == "b has 2 of 20 images with a score that is not finite"
    assert (cider.difference, cider.p, cider.adjusted_p, cider.real) == (None,) * 4


def test_images_that_do_not_count_are_left_out_of_a_comparison():
    """As the organisers leave them out of the secondary F1."""
    draw = np.random.default_rng(0)
    predicted = [[set(draw.choice(["C0040405", "C1", "C1306645"], 2)) for _ in range(40)] for _ in "ab"]
    manual = [set(draw.choice(["C0040405", "C1", "C2"], 1)) for _ in range(40)]
    scored = [metrics.score_concepts(one, manual, manual, 2023) for one in predicted]
    rest = [row for row, found in enumerate(manual) if "C0040405" in found]
    alone = [
        metrics.score_concepts([one[r] for r in rest], *[[manual[r] for r in rest]] * 2, 2023)
        for one in predicted
    ]
    assert 5 < len(rest) < 35

    def secondary(both: list) -> compare.Difference:
        ids = [f"i{row:06}" for row in range(len(both[0]["f1"].per_image))]
        pair = [compare.System(name, ids, "same", one) for name, one in zip("ab", both, strict=True)]
        f1, secondary = compare.compare(pair)
        assert (f1.metric, f1.reason, secondary.metric) == ("f1", None, "f1_secondary")
        return secondary

    assert secondary(scored) == secondary(alone)
    assert secondary(scored).p is not None
    other = metrics.score_concepts(predicted[1], manual, manual[::-1], 2023)
    assert secondary([scored[0], other]).reason == "other images count for the one than for the other"


def test_a_draw_without_a_score_is_not_compared(monkeypatch):
    """A corpus metric that has no value for some draws has no p and no interval either."""
    rows = np.array([[1.0, 1.0, 1.0]] + [[0.0, 1.0, 1.0]] * 19)

    def shaky(totals):
        return np.where(totals[..., 0] > 0, totals[..., 0], np.nan)

    monkeypatch.setattr(compare, "aggregate", lambda name: shaky)
    pair = [system("a", bleu1=rows), system("b", bleu1=rows)]
    with pytest.raises(UserError, match="some draws of the images have a score that is not finite") as error:
        compare.compare(pair)
    assert error.value.exit_code == 1


def test_no_p_value_of_nan():
    for null, observed in (([np.nan, 0.0], 0.1), ([0.0, 0.0], np.nan)):
        with pytest.raises(ValueError, match="not finite"):
            compare.p_value(np.array(null), observed, False)


def test_an_adjusted_difference_is_real_by_its_new_p_and_its_interval():
    one = Difference("rouge1", "a", "b", 0.1, 0.01, 0.2, 0.02)
    assert compare.adjust(one, 0.04).verdict == "b higher"
    assert compare.adjust(one, 0.05).verdict == "not shown"
    touching = Difference("rouge1", "a", "b", 0.1, 0.0, 0.2, 0.01)
    assert compare.adjust(touching, 0.01).verdict == "not shown"
    below = Difference("rouge1", "a", "b", -0.1, -0.2, -0.01, 0.01)
    assert compare.adjust(below, 0.01).verdict == "a higher"
    alone = Difference("rouge1", "a", "b", 0.1, None, None, 0.02)
    assert compare.adjust(alone, 0.02).real is False


def test_one_image_has_no_interval(tmp_path):
    files = [write_file(tmp_path / f"{name}.csv", ["i"], [f"ct of the {name}"]) for name in ("head", "leg")]
    references = write_file(tmp_path / "r.csv", ["i"], ["ct of the head"])
    arguments = [*files, "--references", references, "--metrics", "rouge1, bleu1"]
    done = harness(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "-0.2500 " in done.stdout
    assert "[" not in done.stdout.partition("\n")[2]
    rows = harness(tmp_path, *arguments, "--format", "csv").stdout.splitlines()
    assert rows[1].split(",")[5:9] == ["-0.25", "", "", "1.0"]


def test_checkpoints_of_one_name_and_other_content_are_not_compared():
    a, b = np.random.default_rng(0).random((2, 20))
    pair = [system("a", rouge1=a, bleurt=a), system("b", rouge1=b, bleurt=b)]
    for one, digest in zip(pair, ("1a2b3c4d", "5e6f7a8b"), strict=True):
        one.scores["bleurt"] = given("bleurt", a, signature=f"bleurt|clef2023|weights/bleurt@{digest}|fp32")
    found = {one.metric: one for one in compare.compare(pair)}
    changes = "weights/bleurt@1a2b3c4d / weights/bleurt@5e6f7a8b"
    assert found["bleurt"].reason == f"the signatures differ: {changes}"
    assert found["bleurt"].p is None
    assert found["rouge1"].p is not None
