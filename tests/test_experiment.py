"""Experiment files: every shipped one loads, and all mistakes are found at once with their places."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from support.experiments import messages, write

from harness.config.experiment import base_of, explain, load, set_value
from harness.config.schema import Config, flat, keys
from harness.errors import UserError
from harness.study.spec import load as load_study

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
WANTED = ["Question", "Command", "Expected", "Cost"]


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_experiments_load_and_say_what_they_are_for(file):
    assert load_study(file).space if file.name.startswith("study") else load(file)
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    said = [line.split()[1] for line in header if line[2] != " "]
    assert said in (WANTED, [*WANTED, "Weights"])


def test_table3_has_the_four_rows_of_the_paper():
    runs = {run.variant: run for run in load(EXPERIMENTS / "table3.yaml")}
    assert {
        name: (r.model.language_model, r.model.image_size, r.postprocess.deduplicate)
        for name, r in runs.items()
    } == {
        "qformer_224": (False, 224, False),
        "opt_224": (True, 224, False),
        "opt_364": (True, 364, False),
        "opt_364_dedup": (True, 364, True),
    }


def test_the_base_is_the_papers_recipe():
    """Section 3.1 of the working notes, and LAVIS's caption_coco_ft where it says nothing."""
    (run,) = load(EXPERIMENTS / "ablation_364.yaml")
    assert [stage.epochs for stage in run.train.stages] == [50, 20]
    assert (run.train.micro_batch_size, run.train.batch_size) == ("auto", 8 * 16)
    assert (run.train.learning_rate, run.train.warmup_learning_rate, run.train.warmup_steps) == (
        1e-5,
        1e-8,
        1000,
    )
    assert (run.train.weight_decay, run.train.betas, run.predict.num_beams) == (0.05, (0.9, 0.999), 5)
    assert (run.predict.max_new_tokens, run.seed) == (128, 42)
    assert run.score.bertscore.checkpoint == "microsoft/deberta-xlarge-mnli"


def test_all_mistakes_at_once_with_file_line_and_key(tmp_path):
    file = write(
        tmp_path,
        "name: a/b\ndata:\n  root: x\ntrain:\n  learning_rat: 1e-5\n  batch_size: many\nmodell: {}\n"
        "variants:\n  small:\n    model:\n      image_siz: 224\n",
    )
    assert sorted(messages(file, "score.bertscor.layer=3")) == [
        "--set score.bertscor.layer: score.bertscor: unknown key. Did you mean score.bertscore?",
        f"{file}:11: model.image_siz: unknown key. Did you mean model.image_size?",
        f"{file}:5: train.learning_rat: unknown key. Did you mean train.learning_rate?",
        f"{file}:6: train.batch_size: got 'many'; a whole number from 1 to 100,000 is allowed",
        f"{file}:7: modell: unknown key. Did you mean model?",
    ]


def test_a_mistake_in_a_base_is_shown_in_the_base(tmp_path):
    base = write(tmp_path, "name: a\ndata: {root: x}\ntrain:\n  epochs: 3\n", "base.yaml")
    child = write(tmp_path, "base: base.yaml\nname: b\n")
    (message,) = messages(child)
    assert message.startswith(f"{base}:4: train.epochs: unknown key.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "e.yaml:1: not YAML"),
        ("- a\n- b\n", "an experiment is a mapping"),
        ("name: a\nname: b\ndata: {root: x}\n", "e.yaml:2: name: written twice"),
        ("base: nothing.yaml\n", "e.yaml:1: base: no such file"),
        ("base: e.yaml\nname: a\n", "its own base"),
        ("name: a\ndata: {root: x}\nseeds: 3\n", "e.yaml:3: seeds: got 3"),
        ("name: ../up\ndata: {root: x}\n", "e.yaml:1: name: got '../up'"),
        ("name: steps/a\ndata: {root: x}\n", "folder of the harness itself"),
        ("name: a\n", "data: is missing"),
        ("name: 2024-99-99\n", "not YAML: month must be in 1..12"),
        ("name: !include x\n", "e.yaml:1: not YAML: could not determine a constructor"),
        ("name: a\x07\n", "not YAML: unacceptable character"),
        ("{[a]: b}\n", "e.yaml:1: not YAML: found unhashable key"),
        ("name: a\ndata: {root: x}\ntrain: {stages: [{epochs: 0, losses: {}}]}\n", "no stage has epochs"),
        (
            "name: a\ndata: {root: x}\ntrain:\n  stages:\n    - epochs: 1\n      losses: {caption: 0}\n",
            "e.yaml:6: train.stages.0.losses: no loss has a weight above 0",
        ),
        (
            "name: a\ndata: {root: x}\ntrain: {batch_size: 10, micro_batch_size: 4}\n",
            "not a multiple of micro_batch_size",
        ),
        (
            "name: a\ndata: {root: x}\nconsensus: {utility: {bertscor: 1}}\n",
            "e.yaml:3: consensus.utility.bertscor: got 'bertscor'; bertscore, rouge1",
        ),
        (
            "name: a\ndata: {root: x}\n"
            "train: {stages: [{epochs: 1, losses: {reward: 1}, reward: {metrics: {}}}]}\n",
            "e.yaml:3: train.stages.0.reward.metrics: got {}; one entry or more is allowed",
        ),
    ],
)
def test_each_kind_of_mistake(tmp_path, text, expected):
    assert any(expected in message for message in messages(write(tmp_path, text)))


def test_a_missing_file_lists_what_is_there(tmp_path):
    write(tmp_path, "name: a\n", "other.yaml")
    with pytest.raises(UserError, match=r"no such file[\s\S]*other\.yaml"):
        load(tmp_path / "e.yaml")


def test_variants_seeds_and_set_multiply_in_order(tmp_path):
    file = write(
        tmp_path,
        "name: a\nseeds: [1, 2]\ndata: {root: x}\nvariants:\n"
        "  big: {model: {image_size: 364}}\n  small: {model: {image_size: 224}}\n",
    )
    runs = load(file, ["train.learning_rate=1e-4", "data.root=elsewhere"])
    assert [run.run_name for run in runs] == ["big-s1", "big-s2", "small-s1", "small-s2"]
    assert {run.train.learning_rate for run in runs} == {1e-4}
    assert {str(run.data.root) for run in runs} == {"elsewhere"}
    assert [run.model.image_size for run in runs] == [364, 364, 224, 224]


def test_set_wins_over_a_variant(tmp_path):
    file = write(tmp_path, "name: a\ndata: {root: x}\nvariants:\n  big: {model: {image_size: 364}}\n")
    assert load(file, ["model.image_size=56"])[0].model.image_size == 56


def test_every_key_has_a_type_and_shows_up_flat():
    given = {
        "name": "a",
        "data": {"root": "x"},
        "consensus": {"runs": ["a/b-s1"]},
        "soup": {"runs": ["a/b-s1"]},
        "concepts": {"predictor": "from_captions", "runs": ["a/b-s1"]},
    }
    prompts = ({"retrieved": 3}, {"concepts": "a/b-s1"})
    stage = {"epochs": 1, "losses": {"reward": 1}, "reward": {"metrics": {"rouge1": 1}}}
    given |= {"train": {"stages": [stage]}}
    ways = [  # not both of each
        way | {"model": {"prompt": prompt, "lora": {}}}
        for way, prompt in zip(({"predict": {"samples": {}}}, {"retrieval": {}}), prompts, strict=True)
    ]
    shown = {key for way in ways for key in flat(Config.model_validate(given | way))}
    for path in keys():
        name = ".".join(path)
        assert any(key == name or key.startswith(name + ".") for key in shown) or path[1:2] == ("phantom",), (
            name
        )


def test_the_base_of_a_shipped_experiment():
    file, base = base_of(EXPERIMENTS / "ablation_224.yaml", "base")
    assert file == "blip2_vitg_opt2.7b.yaml"
    assert base.model.image_size == 364
    file, base = base_of(EXPERIMENTS / "quickstart.yaml", "opt_224")
    assert (file, base.variant, base.model.image_size) == ("table3.yaml", "opt_224", 224)
    assert base_of(EXPERIMENTS / "blip2_vitg_opt2.7b.yaml", "base") is None


def test_a_base_that_does_not_run_alone_is_none(tmp_path):
    (tmp_path / "part.yaml").write_text("train: {batch_size: 64}\n")
    (tmp_path / "whole.yaml").write_text("base: part.yaml\nname: whole\ndata: {root: x}\n")
    assert load(tmp_path / "whole.yaml")[0].train.batch_size == 64
    assert base_of(tmp_path / "whole.yaml", "base") is None


OLD = """name: a
data: {root: x}
train:
  stage1: {epochs: 7, concept_loss_weight: 0.5}
  stage2: {learning_rate: 1e-4}
"""
NEW = "name: a\ndata: {root: x}\ntrain:\n  stages:\n    - {epochs: 7, losses: {caption: 1}}\n"
"""A file of before `train.stages`, and one of today."""


def test_the_former_stages_are_one_error_with_the_new_spelling_of_the_same_values(tmp_path):
    (message,) = messages(write(tmp_path, OLD))
    place, _, what = message.partition(": train.stages is a list now; write ")
    assert place == f"{tmp_path}/e.yaml:4: train.stage1"
    written, _, sets = what.partition(", or ")
    assert yaml.safe_load(written) == {
        "stages": [
            {"epochs": 7, "losses": {"caption": 1.0, "concept": 0.5}},
            {"epochs": 20, "losses": {"caption": 1.0}, "learning_rate": "1e-4"},
        ]
    }
    head = "name: a\ndata: {root: x}\n"
    expected = load(write(tmp_path, f"{head}train: {{{written}}}\n", "new.yaml"))
    assert load(write(tmp_path, head, "sets.yaml"), sets.removeprefix("--set ").split(" --set ")) == expected


@pytest.mark.parametrize(
    ("text", "sets", "place"),
    [
        (NEW, ["train.stage1.epochs=3"], "--set train.stage1.epochs: train.stage1"),
        (NEW, ["train.stage2={epochs: 0}"], "--set train.stage2"),
        (f"{NEW}variants:\n  v: {{train: {{stage1: {{epochs: 3}}}}}}\n", [], "e.yaml:7: train.stage1"),
        (f"{NEW}  stage2: null\n", [], "e.yaml:6: train.stage2"),
    ],
)
def test_former_stages_are_found_wherever_they_stand(tmp_path, text, sets, place):
    (message,) = messages(write(tmp_path, text), *sets)
    assert message.removeprefix(f"{tmp_path}/").startswith(f"{place}: train.stages is a list now")


def test_set_addresses_an_entry_of_a_list_by_number(tmp_path):
    file = write(tmp_path, "name: a\ndata: {root: x}\n")
    (run,) = load(file, ["train.stages.1.epochs=3", "train.stages.0.losses.concept=0.5", "train.betas.0=0.8"])
    assert [stage.epochs for stage in run.train.stages] == [50, 3]
    assert [stage.losses.concept for stage in run.train.stages] == [0.5, 0]
    assert run.train.betas == (0.8, 0.999)
    (run,) = load(write(tmp_path, NEW), ["train.stages.0.epochs=3"])
    assert [stage.epochs for stage in run.train.stages] == [3]


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("train.stages.1.epochs", "train.stages has 1 entry, numbered from 0; got 1"),
        ("train.stages.-1.epochs", "train.stages has 1 entry, numbered from 0; got -1"),
        ("train.stages.first", "train.stages has 1 entry, numbered from 0; got first"),
        ("train.betas.2", "train.betas has 2 entries, numbered from 0; got 2"),
    ],
)
def test_an_entry_that_there_is_not_is_an_error_that_says_how_many_there_are(tmp_path, key, what):
    assert messages(write(tmp_path, NEW), f"{key}=1") == [f"--set {key}: {what}"]


@pytest.mark.parametrize(("given", "way"), [("seeds=[1,2]", "--set seed=7"), ("variants={}", "--variant")])
def test_a_key_that_only_the_file_has_says_what_else_to_give(tmp_path, given, way):
    (told,) = messages(write(tmp_path, NEW), given)
    assert "only the top of an experiment file has this key" in told
    assert way in told


def test_a_list_replaces_that_of_the_base_and_its_mistakes_have_their_own_lines(tmp_path):
    write(tmp_path, NEW, "base.yaml")
    text = "base: base.yaml\nname: b\ntrain:\n  stages:\n    - epochs: 1\n      losses: {caption: 2}\n"
    (run,) = load(write(tmp_path, f"{text}    - {{epochs: 2, losses: {{concept: 1}}}}\n"))
    stages = [
        (one.epochs, {name: weight for name, weight in one.losses if weight}) for one in run.train.stages
    ]
    assert stages == [
        (1, {"caption": 2}),
        (2, {"concept": 1}),
    ]
    (run,) = load(
        write(
            tmp_path,
            f"{text}variants:\n  v: {{train: {{stages: [{{epochs: 5, losses: {{caption: 1}}}}]}}}}\n",
        )
    )
    assert [stage.epochs for stage in run.train.stages] == [5]
    file = write(tmp_path, f"{text}    - epoch: 2\n")
    assert messages(file) == [
        f"{file}:7: train.stages.1.epochs: is missing",
        f"{file}:7: train.stages.1.losses: is missing",
        f"{file}:7: train.stages.1.epoch: unknown key. Did you mean train.stages.1.epochs?",
    ]


def test_an_alias_for_a_stage_is_not_changed_with_the_other(tmp_path):
    file = write(
        tmp_path, "name: a\ndata: {root: x}\ntrain: {stages: [&s {epochs: 7, losses: {caption: 1}}, *s]}\n"
    )
    (run,) = load(file, ["train.stages.0.epochs=3", "train.stages.0.losses.caption=2"])
    assert [(stage.epochs, stage.losses.caption) for stage in run.train.stages] == [(3, 2), (7, 1)]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("null", "got null; a list is allowed"),
        ("{}", "got {}; a list is allowed"),
        ("[[]]", "train.stages.0: got []; a mapping of keys to values is allowed"),
    ],
)
def test_a_list_and_a_mapping_are_asked_for_in_words_of_yaml(tmp_path, stages, expected):
    file = write(tmp_path, "name: x\ndata: {root: x}\n")
    assert messages(file, f"train.stages={stages}") == [f"--set train.stages: {expected}"]


def test_a_run_that_would_do_nothing_is_refused(tmp_path):
    file = write(tmp_path, "name: x\ndata: {root: x}\ntrain: {stages: []}\npredict:\n  splits: []\n")
    what = "predict.splits: nothing is trained and predict.splits is empty; there is nothing to do"
    assert messages(file) == [f"{file}:5: {what}"]
    assert load(file, ["predict.splits=[test]"])


MISTYPED = ({"a": 1}, ["x"], ["a", 2], "some text", -7.5, -7, 1e40, None, True)


def test_every_wrong_type_of_every_key_is_told_in_words():
    """Neither a class nor a pattern nor pydantic's own sentences."""
    base = {"name": "a", "data": {"root": "x"}, "retrieval": {}, "soup": {"runs": ["a/b"]}, "concepts": {}}
    told = set()
    for path in keys():
        for bad in MISTYPED:
            values = copy.deepcopy(base)
            set_value(values, path, bad)
            try:
                Config.model_validate(values)
            except ValidationError as error:
                told |= {problem.what for problem in explain(error, {}, "e.yaml")}
    assert len(told) > 300
    odd = re.compile(
        r"\bclass\b|Config|pydantic|[Ii]nput|a valid|instance|\^|\bdict|\bstr\b|None|another kind"
    )
    assert [what for what in told if odd.search(what.rpartition("; ")[2])] == []
