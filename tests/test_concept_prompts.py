"""Prompts with concepts: true ones in training, those of another run in decoding; refusals before a run."""

import contextlib
import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.commands import harness
from support.experiments import EXPERIMENT, begin, messages, write
from support.generate import generated

from harness import records
from harness.config.experiment import load
from harness.data import load as load_data
from harness.errors import UserError
from harness.models import blip2
from harness.models.settings import ConceptPrompt, ModelConfig, longest_prompt
from harness.models.text import IGNORE
from harness.records.files import PREDICTIONS, read_captions, write_lists
from harness.steps import epochs
from harness.steps.plan import Plan
from harness.steps.predict import model_for
from harness.steps.prompts import prompts_of
from harness.steps.work import Work
from harness.training import memory
from harness.training.settings import TrainConfig

HEAD = "name: e\ndata: {root: d}\n"
FOUND, LATE, READS_RUN = "found/knn-s42", "late/base-s42", "reads/base-s42"
BROKEN = "phantom_valid_000002"
FINDS = """
name: found
task: concepts
device: cpu
data: {root: data/phantom, skip_bad: true, phantom: {train: 48, valid: 12, test: 6, seed: 3}}
model: {family: encoder, vision_checkpoint: tiny, image_size: 28,
        tiny: {patch_size: 14, hidden_size: 32, vision_layers: 1, vision_epochs: 2}}
train: {stages: []}
concepts: {predictor: knn, knn: {neighbours: 5}}
score: {bootstrap: 50}
variants: {knn: {}}
"""
READS = (
    EXPERIMENT.replace("name: small", "name: reads")
    .replace("root: ", "skip_bad: true\n  root: ")
    .replace("model:\n", f"model:\n  prompt: {{concepts: {FOUND}, most: 2}}\n")
    .partition("variants:")[0]
)


class Silent:
    """Reports nothing."""

    def say(self, text: str) -> None:
        pass

    def begin(self, run: str, step: str) -> None:
        pass

    def progress(self, label: str):
        return contextlib.nullcontext(lambda *done, **more: None)


@pytest.fixture(scope="module")
def project(small_run, tmp_path_factory) -> Path:
    """A run of concepts and one that has them in its prompts; one validation image is damaged."""
    place = begin(small_run, tmp_path_factory.mktemp("prompts"), READS)
    next((place / "data").rglob(f"{BROKEN}.*")).write_bytes(b"no image")
    (place / "found.yaml").write_text(FINDS)
    harness(place, "run", "found.yaml")
    harness(place, "run", "small.yaml")
    return place


def plan(project: Path, *sets: str) -> Plan:
    (config,) = load(project / "small.yaml", sets)
    root = project / "data" / "phantom"
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": root})})
    return Plan(config, load_data(config.data, project / "runs"), project / "runs")


def steps(project: Path, *sets: str) -> dict[str, str]:
    return {name: step.directory.name for name, step in plan(project, *sets).steps.items()}


def record(project: Path, run: str = READS_RUN) -> dict:
    return json.loads((project / "runs" / run / "run.json").read_text())


def table(project: Path, run: str, name: str) -> dict[str, dict[str, str]]:
    file = project / "runs" / record(project, run)["artifacts"][name]
    return {row["ID"]: row for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())}


def truth(project: Path, split: str) -> dict[str, list[str]]:
    """The concepts of a split's images, read as plain text."""
    (labels,) = (project / "data/phantom").glob(f"*concept_detection_{split}_labels.csv")
    rows = [line.split("\t") for line in labels.read_text().splitlines()[1:]]
    return {image: cuis.split(";") for image, cuis in rows}


def sentence(project: Path, cuis: list[str]) -> str:
    """What a prompt says about a list of concepts, of which two count, the more frequent first."""
    (mapping,) = (project / "data/phantom").glob("*cui_mapping.csv")
    names = dict(line.split("\t") for line in mapping.read_text().splitlines())
    training = truth(project, "train")
    first = sorted(cuis[:2], key=lambda cui: (-sum(cui in own for own in training.values()), cui))
    return f"The image shows {', '.join(names[cui] for cui in first)}."


@pytest.mark.ci
def test_images_that_are_trained_on_get_their_true_concepts(project):
    found, true = table(project, READS_RUN, "prompts/train.csv"), truth(project, "train")
    assert found.keys() == true.keys()
    for image, row in found.items():
        assert row["prompt"] == sentence(project, true[image]), image
        assert set(row["CUIs"].split(";")) == set(true[image][:2])


@pytest.mark.ci
@pytest.mark.parametrize("split", ["valid", "test"])
def test_other_images_get_predicted_concepts_and_never_their_true_ones(project, split):
    found = table(project, READS_RUN, f"prompts/{split}.csv")
    predicted = table(project, FOUND, f"concepts/{split}.csv")
    assert found.keys() == predicted.keys() - {BROKEN}
    for image, row in found.items():
        assert row["prompt"] == sentence(project, predicted[image]["CUIs"].split(";")), image
    if split == "valid":
        true = truth(project, split)
        assert any(row["prompt"] != sentence(project, true[image]) for image, row in found.items())


@pytest.mark.ci
def test_the_loss_ignores_the_prompt(project):
    made = plan(project)
    (caption, _), train = (
        blip2.codecs(made.config.model, made.steps["tiny"].directory, 40),
        made.steps["train"],
    )
    found, prompts = table(project, READS_RUN, "prompts/train.csv"), []
    for image, prompt in zip(found, prompts_of(train.inputs, "train", caption), strict=True):
        joined = caption.tokenizer(f"{found[image]['prompt']} a photo of", add_special_tokens=False).input_ids
        assert list(prompt) == [caption.prompt[0], *joined]
        prompts.append(prompt)
    texts = [caption.encode("ct of the chest", prompt) for prompt in prompts]
    said = caption.encode("ct of the chest", ()).ids
    for prompt, row in zip(prompts, caption.collate(texts)["labels"].tolist(), strict=True):
        end = len(prompt) + len(said)
        assert row == [IGNORE] * len(prompt) + said + [IGNORE] * (len(row) - end)


@pytest.mark.ci
def test_captions_are_those_of_transformers_after_the_same_prompts(project, tmp_path):
    """With a language model of random weights, whose captions depend on every token of a prompt."""
    made = plan(project, "predict.num_beams=3")
    predict, work = made.steps["predict-valid"], Work(made.config, Silent())
    loaded = work.model = model_for(predict.inputs, work)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in (one for one in loaded.model.language_model.parameters() if one.ndim > 1):
            weight.normal_(std=2 * weight.shape[-1] ** -0.5)
    loaded.model.eval()
    predict.build(work, tmp_path)
    captions, found = read_captions(tmp_path / PREDICTIONS), table(project, READS_RUN, "prompts/valid.csv")
    codec, pixels = loaded.caption, work.pixels(predict.inputs, "valid", made.config.model.image_size)
    given = {"num_beams": 3, "max_new_tokens": 24, "min_new_tokens": made.config.predict.min_new_tokens}

    def said(image, prompt) -> str:
        one = loaded.normalise(torch.from_numpy(image[None].copy()))
        _, ids = generated(loaded.model, one, torch.tensor(prompt), codec.end, codec.pad, **given)
        return codec.decode(ids[0].tolist())

    changed = 0
    for example, image in zip(made.data.readable("valid"), pixels, strict=True):
        text = f"{found[example.id]['prompt']} a photo of"
        own = [codec.prompt[0], *codec.tokenizer(text, add_special_tokens=False).input_ids]
        assert said(image, own) == captions[example.id], example.id
        changed += said(image, codec.prompt) != captions[example.id]
    assert changed > len(pixels) / 2


@pytest.mark.ci
def test_the_content_of_predicted_concepts_is_part_of_the_fingerprint_and_the_runs_name_is_not(project):
    before = steps(project)
    assert before == {name: Path(place).name for name, place in record(project)["steps"].items()}
    shutil.copytree(project / "runs" / "found", project / "runs" / "copied")
    copied = project / "runs" / "copied" / "knn-s42" / "run.json"
    about = json.loads(copied.read_text()) | {"name": "copied"}
    copied.write_text(json.dumps(about))
    assert steps(project, "model.prompt.concepts=copied/knn-s42") == before
    fewer = steps(project, "model.prompt.most=1")
    changed = {name.partition("-")[0] for name in before if before[name] != fewer[name]}
    assert changed == {"prompts", "train", "predict", "postprocess", "score"}
    plain = steps(project, "model.prompt=a photo of")
    assert plain.keys() == {name for name in before if not name.startswith("prompts")}
    assert plain["train"] != before["train"]

    folder = project / "runs" / "other"
    lists = dict.fromkeys(truth(project, "valid"), ("C0040405",))
    write_lists(folder / "valid.csv", lists)
    about["artifacts"] |= {"concepts/valid.csv": "other/valid.csv"}
    copied.write_text(json.dumps(about))
    other = steps(project, "model.prompt.concepts=copied/knn-s42")
    assert other["prompts-train"] == before["prompts-train"]
    assert other["prompts-test"] == before["prompts-test"]
    assert other["prompts-valid"] != before["prompts-valid"]


@pytest.mark.ci
def test_a_last_fit_trains_on_the_true_concepts_of_validation_images(project):
    made = plan(project, "data.fit_on=[train,valid]")
    assert made.steps["prompts-valid"].inputs.facts == {"predicted": None}
    assert made.steps["prompts-test"].inputs.facts["predicted"]
    place = project / "fit"
    place.mkdir()
    made.steps["prompts-valid"].build(Work(made.config, Silent()), place)
    rows = list(csv.DictReader((place / "prompts.csv").read_text().splitlines()))
    assert [row["prompt"] for row in rows] == [
        sentence(project, cuis) for image, cuis in truth(project, "valid").items() if image != BROKEN
    ]


@pytest.mark.ci
def test_a_run_without_what_a_prompt_needs_is_refused_before_it_starts(project):
    def refused(*sets: str) -> str:
        with pytest.raises(UserError) as found:
            plan(project, *sets).steps  # noqa: B018
        return "\n".join(f"{problem} {problem.hint}" for problem in found.value.problems)

    assert "not a run: it has no run.json" in refused("model.prompt.concepts=nothing/base-s42")
    assert "has no concepts/valid.csv" in refused("model.prompt.concepts=reads/base-s42")
    others = refused("data.fraction.valid=0.5")
    assert f"model.prompt.concepts: {FOUND} has other images or labels of valid" in others
    file = project / "runs" / FOUND / "run.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"status": "FAILED"}))
    try:
        assert f"{FOUND} has not finished (status FAILED)" in refused()
    finally:
        file.write_text(whole)
    shown = harness(project, "run", "small.yaml", "--dry-run", "--set", f"model.prompt.concepts={LATE}")
    assert f"takes from other runs is not known yet: runs/{LATE}: not a run" in shown.stdout


@pytest.mark.ci
def test_a_run_waits_for_an_earlier_one_of_the_same_file(project):
    given = {"late": FOUND, "later": LATE}
    plans = [plan(project, f"name={name}", f"model.prompt.concepts={of}") for name, of in given.items()]
    assert epochs.check(plans) == plans[:1]


@pytest.mark.ci
def test_captions_after_the_concepts_of_a_stand_in_are_those_of_one(project):
    assert records.read(project / "runs" / FOUND)["standin_model"] is True
    assert plan(project).steps["prompts-valid"].found({"standin_model": False}) == {"standin_model": True}
    assert plan(project).steps["prompts-train"].found({"standin_model": False}) == {"standin_model": False}


def test_the_memory_forecast_counts_the_longest_sentence():
    prompt = ConceptPrompt(concepts=FOUND, most=4)
    assert longest_prompt(prompt) == 60
    shape = blip2.shape(ModelConfig(), TrainConfig())
    models = [
        memory.Model(shape, TrainConfig(max_caption_tokens=40), "cuda", True, own)
        for own in (longest_prompt(prompt), 0)
    ]
    own, plain = (memory.needed(one, memory.configured(one.config, 1)) for one in models)
    assert own > plain


def test_mistakes_in_a_prompt_name_the_key(tmp_path):
    cases = {
        "{concepts: a/b-s42, most: 0}": "model.prompt.most: got 0; a whole number from 1 to 100 is allowed",
        "{concepts: 3}": "model.prompt.concepts: got 3; a text is allowed",
        "{concepts: a/b-s42, words: 3}": "model.prompt.words: unknown key",
        "{concepts: a/b-s42, retrieved: 3}": "model.prompt: has retrieved and concepts; one of the two is",
    }
    for number, (value, message) in enumerate(cases.items()):
        found = messages(write(tmp_path, f"{HEAD}model: {{prompt: {value}}}\n", f"e{number}.yaml"))
        assert any(message in line for line in found), found
