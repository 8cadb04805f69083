"""What a run depends on, and what must exist before it starts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.cli import plans
from harness.cli.terminal import Terminal
from harness.config.experiment import load as load_experiment
from harness.config.schema import Config
from harness.config.sections import DataConfig, PhantomConfig
from harness.data import load
from harness.errors import UserError
from harness.metrics import bertscore
from harness.models import checkpoints
from harness.models.checkpoints import Checkpoint
from harness.steps import STEPS
from harness.steps.detect import Combine
from harness.steps.inputs import Undeclared
from harness.steps.plan import Plan, problems
from harness.steps.predict import Predict
from harness.steps.soup import Soup
from harness.steps.work import Work
from harness.store import is_done, once
from harness.training.speed import duration

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    config = DataConfig(root=root / "set", phantom=PhantomConfig(train=6, valid=3, test=2))
    return load(config, root / "runs")


def plan(dataset, root: Path, **changes) -> Plan:
    values = {"name": "a", "data": {"root": dataset.root}, "model": {"checkpoint": "tiny"}} | changes
    values.setdefault("score", {"bertscore": {"checkpoint": "standin"}, "metrics": ["bertscore", "rouge1"]})
    return Plan(Config.model_validate(values), dataset, root)


def weights(folder: Path, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {"a": torch.randn(4, generator=torch.Generator().manual_seed(seed))}, folder / "model.safetensors"
    )
    return folder


def test_a_tiny_model_from_before_there_were_connector_epochs_is_found(data, tmp_path):
    def step(**sizes):
        return plan(data, tmp_path, model={"checkpoint": "tiny", "tiny": sizes}).steps["tiny"]

    assert "connector_epochs" not in step().canonical["config"]["model.tiny"]
    assert step(connector_epochs=0).directory == step().directory
    assert step(connector_epochs=1).directory != step().directory


def test_captions_depend_on_the_seed_only_if_some_are_sampled(data, tmp_path):
    def step(seed: int = 42, **predict):
        given = plan(data, tmp_path, seed=seed, predict=predict, train={"stages": []})
        return given.steps["predict-valid"]

    # as written by versions that knew no candidates
    assert not {"samples", "num_return_sequences", "seed"} & step().canonical["config"]["predict"].keys()
    assert "seed" not in step().canonical["config"]
    assert step(num_return_sequences=1, samples=None).directory == step().directory
    best, sampled = {"num_return_sequences": 2}, {"samples": {"count": 4}}
    assert step(1).directory == step(2).directory
    assert step(1, **best).directory == step(2, **best).directory
    assert step(1, **sampled).directory != step(2, **sampled).directory
    assert len({step(**given).directory for given in ({}, best, sampled, best | sampled)}) == 4
    assert "predictions/valid_candidates.csv" in step(**best).artifacts
    assert "predictions/valid_candidates.csv" not in step().artifacts


def test_what_does_not_change_the_weights_repeats_no_training(data, tmp_path):
    base = plan(data, tmp_path).steps["train"].directory
    for same in (
        {"predict": {"num_beams": 1}},
        {"postprocess": {"deduplicate": True}},
        {"name": "b", "variant": "other"},
        {"edition": 2024},
        {"device": "cpu"},
        {"train": {"profile": 3}},
    ):
        assert plan(data, tmp_path, **same).steps["train"].directory == base, same


def test_what_changes_the_weights_is_another_training(data, tmp_path):
    base = plan(data, tmp_path).steps["train"].directory
    for other in (
        {"seed": 1},
        {"edition": 2025},  # the best checkpoint is chosen by BERTScore with idf
        {"train": {"weight_decay": 0.1}},
        {"model": {"checkpoint": "tiny", "image_size": 224}},
        {"model": {"checkpoint": "tiny", "tiny": {"seed": 1}}},
        {"data": {"root": data.root, "augment": {"brightness": 0.1}}},
    ):
        assert plan(data, tmp_path, **other).steps["train"].directory != base, other


def test_the_tiny_checkpoint_serves_every_image_size(data, tmp_path):
    sizes = [plan(data, tmp_path, model={"checkpoint": "tiny", "image_size": size}) for size in (224, 364)]
    assert sizes[0].steps["tiny"].directory == sizes[1].steps["tiny"].directory


def test_a_checkpoint_is_known_by_its_contents(data, tmp_path):
    """Weights that were trained further have the same name and size."""
    folder = weights(tmp_path / "model", 0)
    model = {"checkpoint": str(folder)}
    before = plan(data, tmp_path, model=model).steps["train"].directory
    assert plan(data, tmp_path, model=model).steps["train"].directory == before
    weights(folder, 1)
    assert plan(data, tmp_path, model=model).steps["train"].directory != before


@pytest.fixture
def encoder(tmp_path) -> Path:
    """A folder with weights, config and tokenizer of BERTScore, which chooses the best weights."""
    folder = weights(tmp_path / "encoder", 0)
    for name in ("config.json", "tokenizer.json", "vocab.txt", "README.md"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt"])
def test_the_primary_metrics_files_are_in_training_and_scores(name, encoder, data, tmp_path):
    score = {"bertscore": {"checkpoint": str(encoder), "layer": 1}, "metrics": ["bertscore"]}
    steps = ("train", "score-before", "score-after")

    def places() -> list[Path]:
        return [plan(data, tmp_path, score=score).steps[step].directory for step in steps]

    before = places()
    (encoder / "README.md").write_text("for people")
    assert places() == before
    content = (encoder / name).read_bytes()
    (encoder / name).write_bytes(content[::-1])
    assert not set(before) & set(places())
    (encoder / name).write_bytes(content)
    assert places() == before


def test_other_packages_score_anew_and_train_nothing(data, tmp_path, monkeypatch):
    before = [plan(data, tmp_path).steps[step].directory for step in ("train", "score-after")]
    monkeypatch.setattr("harness.metrics.versions", lambda: ["torch:9"])
    after = [plan(data, tmp_path).steps[step].directory for step in ("train", "score-after")]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_a_standin_in_a_wheel_is_known_by_its_contents(data, tmp_path, monkeypatch):
    before = plan(data, tmp_path).steps["train"].directory
    other = Checkpoint("other", weights(tmp_path / "other", 3), True)
    monkeypatch.setattr(bertscore, "locate", lambda _: (other, 6))
    assert plan(data, tmp_path).steps["train"].directory != before


def test_a_broken_download_is_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert checkpoints.find(tmp_path) is None
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    weights(tmp_path, 0).joinpath("model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    assert checkpoints.find(tmp_path) is None
    weights(tmp_path, 1).joinpath("model.safetensors").rename(tmp_path / "model-00002-of-00002.safetensors")
    assert checkpoints.find(tmp_path).folder == tmp_path
    assert not checkpoints.find(tmp_path).standin


def test_the_metric_that_chooses_the_best_weights_must_be_at_hand(data, tmp_path):
    found = problems(plan(data, tmp_path, score={"metrics": ["rouge1"]}).config)
    assert [problem.key for problem in found] == ["score.bertscore.checkpoint"]
    assert "hf download microsoft/deberta-xlarge-mnli" in found[0].hint


def test_a_tiny_model_in_a_paper_experiment_needs_no_weights():
    sets = [
        "model.checkpoint=tiny",
        *(f"score.{m}.checkpoint=standin" for m in ("bertscore", "bleurt", "clipscore")),
    ]
    for config in load_experiment(EXPERIMENTS / "table3.yaml", sets):
        assert problems(config) == []


def test_a_step_that_lacks_something_is_built_again(tmp_path):
    answers = iter([False, True])
    for expected in (False, True, True):
        once(tmp_path / "score-1", {"a": 1}, lambda _: next(answers))
        assert is_done(tmp_path / "score-1") == expected


def test_a_device_without_memory_is_told_in_words(data, tmp_path, capsys):
    """The error is torch's own; a study finds the same reason in every trial, whatever the numbers in it."""

    class Asking(Predict):
        def build(self, work, directory):
            torch.empty(1 << 60)

    made = plan(data, tmp_path, device="cpu")
    with pytest.raises(UserError) as told:
        Work(made.config, Terminal()).build(Asking(made.steps["predict-test"].inputs, "test"), tmp_path)
    assert str(told.value).startswith("error: predict-test: the cpu has not enough memory for this step\n")
    assert told.value.exit_code == 1
    assert "you tried to allocate" in capsys.readouterr().err


def test_a_step_reads_what_it_declares_and_nothing_else(data, tmp_path):
    made = plan(data, tmp_path)
    inputs = made.steps["postprocess-valid"].inputs
    assert inputs.config.postprocess == made.config.postprocess
    assert inputs.config.predict.num_beams == made.config.predict.num_beams, "declared by the step before"
    for read in (
        lambda: inputs.config.name,
        lambda: inputs.config.data.root,
        lambda: made.steps["tiny"].inputs.config.train.batch_size,
        lambda: made.steps["tiny"].inputs.data.readable("valid"),
        lambda: made.steps["train"].inputs.data.examples("test"),
        lambda: inputs.directory("train"),
    ):
        with pytest.raises(Undeclared, match="is read; declared are"):
            read()


def test_every_kind_of_step_has_fingerprints_of_its_own(data, tmp_path):
    """Two runs have each kind; what a step declares, and its version, are in its fingerprint."""
    standins = {name: {"checkpoint": "standin"} for name in ("bertscore", "bleurt")}
    score = {"metrics": ["bleurt"], **standins}
    made = plan(data, tmp_path, score=score, consensus={"utility": {"rouge1": 1}})
    retrieving = plan(data, tmp_path, score=score, retrieval={"utility": {"rouge1": 1}})
    prompted = plan(data, tmp_path, score=score, model={"checkpoint": "tiny", "prompt": {"retrieved": 1}})
    beside = plan(data, tmp_path, score=score, concepts={"predictor": "knn"})
    runs = (made, retrieving, prompted, beside)
    steps = list({step.directory: step for run in runs for step in run.steps.values()}.values())
    # these need runs; see test_soup and test_concepts_run
    assert {type(step) for step in steps} == set(STEPS) - {Soup, Combine}
    assert len({kind.kind for kind in STEPS}) == len(STEPS)
    assert len({step.directory for step in steps}) == len(steps)
    for step in steps:
        later = type("Later", (type(step),), {"version": step.version + 1})(step.inputs, step.part)
        assert later.directory != step.directory, step.name
        assert set(step.canonical["steps"]) == {source.name for source in step.inputs.steps}, step.name


def test_without_stages_nothing_is_trained_and_the_checkpoint_captions(data, tmp_path):
    nothing: dict = {"stages": []}
    trained, untrained = plan(data, tmp_path), plan(data, tmp_path, train=nothing)
    assert trained.steps.keys() - untrained.steps.keys() == {"train"}
    predict = untrained.steps["predict-test"]
    assert [step.name for step in predict.inputs.steps] == ["tiny"]
    for other in (
        {"model": {"checkpoint": "tiny", "image_size": 224}},
        {"train": nothing | {"precision": "bf16"}},
        {"model": {"checkpoint": str(weights(tmp_path / "model", 0))}},
    ):
        changed = plan(data, tmp_path, **({"train": nothing} | other))
        assert changed.steps["predict-test"].directory != predict.directory, other
    same = plan(data, tmp_path, train=nothing | {"learning_rate": 1})
    assert same.steps["predict-test"].directory == predict.directory


def test_a_section_concepts_changes_no_step_of_captions(data, tmp_path):
    """With it a run has further steps; those that it had before keep their fingerprints."""
    without = plan(data, tmp_path)
    for concepts in ({"predictor": "knn"}, {"predictor": "from_captions", "thresholds": {"kind": "global"}}):
        beside = plan(data, tmp_path, concepts=concepts)
        kept = {name: step.directory for name, step in beside.steps.items() if name in without.steps}
        assert kept == {name: step.directory for name, step in without.steps.items()}
        assert {"detect-valid", "thresholds", "concepts-test", "score-concepts"} <= beside.steps.keys()


def test_thresholds_and_rules_of_concepts_detect_nothing_again(data, tmp_path):
    def steps(**changes):
        made = plan(data, tmp_path, concepts={"predictor": "knn"} | changes)
        return {name: step.directory for name, step in made.steps.items()}

    first = steps()
    for changes in ({"thresholds": {"start": 0.1}}, {"thresholds": {"fallback": "none"}}):
        changed = steps(**changes)
        assert changed["detect-valid"] == first["detect-valid"]
        assert changed["concepts-valid"] != first["concepts-valid"]
    counted = steps(knn={"rule": "votes"})
    assert counted["detect-valid"] == first["detect-valid"]
    assert "thresholds" not in counted
    assert steps(knn={"neighbours": 2})["detect-valid"] != first["detect-valid"]
    assert steps(min_images=2)["detect-test"] != first["detect-test"]


def test_the_time_of_a_dry_run_is_that_of_steps_that_are_to_do_and_counts_shared_ones_once():
    def row(**steps: str) -> dict:
        time = {"steps": {"train": 600.0, "predict-valid": 20.0, "score-after": None}}
        return {"steps": steps, "training": {"time": time}}

    first = row(train="to do  t", **{"predict-valid": "to do  p", "postprocess-valid": "to do  c"})
    built: set[str] = set()
    assert plans._time(first, built) == duration(620)
    assert plans._time(first, built) == "-"
    assert plans._time(row(train="to do  t", **{"predict-valid": "to do  q"}), built) == duration(20)
    assert plans._time(row(train="done  t", **{"predict-valid": "to do  r"}), built) == duration(20)
    assert plans._time(row(**{"predict-valid": "to do  s", "score-after": "to do  a"}), built) == "-"
    known = {"training": {"time": {"steps": {"train": 600.0}}}}
    assert plans._time({"steps": {"data": "to do: images will be drawn"}, **known}, built) == duration(600)
