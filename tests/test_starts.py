"""What a training and its stages start from, validations within an epoch, and weights below a floor."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.experiments import EXPERIMENT, messages, write
from support.training import Interrupted, config, run

from harness import records
from harness.cli.terminal import Terminal
from harness.config.experiment import load as load_experiment
from harness.data import load
from harness.errors import UserError
from harness.steps.plan import Plan, dry, prepare
from harness.steps.work import Work
from harness.store import write_json
from harness.training import judges, patience, plots, resume, schedule
from harness.training.forecast import forecast

REWARD = {"metrics": {"rouge1": 1}, "samples": 2, "max_new_tokens": 6}
CAPTION = {"epochs": 1, "losses": {"caption": 1}, "schedule": "constant"}
RL = {"epochs": 1, "losses": {"reward": 1, "caption": 0.5}, "schedule": "constant", "reward": REWARD}
OTHER = ("time", "images_per_second")


def scores(*values):
    """Primary scores of validations one by one."""
    left = iter(values)
    return lambda: {"valid_primary": next(left)}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def told(rows):
    return [{key: value for key, value in row.items() if key not in OTHER} for row in rows]


# --- Stages -----------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_a_stage_starts_from_the_best_weights(tiny_folder, tmp_path):
    """After two epochs, the first of them better, as after this epoch alone; also if it was interrupted."""
    two, best = CAPTION | {"epochs": 2}, RL | {"start": "best"}

    def stop(row):
        if row["step"] == 8 and "loss" in row:
            raise Interrupted

    alone, _ = run(tiny_folder, tmp_path / "a", config(stages=[CAPTION, RL]), evaluate=scores(0.9, 0.9, 1))
    settings, found = config(stages=[two, best]), (0.9, 0.5, 0.9, 1)
    with pytest.raises(Interrupted):
        run(tiny_folder, tmp_path / "b", settings, evaluate=scores(*found), log=stop)
    best, _ = run(tiny_folder, tmp_path / "b", settings, evaluate=scores(0.9, 1))
    last, _ = run(tiny_folder, tmp_path / "c", config(stages=[two, RL]), evaluate=scores(*found))
    assert_equal(best.model.state_dict(), alone.model.state_dict())
    differ = [
        not torch.equal(w, last.model.state_dict()[name]) for name, w in best.model.state_dict().items()
    ]
    assert any(differ)


def test_there_must_be_a_best(tmp_path):
    best = CAPTION | {"start": "best"}
    for stages, changes in (
        ([best], {}),
        ([CAPTION, best], {"evaluate_every": 2}),
        ([RL | {"epochs": 0}, best], {}),
    ):
        with pytest.raises(ValueError, match="start is best, but no validation before"):
            config(stages=stages, **changes)
    config(stages=[RL, best], evaluate_every=0)
    listed = "[{epochs: 1, losses: {caption: 1}}, {epochs: 1, losses: {caption: 1}, start: best}]"
    sets = ("data.fit_on=[train,valid]", f"train.stages={listed}")
    assert "start is best, but data.fit_on has valid" in messages(write(tmp_path, EXPERIMENT), *sets)[0]


@pytest.mark.parametrize("ema", [None, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_validations_within_an_epoch_and_their_interruptions(tiny_folder, tmp_path, ema):
    """Of 3 steps each: after steps 2 and 3, with scores. Killed before and in a validation, to the bit."""
    often = {"epochs": 3, "losses": {"caption": 1}, "validations_per_epoch": 2}
    settings = config(stages=[often], evaluate_every=0, patience=3, ema=ema)
    values = [0.1, 0.3, 0.2, 0.25, 0.2]
    every = [value for value in values for _ in range(1 if ema is None else 2)]
    whole, rows = run(tiny_folder, tmp_path / "whole", settings, dropout=0.1, evaluate=scores(*every))
    valid = [row for row in rows if "valid_loss" in row]
    assert [(row["step"], row["valid_primary"], row["waited"]) for row in valid] == [
        (2, 0.1, 0),
        (3, 0.3, 0),
        (5, 0.2, 1),
        (6, 0.25, 2),
        (8, 0.2, 3),
    ]
    assert [row["epoch"] for row in valid] == pytest.approx([2 / 3, 1, 5 / 3, 2, 8 / 3])
    assert rows[-1] == valid[-1]  # patience ends the stage within an epoch
    assert resume.kept(tmp_path / "whole")[0]["step"] == 3
    ended = patience.ended(settings, rows)
    assert "stage 1 ended after epoch 2.667 of 3" in patience.described(ended)[0]
    assert schedule.total_steps(settings, 20, patience.saved(ended)) == 8

    def breaking(done):
        """Validations from number `done` on; the second of these is interrupted."""
        given = iter(every[done * len(every) // 5 :][: len(every) // 5])

        def evaluate():
            for value in given:
                return {"valid_primary": value}
            raise Interrupted

        return evaluate

    for done in range(4):
        with pytest.raises(Interrupted):
            run(tiny_folder, tmp_path / "parts", settings, dropout=0.1, evaluate=breaking(done))
    left = scores(*every[-len(every) // 5 :])
    parts, again = run(tiny_folder, tmp_path / "parts", settings, dropout=0.1, evaluate=left)
    assert_equal(parts.model.state_dict(), whole.model.state_dict())
    assert told(again) == told(rows)


@pytest.mark.ci
def test_weights_below_a_floor_are_never_the_best(tiny_folder, tmp_path):
    """Those of the average may be, if they are not below it."""
    names = ("valid_primary", "valid_image_gap")

    def evaluate(*pairs):
        left = iter(pairs)
        return lambda: dict(zip(names, next(left), strict=True)) | {"floor_image_gap": 0.5}

    stages = [RL | {"epochs": 3}]
    found = evaluate((0.1, 0.6), (0.2, 0.5), (0.9, 0.4))
    _, rows = run(tiny_folder, tmp_path / "one", config(stages=stages, patience=9), evaluate=found)
    valid = [row for row in rows if "valid_loss" in row]
    assert [row.get("valid_primary") for row in valid] == [0.1, 0.2, None]
    assert valid[-1]["valid_image_gap"] == 0.4
    assert resume.kept(tmp_path / "one")[0]["score"] == 0.2
    found = evaluate((0.1, 0.6), (0.9, 0.4), (0.3, 0.7))
    _, rows = run(tiny_folder, tmp_path / "two", config(stages=stages, ema=0.5), evaluate=found)
    (best,) = resume.kept(tmp_path / "two")
    assert (best["average"], best["score"], best["step"]) == (True, 0.3, 3)
    assert (rows[-1]["valid_primary"], rows[-1]["ema_valid_primary"]) == (0.3, 0.3)


def test_a_skipped_stage_needs_no_metrics(tmp_path):
    file = write(tmp_path, EXPERIMENT)
    listed = json.dumps([CAPTION, RL | {"epochs": 0, "reward": REWARD | {"metrics": {"bleurt": 1}}}])
    (found, _) = load_experiment(file, [f"train.stages={listed}"])
    assert judges.needed(found) == ()


def test_the_plot_says_what_a_reward_loss_is(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: titles.append(figure.axes[0].get_title()))
    for name in ("caption_loss", "reward_loss"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps({"step": 1, "loss": 1.0, name: 1.0}) + "\n")
        plots.curves(file, tmp_path / "curves.png")
    assert titles == ["loss (nats per token)", "loss (nats per token; reward: per sample)"]


# --- Runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(small_run, tmp_path, monkeypatch) -> Path:
    """The finished small run, in the current folder."""
    for name in ("data", "runs"):
        shutil.copytree(small_run / "kept" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return write(tmp_path, EXPERIMENT.replace("name: small", "name: more"))


def plan(file, *sets, of="small/opt-s42"):
    stages = json.dumps([RL | {"reward": REWARD | {"max_new_tokens": 8}}])
    given = [f"train.start_from={of}", f"train.stages={stages}", *sets]
    found = load_experiment(file, given)[0]
    return Plan(found, load(found.data))


def refused(file, *sets, of="small/opt-s42"):
    with pytest.raises(UserError) as caught:
        plan(file, *sets, of=of).steps  # noqa: B018
    return str(caught.value)


def best_of(run="small/opt-s42"):
    record = records.read(Path("runs") / run)
    return Path("runs") / record["steps"]["train"] / "best.safetensors"


@pytest.mark.ci
def test_a_training_starts_from_the_best_weights_of_another_run(kept):
    """They score as that run's own validation says, and another name for them gives the same training."""
    found = plan(kept)
    step = found.steps["train"]
    assert plan(kept, of="small/opt_dedup-s42").steps["train"].canonical == step.canonical
    assert step.canonical["facts"]["start"] == hashlib.sha256(best_of().read_bytes()).hexdigest()
    untouched = [plan(kept, *sets, of="null").steps["train"].canonical for sets in ((), ("seed=7",))]
    assert "start" not in untouched[0]["facts"]
    assert step.canonical != untouched[0] != untouched[1]
    step.directory.mkdir(parents=True)
    Work(found.config, Terminal()).build(step, step.directory)
    first = json.loads((step.directory / "losses.jsonl").read_text().splitlines()[0])
    (best,) = resume.kept(best_of().parent)
    assert (first["step"], first["epoch"]) == (0, 0)
    assert first["valid_primary"] == pytest.approx(best["score"], abs=1e-6)
    note = step.found({})["training"]["notes"][0]
    assert note.startswith("starts from the best weights of small/opt-s42: the trained weights after step ")
    assert step.found({})["training"]["start"]["run"] == "small/opt-s42"
    assert "starts from the best weights of small/opt-s42" in forecast(found.config)["notes"]
    assert found.looks == {}


def test_other_weights_are_another_training_and_damaged_ones_none(kept):
    file, before = best_of(), plan(kept).steps["train"].canonical
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, file)
    found = plan(kept)
    step = found.steps["train"]
    assert step.canonical == before  # the run's record still says what they were
    step.directory.mkdir(parents=True)
    with pytest.raises(UserError, match="not what the step left"):
        Work(found.config, Terminal()).build(step, step.directory)


def test_what_can_not_be_started_from_is_said(kept):
    assert "not a run: it has no run.json" in refused(kept, of="small/other-s42")
    said = refused(kept, "model.image_size=112")
    assert "small/opt-s42 starts from other weights: it has another model.image_size" in said
    assert "train.start_from" in said
    assert "has trained weights that this run keeps" in refused(kept, "train.train_vision=false")
    file = Path("runs/small/opt-s42/run.json")
    made = json.loads(file.read_text())
    made["config"]["data"]["fit_on"] = ["train", "valid"]
    write_json(file, made)
    assert "has learned from the validation images" in refused(kept)
    shutil.rmtree(best_of("small/opt_dedup-s42").parent)
    assert "the weights of small/opt_dedup-s42 are gone" in refused(kept, of="small/opt_dedup-s42")


def test_an_earlier_run_of_the_same_file_is_waited_for(kept):
    variants = "variants:\n  one: {}\n  two: {train: {start_from: more/one-s42}}\n"
    text = EXPERIMENT.partition("variants:")[0].replace("name: small", "name: more")
    configs = load_experiment(write(kept.parent, text + variants))
    assert len(prepare(configs, Terminal())) == 2
    with pytest.raises(UserError, match="not a run"):
        prepare(configs[1:], Terminal())
    assert dry(configs[1])["train"].startswith(
        "to do, but the weights that it starts from are not known yet: "
    )
    other = variants.replace(
        "start_from: more/one-s42}", "start_from: more/one-s42}, model: {language_model: false}"
    )
    with pytest.raises(
        UserError, match=r"more/one-s42 is of another model: it has another model\.language_model"
    ):
        prepare(load_experiment(write(kept.parent, text + other)), Terminal())
