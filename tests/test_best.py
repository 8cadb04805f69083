"""What `harness best` chooses, against the same choice from the tables per image."""

import contextlib
import csv
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.commands import harness
from support.comparisons import system
from support.experiments import EXPERIMENT

from harness.best import Choice, as_experiment, choose
from harness.best.candidates import KINDS, Option, find
from harness.best.options import planned, soup, wanted
from harness.cli.terminal import Terminal
from harness.config.experiment import load
from harness.data.halves import HALVES, HELD, TUNE, half
from harness.errors import UserError
from harness.records.files import read_captions
from harness.run import run
from harness.scoring.compare import on_half
from harness.steps.plan import prepare

OTHERS = """
  greedy: {predict: {num_beams: 1, max_new_tokens: 16}}
  odd: {predict: {num_beams: 3, num_return_sequences: 3, max_new_tokens: 9}}
"""
RUNS = ("small/opt-s42", "others/greedy-s42", "others/odd-s42")
IDS = [f"image{number}" for number in range(600)]


def option(label: str, values: np.ndarray) -> Option:
    """An option with these ROUGE-1 scores (600,); its runs are the parts of its label."""
    whole = system(label, ids=IDS, rouge1=values)
    systems = {one: on_half(whole, one) for one in HALVES}
    runs = tuple(label.split("+"))
    return Option(label, "ensemble" if len(runs) > 1 else "single", runs, None, Path(), systems, {})


def scores(seed: int, better: float = 0.0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(0.5 + better, 0.1, len(IDS)), 0, 1)


def test_a_higher_score_that_is_not_shown_goes_to_the_simpler_option():
    base = scores(0)
    noise = np.random.default_rng(1).normal(0, 0.1, len(IDS))
    tune = np.array([half(image) == TUNE for image in IDS])
    noise -= noise[tune].mean() - 0.001  # a little better on the tune half, by chance
    options = [option("1", base), option("2", scores(2, -0.1)), option("1+2", base + noise)]
    winner, tests = choose(options, "rouge1")
    assert winner.label == "1"
    ((test, said),) = tests
    assert (test.a, test.b, test.real, said) == ("1", "1+2", False, "1 is simpler and is taken")


def test_a_shown_difference_takes_the_larger_ensemble_and_a_tie_the_smaller():
    base = scores(0)
    pair, three = base + 0.05, base + 0.05 + np.random.default_rng(3).normal(0.0005, 0.1, len(IDS))
    tune = np.array([half(image) == TUNE for image in IDS])
    three += pair[tune].mean() - three[tune].mean() + 0.0005
    options = [option("1", base), option("1+2", pair), option("1+2+3", three)]
    assert choose(options, "rouge1")[0].label == "1+2"
    assert choose(options[:2], "rouge1")[0].label == "1+2"
    assert choose([options[0], option("1+2+3", base + 0.1)], "rouge1")[0].label == "1+2+3"


def test_equal_options_go_to_the_first():
    assert choose([option(label, scores(0)) for label in ("2", "1", "2+1")], "rouge1")[0].label == "2"


def test_the_held_half_never_influences_the_choice():
    random = np.random.default_rng(0)
    held = np.array([half(image) == HELD for image in IDS])
    for seed in range(3):
        arrays = {
            label: scores(seed + n, better=0.01 * n) for n, label in enumerate(("1", "2", "1+2", "1+2+3"))
        }
        wanted = choose([option(label, values) for label, values in arrays.items()], "rouge1")[0].label
        altered = {label: np.where(held, random.random(len(IDS)), values) for label, values in arrays.items()}
        assert choose([option(*one) for one in altered.items()], "rouge1")[0].label == wanted
    turned = {label: np.where(held, values, 1 - values) for label, values in arrays.items()}
    assert choose([option(*one) for one in turned.items()], "rouge1")[0].label != wanted  # the tune half does


def run_here(project: Path, file: Path | str) -> list[dict]:
    """The records of an experiment that runs in this process."""
    with contextlib.chdir(project):
        silent = Terminal(silent=True)
        return [run(plan, silent, "a command") for plan in prepare(load(Path(file)), silent)]


@pytest.fixture(scope="module")
def project(small_run, tmp_path_factory) -> Path:
    """The small runs, and two runs that caption with their weights in other ways."""
    place = tmp_path_factory.mktemp("best")
    shutil.copytree(small_run / "kept", place, dirs_exist_ok=True)
    (place / "small.yaml").write_text(EXPERIMENT)
    text = EXPERIMENT.partition("variants:")[0].replace("name: small", "name: others")
    (place / "others.yaml").write_text(f"{text}variants:{OTHERS}")
    run_here(place, "others.yaml")
    return place


@pytest.fixture(scope="module")
def chosen(project) -> dict:
    done = harness(project, "best", "small.yaml", "others.yaml", "--format", "json")
    assert "5 by consensus to do: " in done.stderr
    return json.loads(done.stdout)


def table(project: Path, folder: str) -> dict[str, float]:
    """BERTScore by image, from the table of a run."""
    record = json.loads((project / folder / "run.json").read_text())
    file = project / "runs" / record["artifacts"]["scores/valid_after_per_image.csv"]
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    return {row["ID"]: float(row["bertscore"]) for row in rows}


def brute_p(differences: np.ndarray) -> float:
    """The exact two-sided p of paired swaps, by all of them."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    null, observed = (signs * differences).mean(1), differences.mean()
    tail = min((null <= observed + 1e-9).mean(), (null >= observed - 1e-9).mean())
    return min(1.0, 2 * tail)


@pytest.mark.ci
def test_the_choice_is_that_of_the_tables_per_image(project, chosen):
    tables = {one["label"]: table(project, one["folder"]) for one in chosen["options"]}
    costs = {one["label"]: (len(one["runs"]), KINDS.index(one["kind"])) for one in chosen["options"]}
    for one in chosen["options"]:
        for name in HALVES:
            values = [value for image, value in tables[one["label"]].items() if half(image) == name]
            assert one["scores"][name]["value"] == pytest.approx(np.mean(values), abs=1e-6)
            assert one["scores"][name]["n"] == len(values)
            assert one["image_gap"][name]["gap"] is not None
    tune = {
        label: np.array([found[image] for image in sorted(found) if half(image) == TUNE])
        for label, found in tables.items()
        if "dedup" not in label
    }
    best = max(tune, key=lambda label: (round(tune[label].mean(), 9), [-part for part in costs[label]]))
    wanted = best
    for cost in sorted(set(costs.values())):
        top = max((label for label in tune if costs[label] == cost), key=lambda label: tune[label].mean())
        if top == best or brute_p(tune[best] - tune[top]) >= 0.05:
            wanted = top
            break
    assert chosen["winner"].removesuffix(" dedup") == wanted
    assert {one["label"] for one in chosen["options"]} >= {"1", "2", "3"}
    kinds = [costs[label] for label in tune]
    assert kinds == [*[(1, 0)] * 3, (1, 2), *[(2, 3)] * 3, (3, 3)]
    again = {image: row for image, row in tables[chosen["best_single"]].items() if half(image) == HELD}
    for one in chosen["options"]:
        if difference := one["difference"]:
            theirs = np.array([tables[one["label"]][image] for image in again])
            gap = theirs - np.array(list(again.values()))
            assert difference["difference"] == pytest.approx(gap.mean(), abs=1e-6)
            assert difference["p"] == pytest.approx(brute_p(gap), abs=1e-9)


@pytest.mark.ci
def test_what_is_left_out_has_a_reason_and_a_twin_is_no_option(project, chosen):
    assert list(chosen["runs"].values()) == list(RUNS)
    assert "has the captions of small/opt-s42" in chosen["left_out"]["small/opt_dedup-s42"]
    kept = json.loads((project / "runs" / "best" / "small" / "best.json").read_text())
    assert kept == chosen


@pytest.mark.ci
def test_the_written_experiment_runs_and_makes_the_test_submission(project, chosen):
    (record,) = run_here(project, chosen["experiment"])
    assert record["status"] == "FINISHED"
    assert any("caption-test" in place for place in record["submissions"])
    winner = next(one for one in chosen["options"] if one["label"] == chosen["winner"])
    theirs = json.loads((project / winner["folder"] / "run.json").read_text())
    ours, other = (
        read_captions(project / "runs" / one["artifacts"]["predictions/valid_after.csv"])
        for one in (record, theirs)
    )
    assert ours == other


@pytest.mark.ci
def test_the_experiment_of_an_ensemble_is_its_config_with_all_splits(project, chosen, monkeypatch):
    monkeypatch.chdir(project)
    given = find([Path(run) for run in RUNS], "small", None)
    assert list(given.singles) == ["1", "2", "3"]
    labels = [(one.kind, len(one.runs)) for one in wanted(given, 3)]
    assert labels == [("n-best", 1), ("ensemble", 2), ("ensemble", 2), ("ensemble", 2), ("ensemble", 3)]
    assert soup(given, 3) is None  # the three runs have one training
    config = wanted(given, 3)[-1].config
    one = given.singles["1"]
    decided = Choice(given, [one], one, replace(one, config=config), [])
    file = project / "three.yaml"
    file.write_text(as_experiment(decided, file, "a command"))
    (loaded,) = load(file)
    assert loaded.consensus == config.consensus
    assert loaded.predict.splits == ("valid", "test")
    assert loaded.name == "best/small/winner"
    assert loaded.model_copy(update={"predict": config.predict, "name": config.name}) == config
    by_reading = wanted(replace(given, metric="cider_ptb"), 2)[-1].config.consensus
    assert by_reading.utility == {"cider": 1}  # captions are compared by the metric that has the reading
    plans, notes = planned(given, 3, Terminal(silent=True))
    assert notes == []  # as the runs were named before, all options are done
    assert [one.label for one, _ in plans] == [one.label for one in wanted(given, 3)]


@pytest.mark.ci
def test_runs_that_cannot_be_used_are_named(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match="no run in runs/ and no experiment file") as refused:
        find([Path("small/none-s42")], None, None)
    assert refused.value.exit_code == 2
    Path("later.yaml").write_text(EXPERIMENT.replace("name: small", "name: later"))
    with pytest.raises(UserError, match="No run can be used") as refused:
        find([Path("later.yaml")], None, None)
    assert refused.value.exit_code == 1
    assert [problem.what for problem in refused.value.problems] == ["it has not run yet"] * 2
    given = find([Path("later.yaml"), Path("small/opt-s42")], None, None)
    assert list(given.left_out) == ["later/opt-s42", "later/opt_dedup-s42"]
