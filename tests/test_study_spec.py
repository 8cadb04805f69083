"""Study files: all mistakes are reported at once with their places, before any trial."""

import itertools
import json
from pathlib import Path

import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import create_trial

from harness.config.experiment import load as load_experiment
from harness.config.schema import Config
from harness.errors import UserError
from harness.study.results import as_experiment
from harness.study.spec import Study, load

BASE = """
name: small
data: {root: data/phantom}
model: {checkpoint: tiny}
predict: {num_beams: 2}
score: {metrics: [bertscore, rouge1]}
variants:
  one: {}
  two: {predict: {num_beams: 3}}
"""
STUDY = """
base: small.yaml
variant: one
space:
  predict.num_beams: {low: 1, high: 3}
  predict.length_penalty: {low: 0, high: 2, step: 0.5, when: {predict.num_beams: [2, 3]}}
  train.learning_rate: {low: 1e-6, high: 1e-3, log: true}
  train.betas: {choices: [[0.9, 0.999], [0.9, 0.98]]}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "small.yaml").write_text(BASE)
    return tmp_path


def study(folder: Path, text: str = STUDY, **options) -> Study:
    file = folder / "find.yaml"
    file.write_text(text)
    return load(file, **options)


def messages(folder: Path, text: str, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        study(folder, text, **options)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def test_trial_0_is_the_base(folder):
    spec = study(folder)
    assert spec.name == "small/find"
    assert spec.fixed(0) == {
        "predict.num_beams": 2,
        "predict.length_penalty": 1.0,
        "train.learning_rate": 1e-5,
        "train.betas": [0.9, 0.999],
    }
    base = next(run for run in load_experiment(folder / "small.yaml") if run.variant == "one")
    trial = spec.trial(0, spec.fixed(0))
    assert trial.run_name == "trial-0000-s42"
    only_validation = {"predict": base.predict.model_copy(update={"splits": ("valid",)})}
    assert trial == base.model_copy(update={"name": "small/find", "variant": "trial-0000", **only_validation})


def test_a_trial_has_its_values_and_the_rest_of_the_base(folder):
    spec = study(folder)
    trial = spec.trial(7, {"predict.num_beams": 1, "train.learning_rate": 1e-4, "train.betas": [0.9, 0.98]})
    assert trial.variant == "trial-0007"
    assert (trial.predict.num_beams, trial.predict.length_penalty) == (1, 1.0)
    assert (trial.train.learning_rate, trial.train.betas) == (1e-4, (0.9, 0.98))


def test_choices_and_conditions_are_what_the_experiment_would_read(folder):
    text = """
base: small.yaml
variant: one
space:
  train.learning_rate: {choices: [1e-5, 1e-4]}
  predict.num_beams: {low: 1, high: 3, when: {train.learning_rate: 1e-5}}
"""
    spec = study(folder, text)
    assert spec.start == {"train.learning_rate": 1e-5, "predict.num_beams": 2}
    assert spec.space[0].how.choices == [1e-5, 1e-4]


def test_all_mistakes_at_once_with_file_line_and_key(folder):
    text = """base: small.yaml
variant: one
space:
  predict.num_beam: {low: 1, high: 3}
  predict.num_beams: {low: 0, high: 3}
  train.weight_decay: {low: -1, high: 3}
  postprocess.deduplicate: {low: 0, high: 1}
  train.precision: {choices: [fp32, fp7]}
  score.bootstrap: {low: 0, high: 10}
  train.warmup_steps: {low: 0, high: 2000, when: {train.dropout: 0.1}}
objective: [bertscore, meteor]
pruner: {name: median}
"""
    file = folder / "find.yaml"
    found = messages(folder, text)
    expected = [
        ":4: space.predict.num_beam: is not a key of an experiment. Did you mean predict.num_beams?",
        ":5: space.predict.num_beams.low: 0 is not allowed: a whole number from 1 to 1,000 is allowed",
        ":6: space.train.weight_decay.low: -1.0 is not allowed: a finite number of 0 or more",
        ":7: space.postprocess.deduplicate: is not a number; give choices",
        ":8: space.train.precision.choices: 'fp7' is not allowed: auto, bf16, fp16 or fp32",
        ":9: space.score.bootstrap: can't be searched",
        ":10: space.train.warmup_steps.when.train.dropout: train.dropout is not in the space",
        ":11: objective: got meteor; the base scores bertscore, rouge1",
        ":12: pruner.name: a pruner can't rank trials with several objectives",
    ]
    assert len(found) == len(expected)
    for text in expected:
        assert any(message.startswith(f"{file}{text}") for message in found), (text, found)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("low: 1, high: 3}", "low: 1, hihg: 3}", "space.predict.num_beams.hihg: unknown key. Did you mean"),
        ("variant: one", "variant: three", "variant: got three; "),
        ("variant: one\n", "", "has variants: one, two; choose one"),
        ("base: small.yaml", "base: smal.yaml", "base: no such file"),
        ("base: small.yaml\n", "", "base: is missing"),
        ("low: 1, high: 3}", "low: 3, high: 1}", "low 3 is not below high 1"),
        ("low: 1, high: 3}", "low: 1}", "give low and high, or choices"),
        ("low: 1, high: 3}", "choices: []}", "choices is empty"),
        ("low: 1, high: 3}", "low: 1, high: 3, step: 0.5}", "whole numbers"),
        ("low: 1e-6", "low: 1e-4", "the base has 1e-05, which is not in the space"),
        ("[2, 3]", "[2, 7]", "predict.num_beams is never 7"),
        ("log: true", "log: true, step: 1e-6", "a step must be above 0, and can't be used with log"),
        ("low: 1e-6", "low: 0", "with log it must be above 0"),
        ("low: 1, high: 3}", "low: 1, high: 3, when: {predict.length_penalty: 1}}", "depend on each other"),
        ("base: small", "sampler: {name: grid}\nbase: small", "a grid needs choices, or a step without log"),
        ("base: small", "storage: mysql://x\nbase: small", "storage: give sqlite, journal or postgresql://"),
        ("base: small", "sampler: {name: cma}\nbase: small", "sampler.name: got 'cma'"),
        ("base: small", "overrides: {train: {batch: 3}}\nbase: small", "train.batch: unknown key"),
        (
            "base: small",
            "name: cache\nbase: small",
            ":2: name: got cache; 'cache' is a folder of the harness",
        ),
        ("base: small", "name: steps/x\nbase: small", ":2: name: got steps/x; 'steps' is a folder"),
        ("low: 1, high: 3}", "low: 1, high: .inf}", "space.predict.num_beams.high: got inf; "),
        ("  predict.num_beams:", "  train: {choices: [{}]}\n  predict.num_beams:", "is part of train, which"),
        ("base: small", "objective: []\nbase: small", "name each score once"),
    ],
)
def test_each_kind_of_mistake(folder, old, new, expected):
    assert old in STUDY
    found = messages(folder, STUDY.replace(old, new, 1))
    assert any(expected in message for message in found), found


def test_a_mistake_in_what_is_overridden_is_shown_in_the_study(folder):
    (message,) = messages(folder, "overrides:\n  train:\n    epochs: 3\n" + STUDY)
    assert message.startswith(f"{folder / 'find.yaml'}:3: train.epochs: unknown key.")


def test_a_study_is_no_experiment(folder):
    study(folder)
    with pytest.raises(UserError, match=r"a study, not an experiment[\s\S]*harness study"):
        load_experiment(folder / "find.yaml")


def test_an_experiment_is_no_study(folder):
    with pytest.raises(UserError, match=r"an experiment, not a study[\s\S]*harness run"):
        load(folder / "small.yaml")


def test_the_command_line_names_another_base(folder):
    other = folder / "elsewhere" / "other.yaml"
    other.parent.mkdir()
    other.write_text(BASE.replace("name: small", "name: other"))
    spec = study(folder, base=other, variant="two", sets=["train.learning_rate=1e-4"])
    assert (spec.name, spec.base.variant) == ("other/find", "two")
    assert (spec.start["predict.num_beams"], spec.start["train.learning_rate"]) == (3, 1e-4)


def test_a_grid_has_every_point_once_and_the_base_first(folder):
    text = """
base: small.yaml
variant: one
sampler: {name: grid}
trials: 100
space:
  predict.no_repeat_ngram_size: {choices: [0, 3]}
  predict.length_penalty: {low: 0, high: 1, step: 0.5, when: {predict.num_beams: 2}}
  predict.num_beams: {low: 1, high: 2}
"""
    spec = study(folder, text)
    points = [spec.fixed(slot) for slot in range(spec.trials)]
    wanted = [
        {"predict.no_repeat_ngram_size": n, "predict.num_beams": 2, "predict.length_penalty": penalty}
        for n, penalty in itertools.product([0, 3], [0.0, 0.5, 1.0])
    ] + [{"predict.no_repeat_ngram_size": n, "predict.num_beams": 1} for n in [0, 3]]
    assert points[0] == spec.start
    assert sorted(map(_key, points)) == sorted(map(_key, wanted))


def test_a_grid_of_one_point_is_one_trial(folder):
    text = "base: small.yaml\nvariant: one\nsampler: {name: grid}\n"
    spec = study(folder, text + "space:\n  predict.num_beams: {choices: [2]}\n")
    assert spec.trials == 1


def _key(point: dict) -> str:
    return json.dumps(point, sort_keys=True)


def test_the_shipped_decoding_study_takes_the_quickstart_as_its_base():
    experiments = Path(__file__).parents[1] / "experiments"
    file, base = experiments / "study_decoding.yaml", experiments / "quickstart.yaml"
    spec = load(file, base=base, variant="opt_224")
    (paper,) = load_experiment(experiments / "ablation_364.yaml")
    assert spec.name == "quickstart/study_decoding"
    assert isinstance(spec.trial(1, spec.start), Config)
    assert load(file).start["predict.num_beams"] == paper.predict.num_beams == 5


ADDRESSES = [
    "me:s3cret@word@host/db",
    "me:s3cret/word@host/db",
    "me@host/db?password=s3cret",
    "me:s3cret@host:54x/db",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_would_be_misread_is_refused_and_its_password_not_shown(folder, address):
    (message,) = messages(folder, f"{STUDY}storage: postgresql://{address}\n")
    assert "~/.pgpass" in message
    assert "s3cret" not in message
    assert "find.yaml:9: storage: " in message


def test_addresses_are_those_that_libpq_takes(folder):
    for address in (
        "me@host/db",
        "me:p%40ss@10.0.0.1:5433/db",
        "/db?host=/var/run/postgresql",
        "me@[::1]/db",
    ):
        assert study(folder, f"{STUDY}storage: postgresql://{address}\n").config.storage.endswith(address)


def test_a_base_with_several_seeds_needs_one(folder):
    (folder / "small.yaml").write_text(BASE + "seeds: [42, 43]\n")
    (message,) = messages(folder, STUDY)
    assert "has seeds: 42, 43; a study takes one" in message
    assert study(folder, "overrides: {seed: 43}\n" + STUDY).base.seed == 43


def test_a_space_without_end_and_one_that_is_too_large_keep_their_trials(folder):
    head = "base: small.yaml\nvariant: one\ntrials: 9\nspace:\n"
    assert study(folder, head + "  train.learning_rate: {low: 1e-6, high: 1e-3}\n").points is None
    large = head + "  train.warmup_steps: {low: 0, high: 1000000}\n"
    assert (study(folder, large).points, study(folder, large).trials) == (None, 9)
    assert study(folder, head + "  predict.num_beams: {choices: [2, 1, 2, 1]}\n").trials == 2
    (message,) = messages(folder, large + "sampler: {name: grid}\n")
    assert message.endswith(":4: space: a grid of 1,000,001 points; at most 100,000 are allowed")


STAGES = """
base: small.yaml
variant: one
overrides:
  train:
    stages: [{epochs: 2, losses: {caption: 1, concept: 1}}, {epochs: 1, losses: {caption: 1}}]
space:
  train.stages.0.losses.concept: {low: 0, high: 2}
  train.stages.1.epochs: {low: 1, high: 3}
"""


def test_an_entry_of_a_list_is_searched_by_its_number(folder):
    spec = study(folder, STAGES)
    assert spec.start == {"train.stages.0.losses.concept": 1.0, "train.stages.1.epochs": 1}
    assert [parameter.whole for parameter in spec.space] == [False, True]
    assert spec.epochs == 3
    trial = spec.trial(1, {"train.stages.0.losses.concept": 0.5, "train.stages.1.epochs": 3})
    found = [(s.epochs, s.losses.caption, s.losses.concept) for s in trial.train.stages]
    assert found == [(2, 1, 0.5), (3, 1, 0)]


@pytest.mark.parametrize(("overrides", "first"), [(True, 2), (False, 50)])
def test_the_winning_experiment_has_the_whole_list(folder, overrides, first):
    text = STAGES.replace("high: 3", "high: 30")
    if not overrides:
        text = text[: text.index("overrides")] + text[text.index("space") :]
    spec = study(folder, text)
    key, other = "train.stages.0.losses.concept", "train.stages.1.epochs"
    ranges = {key: FloatDistribution(0, 2), other: IntDistribution(1, 30)}
    trial = create_trial(value=0.5, params={key: 0.5, other: 3}, distributions=ranges)
    trial.number = 7
    (folder / "best.yaml").write_text(as_experiment(trial, spec, folder / "best.yaml", "a test"))
    (run,) = load_experiment(folder / "best.yaml")
    found = [(s.epochs, s.losses.caption, s.losses.concept) for s in run.train.stages]
    assert found == [(first, 1, 0.5), (3, 1, 0)]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.stages.2.epochs", "train.stages has 2 entries, numbered from 0; got 2"),
        ("train.stages.1.epoch", "is not a key of an experiment. Did you mean train.stages.1.epochs?"),
        ("train.stages.epochs", "is not a key of an experiment. Did you mean train.stages.0.epochs?"),
        (
            "train.stage2.epochs",
            "train.stages is a list now; write train.stages.1.epochs: {low: 1.0, high: 3.0}",
        ),
        (
            "train.stage1.caption_loss_weight",
            "train.stages is a list now; write train.stages.0.losses.caption: {low: 1.0, high: 3.0}",
        ),
    ],
)
def test_a_key_of_the_space_that_names_no_stage(folder, key, expected):
    (message,) = messages(folder, STAGES.replace("train.stages.1.epochs: {low: 1", f"{key}: {{low: 1"))
    assert message == f"{folder / 'find.yaml'}:9: space.{key}: {expected}"


def test_former_stages_in_the_overrides_are_shown_anew_with_the_bases_values(folder):
    (message,) = messages(folder, STAGES.replace("    stages:", "    stage2: {epochs: 5}\n    stages:"))
    start = f"{folder / 'find.yaml'}:6: train.stage2: train.stages is a list now; write stages: "
    assert message.startswith(start)
    assert message.endswith("{epochs: 5, losses: {caption: 1}}], or --set train.stages.1.epochs=5")
