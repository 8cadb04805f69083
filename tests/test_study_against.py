"""The best trial of a study against its base, and which plots a study has."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from harness.scoring import compare
from harness.study import against, plots


def spec(*objective: str, half: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(name="s/study", objective=objective, config=SimpleNamespace(half=half))


@pytest.fixture
def folder(small_run, tmp_path, monkeypatch) -> Path:
    """The two runs of the small experiment as trials 0 and 1 of a study."""
    unneeded = shutil.ignore_patterns("cache", "checkpoints")
    shutil.copytree(small_run / "kept" / "runs", tmp_path / "runs", ignore=unneeded)
    place = tmp_path / "runs" / "small"
    for number, name in enumerate(("opt-s42", "opt_dedup-s42")):
        new = place / f"trial-{number:04}-s42"
        (place / name).rename(new)
        record = json.loads((new / "run.json").read_text())
        assert record["scores"]["valid"]["after"]["rouge1"]["value"] is not None
    monkeypatch.chdir(tmp_path)
    return place


@pytest.mark.parametrize("half", [None, "tune"])
def test_the_gain_is_that_of_the_paired_test(folder, half):
    found = against.against_base(spec("rouge1", half=half), SimpleNamespace(number=1), folder)
    systems = [compare.read_run(folder / f"trial-{number:04}-s42", str(number)) for number in (0, 1)]
    if half:
        systems = [compare.on_half(system, "held") for system in systems]
    (wanted,) = compare.compare(systems, ["rouge1"])
    one = found["differences"]["rouge1"]
    assert (one["difference"], one["low"], one["p"]) == (wanted.difference, wanted.low, wanted.p)
    assert found["images"] == len(systems[0].ids)
    said = against.described(found, 20)
    assert f"rouge1 {wanted.difference:+.4f}" in said
    assert ("of the half held" in said) == bool(half)
    assert ("too high on average" in said) == (not half)


def test_the_base_has_no_gain_and_what_is_gone_is_said(folder):
    assert against.against_base(spec("rouge1"), SimpleNamespace(number=0), folder) is None
    found = against.against_base(spec("rouge1"), SimpleNamespace(number=7), folder)
    assert "the run of trial 7" in against.described(found, 20)
    assert "cider is absent" not in against.described(found, 20)


@pytest.mark.parametrize(("trials", "importance"), [(29, False), (30, True)])
def test_importance_needs_thirty_trials(tmp_path, trials, importance):
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: -(trial.suggest_float("x", -1, 1) ** 2), n_trials=trials)
    drawn, absent = plots.draw(study, spec("rouge1"), tmp_path / "plots")
    assert drawn == ["history.png", *["importance.png"] * importance]
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    assert absent == (
        [] if importance else [f"no plot of importance: it needs 30 finished trials, and {trials} finished"]
    )
