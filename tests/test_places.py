"""The place of a run and its interval, against draws that are counted one by one."""

from dataclasses import replace

import numpy as np
import pytest
from support import leaderboards
from support.leaderboards import board, record, scored, write_run, write_scored

from harness import leaderboard
from harness.config.editions import EDITIONS

project = leaderboards.project  # the fixture


def images(mean: float, n: int, seed: int = 0) -> np.ndarray:
    """Scores of images with this mean."""
    values = np.random.default_rng(seed).normal(0, 0.12, n)
    return values - values.mean() + mean


def run_of(project, variant: str, values: np.ndarray, split: str = "valid", references: str = "same"):
    return write_scored(
        project, record(variant=variant, split=split), {"bertscore": scored(values)}, references
    )


@pytest.mark.parametrize("mean", [0.6281, 0.6410, 0.6160, 0.6460])
def test_a_place_has_the_interval_of_the_places_of_all_draws(mean, project):
    values = images(mean, EDITIONS[2023].images["test"])
    run_of(project, "ours", values, "test")
    found = board(project)
    place = leaderboard.official(found, found.entries[0])
    random, teams = np.random.default_rng(5), [row.scores["bertscore"] for row in found.standings]
    draws = [values[random.integers(len(values), size=len(values))].mean() for _ in range(2_000)]
    places = [1 + sum(team > one for team in teams) for one in draws]
    low, high = np.percentile(places, [2.5, 97.5])
    assert place["place"] == 1 + sum(team > values.mean() for team in teams)
    known = [end if end <= len(teams) else None for end in (low, high)]
    assert [place["best"], place["worst"]] == known
    assert not place["hypothetical"]


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (0.6300, 0.0128, "2nd, 95 %: 1st to 3rd"),
        (0.7, 0.001, "1st, 95 %: 1st"),
        (0.615, 0.01, "5th, 95 %: 3rd to below 5th"),
        (0.5, 0.01, "below 5th, 95 %: below 5th"),
        (0.6300, None, "2nd"),
    ],
)
def test_a_place_in_words(value, half, text, project):
    own = leaderboards.score(value)
    own |= {"low": None, "high": None} if half is None else {"low": value - half, "high": value + half}
    write_run(project, record(scores={"valid": {"after": {"bertscore": own}}}))
    found = board(project)
    place = leaderboard.official(found, found.entries[0])
    assert (place["text"], place["hypothetical"]) == (text, True)


def test_a_run_without_a_rank_has_no_place(project):
    write_run(project, record(standin_model=True))
    found = board(project)
    assert leaderboard.official(found, found.entries[0]) is None


def small_board(project, own: dict[str, np.ndarray], **references: str) -> leaderboard.Board:
    """A board of runs with these scores of few images, as if their edition had so many."""
    for variant, values in own.items():
        run_of(project, variant, values, references=references.get(variant, "same"))
    found = board(project)
    entries = [replace(entry, apart=None) for entry in found.entries]
    return replace(found, entries=sorted(entries, key=lambda one: -one.value("bertscore")))


def test_ranks_among_ours_are_drawn_with_the_same_images_for_all(project):
    n = 400
    hard = images(0, n, seed=1)  # what all find hard; paired, it is not noise
    own = {"good": images(0.6101, n, 2) / 50 + 0.6 + hard, "same": images(0.61, n, 3) / 50 + 0.6 + hard}
    own |= {"bad": images(0.55, n, 4) / 50 + 0.59 + hard}
    small = small_board(project, own)
    ranks, why = leaderboard.among_ours(small)
    assert why is None
    random, counted = np.random.default_rng(9), []
    for _ in range(2_000):
        rows = random.integers(n, size=n)
        means = [values[rows].mean() for values in own.values()]
        counted.append([1 + sum(other > one for other in means) for one in means])
    for variant, column in zip(own, np.array(counted).T, strict=True):
        (found,) = (ends for folder, ends in ranks.items() if folder.name == f"{variant}-s42")
        assert found == tuple(np.percentile(column, [2.5, 97.5]))
    said = [run["rank_text"] for run in leaderboard.as_dict(small)["runs"]]
    assert said == ["1st, 95 %: 1st to 2nd", "2nd, 95 %: 1st to 2nd", "3rd, 95 %: 3rd"]
    header, *rows = leaderboard.rows([small])
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    ends = {(row["rank"], row["rank_best"], row["rank_worst"]) for row in rows if row["kind"] == "run"}
    assert ends == {(1, 1, 2), (2, 1, 2), (3, 3, 3)}


def test_ranks_have_no_interval_if_a_run_has_other_references(project):
    small = small_board(project, {"one": images(0.61, 50), "two": images(0.60, 50)}, two="other")
    ranks, why = leaderboard.among_ours(small)
    assert ranks == {}
    assert "other references" in why
    found = leaderboard.as_dict(small)
    assert [run["rank_text"] for run in found["runs"]] == ["1st", "2nd"]
    assert "other references" in found["without_intervals"]
