"""Prompts with the captions of similar training images: the search, the ids, training and decoding."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import harness
from support.experiments import EXPERIMENT, messages, write
from support.generate import generated
from support.models import TEXTS, load_tiny, pixels

from harness import records
from harness.config.experiment import load
from harness.config.sections import PredictConfig
from harness.data import load as load_data
from harness.decoding import predict, retrieval
from harness.errors import UserError
from harness.models import blip2
from harness.models.settings import ModelConfig, RetrievedPrompt, longest_prompt
from harness.models.text import IGNORE
from harness.records.files import PREDICTIONS, read_captions
from harness.steps.plan import Plan
from harness.steps.work import Work
from harness.store import fingerprint
from harness.training import memory
from harness.training.settings import TrainConfig

HEAD = "name: e\ndata: {root: d}\n"
BEFORE = (
    "Similar: axial ct of the lung.",
    "Similar: axial ct of the liver showing a mass; mri of the knee.",
    "Similar: axial ct of the lung.",
    "",
    "Similar: axial ct of the brain; axial ct; nodule; fracture; effusion.",
)


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_are_those_of_brute_force_without_copies(seed):
    random = np.random.default_rng(seed)
    database = random.standard_normal((60, 5)).astype(np.float32)
    database[20:45] = database[0]  # more copies than are looked at first
    database = retrieval.centred(database, database.mean(0))
    assert np.allclose(np.linalg.norm(database, axis=1), 1)
    looked = []

    def is_copy(row: int, other: int, cosine: float) -> bool:
        looked.append((row, other))
        return row == other or cosine >= retrieval.TWINS

    found = retrieval.others(database, 3, is_copy)
    cosines = database.astype(float) @ database.T.astype(float)
    for row, near in enumerate(found):
        allowed = [other for other in range(60) if other != row and cosines[row, other] < retrieval.TWINS]
        assert near == sorted(allowed, key=lambda other: (-cosines[row, other], other))[:3]
    assert len(looked) < 60 * 60


def test_images_without_others_have_no_neighbours():
    database = np.eye(3, dtype=np.float32)
    assert retrieval.others(database, 5, lambda row, other, cosine: True) == [[], [], []]
    assert retrieval.others(database, 5, lambda row, other, cosine: row == other)[2] == [0, 1]


def test_an_image_is_known_when_compressed_again_and_no_other_is_taken_for_it(small_run):
    thumbnails = []
    for file in sorted((small_run / "kept" / "data" / "phantom" / "train").glob("*.jpg")):
        with Image.open(file) as image:
            again = io.BytesIO()
            image.convert("RGB").save(again, "JPEG", quality=40)
            versions = (image.convert("RGB"), Image.open(again))
            thumbnails.append([retrieval.thumbnail(np.asarray(version)) for version in versions])
    for one, (whole, compressed) in enumerate(thumbnails):
        assert retrieval.are_one(whole, compressed)
        assert not any(retrieval.are_one(whole, other[0]) for other in thumbnails[:one])


def test_a_prompt_is_tokenised_as_one_text_and_has_no_loss(loaded):
    codec, tokenizer = loaded.caption, loaded.caption.tokenizer
    prompt = codec.prompt_after("Similar: axial ct of the lung; mri.", 99)
    joined = tokenizer("Similar: axial ct of the lung; mri. a photo of", add_special_tokens=False).input_ids
    assert list(prompt) == [codec.prompt[0], *joined]
    texts = [codec.encode(TEXTS[0][1], prompt), codec.encode(TEXTS[1][1])]
    batch = codec.collate(texts)
    for row, (text, own) in enumerate(zip(texts, (prompt, codec.prompt), strict=True)):
        said = codec.encode(TEXTS[row][1]).ids[len(codec.prompt) :]
        labels = batch["labels"][row].tolist()
        assert labels == [*[IGNORE] * len(own), *said, *[IGNORE] * (len(labels) - len(text.ids))]
        assert batch["ids"][row].tolist()[: len(text.ids)] == [*own, *said]
        assert text.predicted == len(said)


def test_a_long_prompt_keeps_its_own_text(loaded):
    codec = loaded.caption
    prompt = codec.prompt_after("axial ct of the lung; " * 20, 7)
    rest = codec.tokenizer(" a photo of", add_special_tokens=False).input_ids
    assert len(prompt) == 1 + 7 + len(rest)
    assert list(prompt[8:]) == rest
    assert codec.prompt_after("", 7) == codec.prompt
    longest = codec.encode("lung " * 50, prompt)
    assert codec.collate([longest], 16)["ids"].shape[1] == len(prompt) + codec.max_tokens


@pytest.mark.ci
@pytest.mark.parametrize("language_model", [True, False])
def test_captions_after_own_prompts_are_those_of_one_image_at_a_time(tiny_folder, language_model):
    loaded = load_tiny(tiny_folder, language_model=language_model)
    images, codec = pixels(len(BEFORE)), loaded.caption
    prompts = [codec.prompt_after(text, 99) for text in BEFORE]
    lengths = [len(prompt) for prompt in prompts]
    assert len({*lengths}) == 4
    indices, told = [4, 0, 2, 1, 3], []
    for beams in (1, 3):
        given = {"num_beams": beams, "max_new_tokens": 9, "min_new_tokens": 2}
        config = PredictConfig(**given, batch_size=2)
        told.clear()
        own = predict.candidates(
            loaded, images, indices, config, done=lambda *done: told.append(done), prompts=prompts
        )
        found = [best.caption for best, *_ in own]
        alone = [predict.captions(loaded, images, [i], config, prompts=prompts)[0] for i in indices]
        assert found == alone
        for i, text in zip(indices, found, strict=True):
            one = loaded.normalise(torch.from_numpy(images[i : i + 1]))
            _, ids = generated(loaded.model, one, torch.tensor(prompts[i]), codec.end, codec.pad, **given)
            assert codec.decode(ids[0].tolist()) == text
        assert [part for part, _ in told] == sorted(
            ([4], [1], [0, 2], [3]), key=lambda part: -lengths[part[0]]
        )
        assert {i: one for part, ones in told for i, one in zip(part, ones, strict=True)} == dict(
            zip(indices, own, strict=True)
        )


def test_penalties_do_not_count_retrieved_captions(tiny_folder):
    """With the Q-Former's text path, which counts its start token as said."""
    loaded = load_tiny(tiny_folder, language_model=False)
    codec, images = loaded.caption, pixels(2)
    once = PredictConfig(num_beams=1, max_new_tokens=6, min_new_tokens=6, no_repeat_ngram_size=1)
    free = once.model_copy(update={"no_repeat_ngram_size": 0})
    for image in range(2):
        prompt = codec.prompt_after("a mass of the lung", 99)
        for _ in range(5):  # until the model says what it has read
            (said,) = predict.captions(loaded, images, [image], free, prompts={image: prompt})
            prompt = codec.prompt_after(said, 99)
        (found,) = predict.captions(loaded, images, [image], once, prompts={image: prompt})
        assert set(found.split()) & set(said.split())


def test_captions_from_before_an_interruption_are_kept(loaded, tmp_path):
    images, ids = pixels(4), [f"image_{i}" for i in range(5)]
    prompts = [loaded.caption.prompt_after(text, 99) for text in BEFORE[:4]]
    config = PredictConfig(num_beams=1, max_new_tokens=8)
    how = (config, tmp_path, lambda done, total: None, {"image_2": "unreadable"}, 0, prompts)
    predict.predict_split(loaded, ids, images, *how)
    whole = read_captions(tmp_path / PREDICTIONS)
    readable = [name for name in ids if name != "image_2"]
    expected = dict(
        zip(readable, predict.captions(loaded, images, range(4), config, prompts=prompts), strict=True)
    )
    assert whole == expected | {"image_2": "unreadable"}
    assert list(whole) == ids
    row = ["image_1", [["beam1", -1.0, "kept from before"]]]
    (tmp_path / "partial-0.jsonl").write_text(json.dumps([*row, fingerprint(row)]) + "\n")
    predict.predict_split(loaded, ids, images, *how)
    assert read_captions(tmp_path / PREDICTIONS) == whole | {"image_1": "kept from before"}


def test_the_memory_forecast_counts_the_longest_prompt():
    prompt = RetrievedPrompt(retrieved=3, words=10)
    assert longest_prompt(prompt) == 60
    shape = blip2.shape(ModelConfig(), TrainConfig())
    models = [
        memory.Model(shape, TrainConfig(max_caption_tokens=tokens), "cuda", True, own)
        for tokens, own in ((40, 60), (100, 0), (40, 0))
    ]
    own, longer, plain = (memory.needed(one, memory.configured(one.config, 1)) for one in models)
    assert own == longer > plain


def test_mistakes_in_a_prompt_name_the_key(tmp_path):
    cases = {
        "5": "model.prompt: got 5; a text or a mapping with the key retrieved or concepts is allowed",
        "{retreived: 3}": "model.prompt.retreived: unknown key. Did you mean model.prompt.retrieved?",
        "{retrieved: 0}": "model.prompt.retrieved: got 0; a whole number from 1 to 100 is allowed",
    }
    for number, (value, message) in enumerate(cases.items()):
        found = messages(write(tmp_path, f"{HEAD}model: {{prompt: {value}}}\n", f"e{number}.yaml"))
        assert any(message in line for line in found), found
    (run,) = load(write(tmp_path, f"{HEAD}model: {{prompt: text}}\n"), ["model.prompt.retrieved=2"])
    assert (run.model.prompt.retrieved, run.model.prompt.text) == (2, "a photo of")


@pytest.fixture(scope="module")
def project(small_run, tmp_path_factory) -> Path:
    """A run with retrieved prompts; two training images are the same, a validation image is damaged."""
    place = tmp_path_factory.mktemp("prompts")
    shutil.copytree(small_run / "kept" / "data", place / "data")
    images = place / "data" / "phantom"
    shutil.copy(images / "train" / "phantom_train_000007.jpg", images / "train" / "phantom_train_000031.jpg")
    (images / "valid" / "phantom_valid_000002.jpg").write_bytes(b"no image")
    with Image.open(images / "train" / "phantom_train_000009.jpg") as image:
        image.save(images / "valid" / "phantom_valid_000005.jpg", quality=97)
    shutil.copy(images / "train" / "phantom_train_000004.jpg", images / "test" / "phantom_test_000001.jpg")
    text = EXPERIMENT.replace("name: small", "name: similar").replace("root: ", "skip_bad: true\n  root: ")
    text = text.replace("model:\n", "model:\n  prompt: {retrieved: 3, words: 12}\n").partition("variants:")[0]
    (place / "similar.yaml").write_text(text)
    harness(place, "run", "similar.yaml")
    return place


def record_of(project: Path) -> dict:
    return json.loads((project / "runs" / "similar" / "base-s42" / "run.json").read_text())


def prompts_of(project: Path, split: str) -> dict[str, tuple[list[str], str]]:
    """Neighbours and text of the prompt of each image."""
    file = project / "runs" / record_of(project)["artifacts"][f"prompts/{split}.csv"]
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    return {row["ID"]: (row["neighbours"].split(), row["prompt"]) for row in rows}


def captions_of(project: Path) -> dict[str, str]:
    (file,) = (project / "data").rglob("*caption_prediction_train_labels.csv")
    rows = csv.DictReader(
        file.read_text(encoding="utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE
    )
    return {row["ID"]: row["caption"] for row in rows}


def cleaned(caption: str, words: int) -> str:
    return " ".join("".join(" " if c in '.!"()*#:;~' else c for c in caption.lower()).split()[:words]).rstrip(
        ","
    )


@pytest.mark.ci
def test_no_image_has_its_own_caption_or_that_of_a_copy_in_its_prompt(project):
    captions, twins = captions_of(project), ("phantom_train_000007", "phantom_train_000031")
    found = prompts_of(project, "train")
    assert found.keys() == captions.keys()
    for image, (near, text) in found.items():
        assert len(near) == len({*near} - {image}) == 3
        assert text == f"Similar: {'; '.join(cleaned(captions[one], 12) for one in near)}."
    for twin, other in (twins, twins[::-1]):
        assert other not in found[twin][0]
    assert set(twins) & {one for near, _ in found.values() for one in near}
    assert sum(cleaned(captions[image], 12) in text for image, (_, text) in found.items()) == sum(
        any(cleaned(captions[image], 12) == cleaned(captions[one], 12) for one in near)
        for image, (near, _) in found.items()
    )


@pytest.mark.ci
def test_validation_images_have_neighbours_of_training_and_unreadable_ones_have_none(project):
    record, captions = record_of(project), captions_of(project)
    found = prompts_of(project, "valid")
    assert len(found) == 11
    assert "phantom_valid_000002" not in found
    assert all(set(near) <= captions.keys() and len(near) == 3 for near, _ in found.values())
    written = read_captions(project / "runs" / record["artifacts"]["predictions/valid_before.csv"])
    assert len(written) == 12
    assert record["status"] == "FINISHED"


@pytest.mark.ci
def test_a_lost_file_is_made_again_with_the_checkpoint_and_not_with_the_trained_model(project):
    record = record_of(project)
    files = {
        name: project / "runs" / record["steps"][name] / file
        for name, file in {
            "base_features-valid": "features.npy",
            "prompts-valid": "prompts.csv",
            "predict-valid": PREDICTIONS,
            "train": "best.safetensors",
        }.items()
    }
    before = {name: file.read_bytes() for name, file in files.items()}
    made = files["train"].stat().st_mtime_ns
    for name in ("base_features-valid", "prompts-valid", "predict-valid"):
        files[name].unlink()
    harness(project, "run", "similar.yaml")
    assert {name: file.read_bytes() for name, file in files.items()} == before
    assert files["train"].stat().st_mtime_ns == made


def plan(project: Path, *sets: str) -> Plan:
    (config,) = load(project / "similar.yaml", sets)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"root": project / "data" / "phantom"})}
    )
    return Plan(config, load_data(config.data, project / "runs"), project / "runs")


def steps(project: Path, *sets: str) -> dict[str, str]:
    return {name: step.directory.name for name, step in plan(project, *sets).steps.items()}


@pytest.mark.ci
def test_the_number_of_captions_is_part_of_the_fingerprint(project):
    three, four = steps(project), steps(project, "model.prompt.retrieved=4", "model.prompt.words=12")
    assert three == {name: Path(place).name for name, place in record_of(project)["steps"].items()}
    changed = {name.partition("-")[0] for name in three if three[name] != four[name]}
    assert changed == {"prompts", "train", "predict", "postprocess", "score"}
    fewer = steps(project, "model.prompt.words=5")
    assert {name for name in three if three[name] != fewer[name]} == {n for n in three if three[n] != four[n]}
    plain = steps(project, "model.prompt=a photo of")
    assert not [name for name in plain if name.startswith(("prompts", "base_features"))]
    assert plain["tiny"] == three["tiny"]
    assert plain["train"] != three["train"]


@pytest.mark.ci
def test_a_named_run_gives_its_features_and_retrieval_reports_copies(project, tmp_path):
    (project / "found.yaml").write_text(
        "base: similar.yaml\nname: found\nmodel: {prompt: a photo of}\ntrain: {stages: []}\n"
        "retrieval: {neighbours: 1, utility: {rouge1: 1}}\n"
    )
    harness(project, "run", "found.yaml")
    record = records.read(project / "runs" / "found" / "base-s42")
    assert [line for line in record["warnings"] if "also in train" in line] == [
        f"{split}: 1 id (phantom_{split}_{number}) of {count} images are also in train; their "
        "scores measure memory"
        for split, number, count in (("valid", "000005", 12), ("test", "000001", 6))
    ]
    file = records.artifact(project / "runs" / "found" / "base-s42", record, "retrieval/valid_copies.csv")
    assert file.read_text().split() == ["ID,train", "phantom_valid_000005,phantom_train_000009"]
    named = plan(project, "model.prompt.features=found/base-s42", "predict.splits=[valid]", "train.stages=[]")
    assert not [name for name in named.steps if name.startswith("base_features")]
    step, own = named.steps["prompts-valid"], plan(project).steps["prompts-valid"]
    step.build(Work(named.config, None), tmp_path)
    assert (tmp_path / "prompts.csv").read_bytes() == (own.directory / "prompts.csv").read_bytes()
    with pytest.raises(UserError, match="similar/base-s42 has no image features of train"):
        plan(project, "model.prompt.features=similar/base-s42").steps  # noqa: B018
