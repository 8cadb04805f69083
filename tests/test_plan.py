"""What a run depends on, and what must be at hand before it starts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness import build
from harness.cli.terminal import Terminal
from harness.config.experiment import load as load_experiment
from harness.config.schema import Config
from harness.config.sections import DataConfig, PhantomConfig
from harness.data import load
from harness.errors import UserError
from harness.metrics import bertscore
from harness.models import checkpoints
from harness.models.checkpoints import Checkpoint
from harness.plan import Plan, problems
from harness.store import is_done, step

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


def test_what_does_not_change_the_weights_repeats_no_training(data, tmp_path):
    base = plan(data, tmp_path).directory("train")
    for same in (
        {"predict": {"num_beams": 1}},
        {"postprocess": {"deduplicate": True}},
        {"name": "b", "variant": "other"},
        {"edition": 2024},
        {"device": "cpu"},
    ):
        assert plan(data, tmp_path, **same).directory("train") == base, same


def test_what_changes_the_weights_is_another_training(data, tmp_path):
    base = plan(data, tmp_path).directory("train")
    for other in (
        {"seed": 1},
        {"edition": 2025},  # the best checkpoint is chosen by BERTScore with idf
        {"train": {"weight_decay": 0.1}},
        {"model": {"checkpoint": "tiny", "image_size": 224}},
        {"model": {"checkpoint": "tiny", "tiny": {"seed": 1}}},
        {"data": {"root": data.root, "augment": {"brightness": 0.1}}},
    ):
        assert plan(data, tmp_path, **other).directory("train") != base, other


def test_the_tiny_checkpoint_serves_every_image_size(data, tmp_path):
    sizes = [plan(data, tmp_path, model={"checkpoint": "tiny", "image_size": size}) for size in (224, 364)]
    assert sizes[0].directory("tiny") == sizes[1].directory("tiny")


def test_a_checkpoint_is_known_by_its_contents(data, tmp_path):
    """Weights that were trained further have the same name and size."""
    folder = weights(tmp_path / "model", 0)
    model = {"checkpoint": str(folder)}
    before = plan(data, tmp_path, model=model).directory("train")
    assert plan(data, tmp_path, model=model).directory("train") == before
    weights(folder, 1)
    assert plan(data, tmp_path, model=model).directory("train") != before


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
        return [plan(data, tmp_path, score=score).directory(step) for step in steps]

    before = places()
    (encoder / "README.md").write_text("for people")
    assert places() == before
    content = (encoder / name).read_bytes()
    (encoder / name).write_bytes(content[::-1])
    assert not set(before) & set(places())
    (encoder / name).write_bytes(content)
    assert places() == before


def test_other_packages_score_anew_and_train_nothing(data, tmp_path, monkeypatch):
    before = [plan(data, tmp_path).directory(step) for step in ("train", "score-after")]
    monkeypatch.setattr("harness.metrics.versions", lambda: ["torch:9"])
    after = [plan(data, tmp_path).directory(step) for step in ("train", "score-after")]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_a_standin_in_a_wheel_is_known_by_its_contents(data, tmp_path, monkeypatch):
    before = plan(data, tmp_path).directory("train")
    other = Checkpoint("other", weights(tmp_path / "other", 3), True)
    monkeypatch.setattr(bertscore, "locate", lambda _: (other, 6))
    assert plan(data, tmp_path).directory("train") != before


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
        directory = step(tmp_path, "score", {"a": 1}, lambda _: next(answers))
        assert is_done(directory) == expected


def test_a_device_without_memory_is_told_in_words(capsys):
    """The error is torch's own; a study finds the same reason in every trial, whatever the numbers in it."""

    class Asking(build.Builder):
        def __init__(self):
            self.config = Config.model_validate({"name": "small", "data": {"root": "x"}})
            self.kind, self.reporter = "cpu", Terminal()

        def _predict(self, split, directory):
            torch.empty(1 << 60)

    with pytest.raises(UserError) as told:
        Asking().build("predict-test", Path())
    assert str(told.value).startswith("error: predict-test: the cpu has not enough memory for this step\n")
    assert told.value.exit_code == 1
    assert "you tried to allocate" in capsys.readouterr().err
