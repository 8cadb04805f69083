"""Finite spaces: every point is tried once, with any workers and sampler."""

import json
import os
from pathlib import Path

import pytest
from optuna.trial import TrialState
from support.studies import BASE, fork, opened

from harness.study.spec import Study, load
from harness.study.trials import Trials

FINITE = """
base: small.yaml
space:
  predict.num_beams: {choices: [1, 2]}
  predict.min_new_tokens: {low: 8, high: 24, log: true, when: {predict.num_beams: 2}}
  postprocess.deduplicate: {choices: [false, true]}
trials: 500
"""
"""1 x 2 points without `when`, and 17 x 2 with it."""


def finite(folder: Path, sampler: str, name: str = "finite") -> Study:
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(BASE)
    (folder / f"{name}.yaml").write_text(FINITE + f"sampler: {{name: {sampler}, seed: 3}}\n")
    return load(folder / f"{name}.yaml")


def points_of(trials: Trials) -> list[str]:
    done = trials.study.get_trials(states=(TrialState.COMPLETE,))
    return [json.dumps(trial.params, sort_keys=True) for trial in done]


@pytest.mark.ci
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_space_that_has_an_end_is_gone_through_once(tmp_path, sampler):
    spec = finite(tmp_path, sampler)
    assert spec.trials == 2 + 17 * 2
    trials = opened(spec, tmp_path)
    while (trial := trials.take()) is not None:
        trials.finish(trial, "COMPLETE", {"bertscore": len(trial.values) + trial.values["predict.num_beams"]})
    found = points_of(trials)
    assert len(found) == len(set(found)) == 36
    wanted = [(1, None, d) for d in (False, True)]
    wanted += [(2, tokens, d) for tokens in range(8, 25) for d in (False, True)]
    keys = ("predict.num_beams", "predict.min_new_tokens", "postprocess.deduplicate")
    assert {tuple(json.loads(point).get(key) for key in keys) for point in found} == set(wanted)


def test_random_points_are_those_of_the_seed_whoever_takes_them(tmp_path):
    """Two workers that hold trials at the same time, one trial that is given back, against one worker."""
    spec = finite(tmp_path / "one", "random")
    alone = opened(spec, tmp_path / "one")
    for _ in range(12):
        alone.finish(alone.take(), "COMPLETE", {"bertscore": 0.5})
    spec = finite(tmp_path / "two", "random")
    first, second = (opened(spec, tmp_path / "two") for _ in range(2))
    for _ in range(6):
        a, b = first.take(), second.take()
        assert a.values != b.values
        second.finish(b, "COMPLETE", {"bertscore": 0.1})
        first.give_back(a)
        again = second.take()
        assert again.values == a.values
        second.finish(again, "COMPLETE", {"bertscore": 0.9})
    assert sorted(points_of(first)) == sorted(points_of(alone))


@pytest.mark.ci
def test_many_workers_of_a_space_that_has_an_end_repeat_nothing(tmp_path):
    spec = finite(tmp_path, "tpe")
    log = tmp_path / "log"
    running = [fork.Process(target=counted, args=(spec, tmp_path, log)) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
        assert process.exitcode == 0
    found = log.read_text().splitlines()
    assert len(found) == len(set(found)) == 30


def counted(spec: Study, folder: Path, log: Path) -> None:
    trials = opened(spec, folder)
    for _ in range(10):
        trial = trials.take()
        trials.finish(trial, "COMPLETE", {"bertscore": 0.5})
        with log.open("a") as file:
            file.write(json.dumps(trial.values, sort_keys=True) + "\n")
    os._exit(0)
