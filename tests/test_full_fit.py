"""Training on train and valid for the epochs that another run found, and that no score on valid exists."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import ranks
from support.commands import harness
from support.experiments import EXPERIMENT, begin, messages, write
from support.models import load_tiny, stages
from support.reports import data_of
from support.training import Interrupted, config, run, splits

from harness.config.experiment import load as load_experiment
from harness.config.sections import AugmentConfig
from harness.data import load
from harness.errors import UserError
from harness.leaderboard.entries import _apart
from harness.records.files import read_captions
from harness.scoring import compare
from harness.steps import epochs
from harness.steps.plan import Plan, dry, prepare
from harness.store import write_json
from harness.tracking.contents import scores_of, tags_of
from harness.training import schedule, train
from harness.training.joined import joined

SETTINGS = config(stages=stages(2, 2))
UNTIL = {"stage": 2, "epoch": 1}


def both(folder):
    """The 20 training images and 3 of the 4 validation images, as one split of two parts."""
    parts = splits(load_tiny(folder))
    return joined([(parts["train"], range(20)), (parts["valid"], [0, 2, 3])]), parts


def full_fit(folder, directory, split, log=lambda row: None, until=UNTIL, settings=SETTINGS):
    directory.mkdir(exist_ok=True)

    def evaluate(loaded):
        raise AssertionError("validated")

    how = (settings, AugmentConfig(), lambda: load_tiny(folder, dropout=0.1), {"train": split}, "cpu", 42)
    training = train.Training(*how, directory, log, evaluate, until=until)
    loaded = training.run()
    rows = [json.loads(line) for line in (directory / "losses.jsonl").read_text().splitlines()]
    return loaded.model.state_dict(), rows


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    return full_fit(tiny_folder, tmp_path_factory.mktemp("full"), both(tiny_folder)[0])


def test_two_splits_as_one_have_the_images_and_texts_of_both(tiny_folder):
    one, parts = both(tiny_folder)
    assert one.ids == [*parts["train"].ids, *(parts["valid"].ids[i] for i in (0, 2, 3))]
    pixels = np.concatenate([parts["train"].pixels, parts["valid"].pixels[[0, 2, 3]]])
    order = np.random.default_rng(0).permutation(23)
    assert np.array_equal(one.pixels[order], pixels[order])
    assert one.captions[21] is parts["valid"].captions[2]
    assert one.concepts[22] is parts["valid"].concepts[3]


@pytest.mark.ci
def test_the_weights_are_those_of_a_longer_training_at_its_best_epoch(
    tiny_folder, whole, tmp_path, monkeypatch
):
    """Its oracle validates after each epoch, and is the best after the first epoch of the second stage."""
    one, parts = both(tiny_folder)
    plain = replace(one, pixels=one.pixels[np.arange(23)])
    data = {"train": plain, "valid": parts["valid"]}
    monkeypatch.setattr("support.training.data_of", lambda folder, **model: data)
    scores = iter([1.0, 2.0, 3.0, 2.0])
    how = {"dropout": 0.1, "evaluate": lambda: {"valid_primary": next(scores)}}
    longer, rows = run(tiny_folder, tmp_path / "longer", SETTINGS, **how)
    for name, weight in longer.model.state_dict().items():
        assert torch.equal(weight, whole[0][name]), name
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [row["loss"] for row in whole[1]] == losses[:9]  # 3 steps an epoch
    assert not any("valid_loss" in row for row in whole[1])


@pytest.mark.ci
def test_a_stage_that_ended_early_ends_there_again_and_the_best_average_is_kept(
    tiny_folder, tmp_path, monkeypatch
):
    """The oracle ends its first stage by patience; the average after the next epoch is its best."""
    one, parts = both(tiny_folder)
    plain = replace(one, pixels=one.pixels[np.arange(23)])
    data = {"train": plain, "valid": parts["valid"]}
    monkeypatch.setattr("support.training.data_of", lambda folder, **model: data)
    scores = iter([0.2, 0.1, 0.1, 0.1, 0.3, 0.9, 0.1, 0.1])
    settings = config(stages=stages(3, 2), ema=0.7, patience=1)
    how = {"dropout": 0.1, "evaluate": lambda: {"valid_primary": next(scores)}}
    longer, rows = run(tiny_folder, tmp_path / "longer", settings, **how)
    validations = [row for row in rows if "valid_loss" in row]
    best = max(validations, key=lambda row: row["valid_primary"])
    until = epochs._until(settings, validations, best)
    assert until == {"stage": 2, "epoch": 1, "before": [2]}

    def stop(row):
        if row["step"] == 9:
            raise Interrupted

    given = {"until": until | {"average": True}, "settings": settings}
    with pytest.raises(Interrupted):
        full_fit(tiny_folder, tmp_path / "full", one, stop, **given)
    weights, losses = full_fit(tiny_folder, tmp_path / "full", one, **given)
    assert len(losses) == 9
    for name, weight in longer.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    last, _ = full_fit(tiny_folder, tmp_path / "last", one, until=until, settings=settings)
    assert any(not torch.equal(weight, weights[name]) for name, weight in last.items())
    shorter = epochs.shortened(settings, until)
    assert schedule.total_steps(shorter, 23) == 9
    assert "the average of the last weights is kept" in epochs.described(settings, None)


def test_the_start_of_a_stage_is_the_end_of_the_stage_before():
    rows = [{"stage": 1, "epoch": 1}, {"stage": 1, "epoch": 2}, {"stage": 2, "epoch": 0}]
    assert epochs._until(SETTINGS, rows, rows[-1]) == {"stage": 1, "epoch": 2}
    assert epochs._until(SETTINGS, rows[2:], {"stage": 1, "epoch": 0}) is None


@pytest.mark.parametrize(
    "at", [pytest.param(4, marks=pytest.mark.ci), pytest.param(9, marks=pytest.mark.slow)]
)
def test_an_interruption_changes_no_bit(tiny_folder, whole, tmp_path, at):
    one, _ = both(tiny_folder)

    def stop(row):
        if row["step"] == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        full_fit(tiny_folder, tmp_path / "parts", one, stop)
    weights, rows = full_fit(tiny_folder, tmp_path / "parts", one)
    assert [row["step"] for row in rows] == list(range(1, 10))
    for name, weight in whole[0].items():
        assert torch.equal(weight, weights[name]), name
    again, _ = full_fit(tiny_folder, tmp_path / "parts", one, stop)  # it has ended: nothing is trained
    assert all(torch.equal(weight, again[name]) for name, weight in whole[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_ranks_keep_the_last_weights_or_their_average_too(tiny_folder, tmp_path, zero_stage):
    settings = ranks.TRAIN | {"zero_stage": zero_stage, "ema": 0.7}
    until = UNTIL | {"average": zero_stage == 3}
    for processes in (1, 2):
        ranks.train(tiny_folder, tmp_path / str(processes), processes, train=settings, until=until)
        assert [row["epoch"] for row in ranks.rows(tmp_path / str(processes))][-1] == 1
    one, two = (load_file(tmp_path / name / "best.safetensors") for name in ("1", "2"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=1e-5, rtol=1e-4, msg=name)


TEXT = (
    EXPERIMENT.partition("variants:")[0].replace("name: small", "name: fit")
    + """
variants:
  found: {train: {patience: 1}}
  full:
    data: {fit_on: [train, valid]}
    train: {patience: 1, epochs_of: fit/found-s42}
"""
)
CHANGES = ("--set", "train.stages.0.epochs=5", "--set", "train.learning_rate=1")
"""A learning rate so large that the first epochs are the best."""


@pytest.fixture(scope="module")
def project(small_run, tmp_path_factory) -> Path:
    """A project whose one command finds the epochs, and then trains on train and valid."""
    place = begin(small_run, tmp_path_factory.mktemp("fit"), TEXT)
    done = harness(place, "run", "small.yaml", *CHANGES)
    (place / "stdout").write_text(done.stdout)
    (place / "stderr").write_text(done.stderr)
    return place


def record(project, run):
    return json.loads((project / "runs" / "fit" / run / "run.json").read_text())


def rows_of(project, run):
    file = project / "runs" / record(project, run)["artifacts"]["losses.jsonl"]
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.ci
def test_a_run_says_which_stage_ended_early(project):
    made, rows = record(project, "found-s42"), rows_of(project, "found-s42")
    note = made["training"]["notes"][0]
    assert note in (project / "stderr").read_text()
    assert f"found-s42: {note}" in " ".join((project / "stdout").read_text().split())
    one = made["training"]["ended"][0]
    assert one["epoch"] < one["epochs"] == 5
    epochs_of_one = [row["epoch"] for row in rows if "valid_loss" in row and row["stage"] == 1]
    assert epochs_of_one == list(range(1, one["epoch"] + 1))
    assert note in tags_of(made)["training.notes"]
    assert note in data_of(project / "runs/fit/found-s42/report.html")["facts"]["training"]


@pytest.mark.ci
def test_the_full_fit_trains_the_epochs_that_the_other_run_found(project):
    made, rows = record(project, "full-s42"), rows_of(project, "full-s42")
    validations = [row for row in rows_of(project, "found-s42") if "valid_loss" in row]
    best = max(validations, key=lambda row: row["valid_primary"])
    found = made["training"]["epochs_of"]
    assert (found["stage"], found["epoch"]) == (best["stage"], best["epoch"])
    assert found["run"] == "fit/found-s42"
    assert (rows[-1]["stage"], rows[-1]["epoch"]) == (best["stage"], best["epoch"])
    assert len([row for row in rows if row["stage"] == rows[-1]["stage"]]) == 4 * best["epoch"]  # 60 / 16
    assert not any("valid_loss" in row for row in rows)


@pytest.mark.ci
def test_there_is_no_score_on_validation_anywhere(project):
    made, folder = record(project, "full-s42"), project / "runs/fit/full-s42"
    assert made["status"] == "FINISHED"
    assert made["scores"] == {}
    assert made["unscored"] == {"valid": "trained on validation images"}
    assert not [name for name in (*made["steps"], *made["artifacts"]) if "valid" in name or "score" in name]
    assert not any(key.startswith("valid") for key in scores_of(made))
    assert tags_of(made)["absent/valid"] == "trained on validation images"
    said = "it has no scores on validation: trained on validation images"
    assert said in _apart(made, "valid").split("; ")
    page = data_of(folder / "report.html")
    assert page["scores"] == []
    assert any("trained on validation images" in text for text in page["warnings"])
    assert "trained on validation images" in (project / "stdout").read_text()
    with pytest.raises(UserError, match="has no scores: trained on validation images"):
        compare.read_run(folder, "full")
    shown = " ".join(harness(project, "leaderboard").stdout.split())
    assert "it has no scores on validation: trained on validation images" in shown


@pytest.mark.ci
def test_the_test_split_is_captioned_and_submitted(project):
    made = record(project, "full-s42")
    (submission,) = made["submissions"]
    manifest = json.loads((project / submission).with_name("manifest.json").read_text())
    assert (manifest["split"], manifest["n"]) == ("test", 6)
    assert any(note.startswith("learns from train and valid up to stage") for note in manifest["notes"])
    assert len(read_captions(project / "runs" / made["artifacts"]["predictions/test_before.csv"])) == 6


@pytest.mark.ci
def test_its_captions_of_validation_are_refused_to_a_consensus(project):
    text = EXPERIMENT.partition("variants:")[0].replace("name: small", "name: joint")
    text += "consensus: {own: 0, runs: [fit/found-s42, fit/full-s42], utility: {rouge1: 1}}\n"
    (project / "joint.yaml").write_text(text)
    done = harness(project, "run", "joint.yaml", code=2)
    assert "predict.splits=[test]" in done.stderr
    done = harness(project, "run", "joint.yaml", "--set", "predict.splits=[test]")
    joint = json.loads((project / "runs/joint/base-s42/run.json").read_text())
    assert joint["scores"] == {}
    assert len(joint["submissions"]) == 1


class Silent:
    def say(self, text):
        pass

    def begin(self, run, step):
        pass

    def progress(self, label):
        return contextlib.nullcontext(lambda *_: None)


@pytest.fixture
def kept(small_run, tmp_path, monkeypatch):
    """The finished small run, in the current folder."""
    for name in ("data", "runs"):
        shutil.copytree(small_run / "kept" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return write(tmp_path, EXPERIMENT)


def plan(file, *sets, of="small/opt-s42"):
    found = load_experiment(file, ["data.fit_on=[train,valid]", f"train.epochs_of={of}", *sets])[0]
    return Plan(found, load(found.data))


def refused(file, *sets, of="small/opt-s42"):
    with pytest.raises(UserError) as caught:
        epochs.found(plan(file, *sets, of=of))
    return str(caught.value)


def test_what_differs_from_the_named_run_is_said(kept):
    rows = [json.loads(line) for line in next(Path("runs/steps").glob("train-*/losses.jsonl")).open()]
    best = max((row for row in rows if "valid_loss" in row), key=lambda row: row["valid_primary"])
    same = ("seed=7", "train.evaluate_images=3", "train.zero_stage=1", "train.keep_best=2")
    found = epochs.found(plan(kept, *same))
    assert (found["stage"], found["epoch"]) == (best["stage"], best["epoch"])
    assert "not a run: it has no run.json" in refused(kept, of="small/other-s42")
    said = refused(kept, "train.learning_rate=2e-3", "model.image_size=112")
    assert "train.learning_rate is 0.002 here and 0.001 there" in said
    assert "model.image_size is 112 here and 56 there" in said
    assert "train.epochs_of" in said
    assert "train.stages" in refused(kept, "train.stages.1.epochs=2")
    assert "the images or labels of valid are not the same" in refused(kept, "data.fraction.valid=0.5")
    file = Path("runs/small/opt-s42/run.json")
    made = json.loads(file.read_text())
    write_json(file, made | {"status": "KILLED"})
    assert "small/opt-s42 has no best epoch yet (status KILLED)" in refused(kept)
    made["config"]["data"]["fit_on"] = ["train", "valid"]
    write_json(file, made)
    assert "trained on validation images itself" in refused(kept)


def test_a_full_fit_has_a_training_of_its_own(kept):
    normal = Plan(load_experiment(kept)[0], load(load_experiment(kept)[0].data))
    assert normal.steps["train"].is_done()
    steps = plan(kept).steps
    assert steps["train"].directory != normal.steps["train"].directory
    assert [name for name in steps if "valid" in name or name.startswith("score")] == []
    same = plan(kept, of="small/opt_dedup-s42")  # another name for the same training
    assert same.steps["train"].canonical == steps["train"].canonical


def test_an_earlier_run_of_the_same_file_is_checked_before_anything_runs(kept):
    write(kept.parent, TEXT.replace("patience: 1, epochs_of", "learning_rate: 5, epochs_of"), "fit.yaml")
    with pytest.raises(UserError, match=r"train.learning_rate is 5.0 here and 0.001 there"):
        prepare(load_experiment(kept.parent / "fit.yaml"), Silent())
    write(kept.parent, TEXT, "fit.yaml")
    assert len(prepare(load_experiment(kept.parent / "fit.yaml"), Silent())) == 2
    looked = dry(load_experiment(kept.parent / "fit.yaml")[1])
    assert looked == {
        "train": "to do, but its epochs are not known yet: runs/fit/found-s42: train.epochs_of: not a run: "
        "it has no run.json"
    }
    (other,) = (one for one in load_experiment(kept.parent / "fit.yaml") if one.variant == "full")
    with pytest.raises(UserError, match=r"not a run: it has no run\.json"):
        prepare([other], Silent())


def test_settings_without_a_meaning_are_refused(tmp_path):
    file = write(tmp_path, EXPERIMENT)
    fit = "data.fit_on=[train,valid]"
    assert "epochs_of needs data.fit_on" in messages(file, "train.epochs_of=a/b-s1")[0]
    assert (
        "patience counts validations, but data.fit_on has valid" in messages(file, fit, "train.patience=2")[0]
    )
    assert "nothing is trained" in messages(file, fit, "train.stages=[]")[0]
    assert "only test can be predicted" in messages(file, fit, "predict.splits=[valid]")[0]
    for wrong in ("[valid]", "[]", "[valid,train]", "[train,train]"):
        assert "[train] or [train, valid] is allowed" in messages(file, f"data.fit_on={wrong}")[0]
