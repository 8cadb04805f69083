"""Experiment files: every shipped one loads, and every mistake is found with its place, all at once."""

from pathlib import Path

import pytest

from harness.config.experiment import base_of, load
from harness.config.schema import Config, flat, keys
from harness.errors import UserError
from harness.study.spec import load as load_study

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def write(folder: Path, text: str, name: str = "e.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def messages(file: Path, *sets: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(file, sets)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_experiments_load_and_say_what_they_are_for(file):
    assert load_study(file).space if file.name.startswith("study") else load(file)
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert [line.split()[1] for line in header if line[2] != " "] == [
        "Question",
        "Command",
        "Expected",
        "Cost",
    ]


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
    assert (run.train.stage1.epochs, run.train.stage2.epochs) == (50, 20)
    assert (run.train.micro_batch_size, run.train.batch_size) == (16, 8 * 16)
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
        f"{file}:6: train.batch_size: got 'many'; input should be a valid integer, "
        "unable to parse string as an integer",
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
        ("name: a\ndata: {root: x}\ntrain: {stage1: {epochs: 0}, stage2: {epochs: 0}}\n", "are both 0"),
        (
            "name: a\ndata: {root: x}\ntrain: {batch_size: 10, micro_batch_size: 4}\n",
            "not a multiple of micro_batch_size",
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
    config = Config.model_validate({"name": "a", "data": {"root": "x"}})
    shown = set(flat(config))
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
