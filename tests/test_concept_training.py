"""Training a classifier of concepts, alone and beside a captioner."""

import inspect
import json
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import prefix as small
from support.commands import harness
from support.experiments import EXPERIMENT
from support.models import load_tiny, pixels
from support.ranks import TRAIN, rows, train
from support.shared_folders import made_once
from support.training import HEAD, Interrupted, config, labels_of_texts, splits, with_head

from harness.config.sections import AugmentConfig
from harness.machine import device
from harness.metrics.concepts import f1
from harness.models import adapters, base, contentless, encoder, family, head, parts, prefix, problems
from harness.models.base import LABELS, Work
from harness.models.loading import Loaded, load_average, load_some, load_trained, save_trained
from harness.models.settings import ModelConfig
from harness.training import train as training
from harness.training.detection import best_f1
from harness.training.settings import TrainConfig

device.probe("cpu")
SIZE = 64
ALONE = TrainConfig(
    batch_size=8,
    micro_batch_size=4,
    learning_rate=1e-2,
    warmup_steps=0,
    precision="fp32",
    stages=[{"epochs": 1, "losses": {"concepts": 1}}],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "prefix", small.build)


def model_config(folder: Path, vision: str = "clip", **changes) -> ModelConfig:
    return ModelConfig(family="encoder", image_size=SIZE, vision_checkpoint=str(folder / vision), **changes)


def classifier(folder: Path, vision: str = "clip", settings=ALONE, **changes) -> Loaded:
    found = encoder.load(model_config(folder, vision, **changes), settings, None, torch.float32)
    return with_head(found)


def captioner(folder: Path) -> Loaded:
    """A captioner of family prefix, without dropout."""
    named = {"vision_checkpoint": str(folder / "clip"), "language_checkpoint": str(folder / "gpt2")}
    settings = TrainConfig(language_dropout=0, max_caption_tokens=60)
    return with_head(
        prefix.load(ModelConfig(family="prefix", image_size=SIZE, **named), settings, None, torch.float32)
    )


def images_of(loaded: Loaded) -> dict[str, training.Split]:
    """The splits of `support.training` with labels; without texts if the model has none."""
    if loaded.caption is not None:
        return splits(loaded)
    every = {"train": (range(20), 1), "valid": (range(0, 20, 5), 2)}
    return {
        name: training.Split(
            [f"{name}_{i}" for i in chosen],
            pixels(len(chosen), seed=seed),
            [small_text()] * len(chosen),
            [None] * len(chosen),
            labels_of_texts(chosen),
        )
        for name, (chosen, seed) in every.items()
    }


def small_text():
    from harness.models.text import Text

    return Text([0], 1)


def drawn(loaded: Loaded, seed: int = 0) -> dict[str, training.Split]:
    """Images with a bright square for each of their labels."""
    found = images_of(loaded)
    for split in found.values():
        split.pixels[:] = pixels(len(split.ids), seed=seed) // 4
        for image, own in zip(split.pixels, split.labels, strict=True):
            for row, column in (divmod(label, 3) for label in own):
                image[21 * row : 21 * row + 21, 21 * column : 21 * column + 21] += 190
    return found


def run(make, settings, directory, log=lambda row: None, better=None, by="concepts", data=images_of):
    """Train what `make` gives -> what is loaded at the end, and the rows of losses.jsonl.

    Each validation is better than the one before, by the numbers of `better`.
    """
    directory.mkdir(exist_ok=True)
    better = better or count()

    def evaluate(loaded):
        return {"valid_primary": float(next(better))}

    given = ("cpu", 42, directory, log, evaluate)
    read = data(make())
    loaded = training.Training(settings, AugmentConfig(), make, read, *given, validates_by=by).run()
    return loaded, [json.loads(line) for line in (directory / "losses.jsonl").read_text().splitlines()]


# alone


@pytest.mark.ci
@pytest.mark.parametrize("changes", [{}, {"loss": "asymmetric", "pooling": "gem"}])
def test_a_classifier_learns_a_small_set_by_heart(folder, tmp_path, changes):
    """Each concept is a bright square at a place of its own. Then it finds them under other noise."""
    settings = ALONE.model_copy(update={"stages": TrainConfig(stages=_concepts(14)).stages})
    made = partial(encoder.load, model_config(folder, "convnext"), settings, None, torch.float32)
    loaded, found = run(lambda: with_head(made(), **changes), settings, tmp_path / "run", data=drawn)
    losses = [row["concepts_loss"] for row in found if "concepts_loss" in row]
    assert losses[-1] < 0.1 * losses[0]
    split = drawn(loaded, seed=9)["train"]
    given = head.probabilities(loaded, split.pixels, range(20), batch_size=7)
    names = [str(label) for label in range(given.shape[1])]
    assert best_f1(given, names, [[str(one) for one in own] for own in split.labels]) > 0.99


def _concepts(epochs: int) -> list[dict]:
    return [{"epochs": epochs, "losses": {"concepts": 1}}]


def test_the_steps_are_those_of_plain_pytorch(folder, tmp_path):
    """Losses of micro-batches are means over the images of the whole step; the validation's is one too."""
    settings = ALONE.model_copy(update={"max_grad_norm": 0.0})
    found = run(partial(classifier, folder), settings, tmp_path / "run")[1]
    plain = classifier(folder)
    model, data = plain.model, images_of(plain)
    model.freeze(["concepts"])
    optimizer = torch.optim.AdamW(parts.groups(model, settings.weight_decay, {}), lr=1e-2)
    bce = torch.nn.BCEWithLogitsLoss()
    order = training.epoch_batches(np.ones(20, int), 8, 42, 1, 0)
    steps = [row for row in found if "concepts_loss" in row]
    for indices, row in zip(order, steps, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = row["learning_rate"]
        loss = bce(logits(plain, data["train"], indices), wanted(data["train"], indices))
        assert row["loss"] == row["concepts_loss"] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        last = bce(logits(plain, data["valid"], range(4)), wanted(data["valid"], range(4)))
    assert found[-1]["valid_loss"] == pytest.approx(last.item(), rel=1e-4)


def logits(loaded: Loaded, split: training.Split, indices) -> torch.Tensor:
    """Of the encoder of transformers and the head's matrix, with nothing of ours between them."""
    images = loaded.normalise(torch.from_numpy(split.pixels[np.asarray(indices)]))
    features = loaded.model.vision.model(pixel_values=images).last_hidden_state[:, 1:]
    return loaded.model.head.linear(features.mean(1))


def wanted(split: training.Split, indices) -> torch.Tensor:
    found = torch.zeros(len(indices), len(HEAD[0]))
    for row, i in enumerate(indices):
        found[row, split.labels[i]] = 1
    return found


@pytest.mark.parametrize("vision", ["clip", "cvt"])
@pytest.mark.parametrize("trained", [True, False])
def test_exactly_what_should_train_has_gradients_and_is_saved(folder, vision, trained):
    found = classifier(folder, vision, ALONE.model_copy(update={"train_vision": trained}))
    model = found.model.train()
    model.freeze(["concepts"])
    images = found.normalise(torch.from_numpy(pixels(3, SIZE)))
    model(images, concepts=torch.eye(3, len(HEAD[0]))).concepts.backward()
    meant = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == meant
    assert {name for name in model.state_dict() if model.is_saved(name)} == meant
    assert {model.part_of(name) for name in meant} == {"connector", *["vision"] * trained}
    assert {name for name in meant if name.startswith("head.")} == {"head.linear.weight", "head.linear.bias"}


@pytest.mark.parametrize(
    "zero_stage",
    [pytest.param(0, marks=pytest.mark.ci), *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))],
)
def test_training_goes_on_to_the_bit(zero_stage, folder, tmp_path):
    """Interrupted within the second stage, with stochastic depth, a learned exponent and an average."""
    settings = ALONE.model_validate(
        ALONE.model_dump()
        | {"stages": _concepts(1) * 2, "zero_stage": zero_stage, "checkpoint_every_steps": 1, "ema": 0.9}
    )
    bare = partial(encoder.load, model_config(folder, "cvt"), settings, None, torch.float32)

    def make():
        return with_head(bare(), pooling="gem", loss="asymmetric")

    def stop(row):
        if row["step"] == 5 and "loss" in row:
            raise Interrupted

    whole, rows_of_whole = run(make, settings, tmp_path / "whole")
    better = count()
    with pytest.raises(Interrupted):
        run(make, settings, tmp_path / "cut", stop, better)
    again, rows_of_again = run(make, settings, tmp_path / "cut", better=better)
    expected = whole.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in again.model.state_dict().items())
    for one, other in zip(rows_of_whole, rows_of_again, strict=True):
        assert [one.get(key) for key in ("step", "loss", "valid_loss")] == [
            other.get(key) for key in ("step", "loss", "valid_loss")
        ]


def test_the_average_of_two_heads_is_loaded_and_one_of_others_is_not(folder, tmp_path):
    one, other = classifier(folder).model, classifier(folder).model
    with torch.no_grad():
        other.head.linear.weight.add_(1)
    for name, model in (("a", one), ("b", other)):
        save_trained(model, tmp_path / name)
    found = classifier(folder).model
    load_average(found, [tmp_path / "a", tmp_path / "b"])
    torch.testing.assert_close(found.head.linear.weight, one.head.linear.weight + 0.5)
    fewer = encoder.load(model_config(folder), ALONE, None, torch.float32)
    head.attach(fewer.model, HEAD[1], [1] * 3, 20)
    with pytest.raises(ValueError, match=r"head.linear.weight is \(9, 32\), not \(3, 32\)"):
        load_trained(fewer.model, tmp_path / "a")


def test_a_model_without_a_head_takes_the_other_weights_of_a_file(folder, tmp_path):
    one = classifier(folder).model
    with torch.no_grad():
        for weight in one.parameters():
            weight.add_(1)
    save_trained(one, tmp_path / "a")
    for read in (load_trained, load_some):
        found = encoder.load(model_config(folder), ALONE, None, torch.float32).model
        read(found, tmp_path / "a")
        assert torch.equal(
            found.state_dict()["vision.model.vision_model.embeddings.patch_embedding.weight"],
            one.state_dict()["vision.model.vision_model.embeddings.patch_embedding.weight"],
        )


def test_adapters_of_the_encoder_train_and_are_merged_for_export(folder, tmp_path):
    found = classifier(folder, lora={"rank": 2, "parts": ("vision",), "dropout": 0.0})
    model = found.model
    model.freeze(["concepts"])
    images = found.normalise(torch.from_numpy(pixels(3, SIZE)))
    model(images, concepts=torch.eye(3, len(HEAD[0]))).concepts.backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert all(".lora_" in name or name.startswith("head.") for name in moved)
    assert any(".lora_" in name for name in moved)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in moved:
                weight.normal_(std=0.1)
    expected = model.eval().image_features(images)
    adapters.merge(model)
    place = encoder.export(found, tmp_path)["vision_checkpoint"]
    again = encoder.load(
        ModelConfig(family="encoder", image_size=SIZE, vision_checkpoint=str(tmp_path / place)),
        ALONE,
        None,
        torch.float32,
    )
    torch.testing.assert_close(again.model.eval().image_features(images), expected, rtol=1e-5, atol=1e-5)
    assert again.mean == found.mean


def test_the_image_tower_of_a_blip2_is_read_from_its_checkpoint(tiny_folder):
    """Resized for larger images as BLIP-2 itself does."""
    named = {"vision_checkpoint": str(tiny_folder), "image_size": 96}
    found = encoder.load(ModelConfig(family="encoder", **named), ALONE, None, torch.float32)
    theirs = load_tiny(tiny_folder, image_size=96)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = theirs.model.eval().vision_model(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found.model.eval().image_features(images), expected, rtol=1e-4, atol=1e-5)
    assert found.model.class_tokens == 1
    assert found.mean == theirs.mean
    assert problems(ModelConfig(family="encoder", **named), ALONE, captions=False) == []


@pytest.mark.parametrize(("vision", "expected"), [("clip", 1), ("convnext", 0), ("cvt", 0)])
def test_class_tokens_are_known_by_the_patches_of_an_image(folder, vision, expected):
    assert classifier(folder, vision).model.class_tokens == expected


def test_a_classifier_has_the_methods_of_a_captioner_but_no_decoder(folder):
    model = classifier(folder).model
    wanted = {name for name, value in vars(base.Captioner).items() if inspect.isfunction(value)}
    assert {name for name in wanted if not hasattr(model, name)} == {"decoder", "looking"}
    own, theirs = (inspect.signature(one) for one in (model.forward, base.Captioner.__call__))
    assert list(own.parameters) == [name for name in theirs.parameters if name != "self"]
    loaded = encoder.load(model_config(folder), ALONE, None, torch.float32)
    assert loaded.model.head is loaded.caption is loaded.concept is None
    assert encoder.codecs(model_config(folder), None, 9) is None


# beside captions


@pytest.fixture(params=["blip2", "prefix"])
def made(request, folder, tiny_folder):
    """A function that loads a captioner with a head."""
    return (
        partial(captioner, folder) if request.param == "prefix" else lambda: with_head(load_tiny(tiny_folder))
    )


def test_the_head_reads_the_same_features_and_leaves_the_loss_of_captions(made, folder):
    loaded = made()
    model, data = loaded.model.eval(), images_of(loaded)["train"]
    images = loaded.normalise(torch.from_numpy(data.pixels[:3]))
    text = loaded.caption.collate(data.captions[:3])
    concepts = wanted(data, range(3))
    alone, both = model(images, text), model(images, text, concepts=concepts)
    assert torch.equal(alone.caption, both.caption)
    assert alone.concepts is None
    given = torch.nn.BCEWithLogitsLoss()(model.head(model.image_features(images)), concepts)
    torch.testing.assert_close(both.concepts, 3 * given)
    assert {model.part_of(name) for name, _ in model.named_parameters() if name.startswith("head")} == {
        "connector"
    }


@pytest.mark.slow
def test_a_tiny_weight_trains_the_head_and_leaves_captions_as_they_are(made, tmp_path):
    """Equal to the bit: losses of captions at each step, and validations, with and without the head."""
    base = {"max_grad_norm": 0.0, "learning_rate": 1e-4}
    found = []
    for weight in (0, 1e-25):
        settings = config(stages=[{"epochs": 2, "losses": {"caption": 1, "concepts": weight}}], **base)
        found.append(run(made, settings, tmp_path / str(weight), by="caption"))
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one.get("caption_loss") == other.get("caption_loss")
        assert one.get("valid_loss") == other.get("valid_loss")
        assert "concepts_loss" not in one
        assert ("caption_loss" in other) == ("concepts_loss" in other)
    settings = config(stages=[{"epochs": 2, "losses": {"caption": 1, "concepts": 0.1}}])
    run(made, settings, tmp_path / "real", by="caption")
    kept = load_file(tmp_path / "real" / training.BEST)
    assert not torch.equal(kept["head.linear.weight"], made().model.head.linear.weight)


@pytest.mark.parametrize("losses", [("caption",), ("concepts",), ("caption", "concepts")])
def test_what_a_stage_does_not_train_is_frozen(made, losses):
    loaded = made()
    model, data = loaded.model.train(), images_of(loaded)["train"]
    model.freeze(losses)
    images = loaded.normalise(torch.from_numpy(data.pixels[:3]))
    text = loaded.caption.collate(data.captions[:3]) if "caption" in losses else None
    concepts = wanted(data, range(3)) if "concepts" in losses else None
    computed = model(images, text, concepts=concepts)
    sum(loss for loss in computed if loss is not None).backward()
    meant = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == meant
    assert any(name.startswith("head.") for name in meant) == ("concepts" in losses)


def test_without_a_language_model_the_head_trains_the_last_queries(tiny_folder):
    loaded = with_head(load_tiny(tiny_folder, language_model=False))
    model, data = loaded.model.train(), images_of(loaded)["train"]
    images = loaded.normalise(torch.from_numpy(data.pixels[:3]))
    for losses in (["concepts"], ["caption", "concepts"]):
        model.zero_grad()
        model.freeze(losses)
        text = loaded.caption.collate(data.captions[:3]) if "caption" in losses else None
        computed = model(images, text, concepts=wanted(data, range(3)))
        sum(loss for loss in computed if loss is not None).backward()
        meant = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert {name for name, weight in model.named_parameters() if weight.grad is not None} == meant
        assert any("output_query" in name and "layer.1" in name for name in meant)


BESIDE = TRAIN | {
    "stages": [
        {"epochs": 2, "losses": {"caption": 1, "concept": 1, "concepts": 0.1}},
        {"epochs": 1, "losses": {"caption": 1}},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_on_two_ranks_is_plain_training_on_one(tiny_folder, tmp_path, zero_stage):
    """And two ranks that are killed go on to the same bits."""
    labelled = {"head": {"pooling": "gem"}}
    train(tiny_folder, tmp_path / "one", 1, train=BESIDE, **labelled)
    how = BESIDE | {"zero_stage": zero_stage, "checkpoint_every_steps": 2}
    train(tiny_folder, tmp_path / "two", train=how, **labelled)
    assert train(tiny_folder, tmp_path / "cut", check=False, train=how, kill_at=5, **labelled) != 0
    train(tiny_folder, tmp_path / "cut", train=how, **labelled)
    assert rows(tmp_path / "cut") == rows(tmp_path / "two")
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    weights = [load_file(tmp_path / name / "final.safetensors") for name in ("one", "two", "cut")]
    assert {"head.linear.weight", "head.pool.exponent"} <= weights[0].keys()
    torch.testing.assert_close(
        weights[0]["head.linear.weight"], weights[1]["head.linear.weight"], rtol=0, atol=1e-4
    )
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])


# validation


def test_the_f1_of_a_validation_is_the_best_of_all_thresholds():
    draw = np.random.default_rng(3)
    given = draw.random((12, 4)).astype(np.float32) ** 2
    given[0] = 0.01  # below every good threshold
    names = ["C1", "C2", "C3", "C4"]
    references = [set(draw.choice([*names, "C9"], draw.integers(0, 4), replace=False)) for _ in range(12)]

    def at(threshold):
        scores = []
        for row, wanted in zip(given, references, strict=True):
            said = {name for name, value in zip(names, row, strict=True) if value > threshold}
            said = said or {names[int(row.argmax())]}
            scores.append(f1(said, wanted))
        return np.mean(scores)

    best = max(at(threshold) for threshold in [*given.flatten(), 0, 0.999])
    assert best_f1(given, names, references) == pytest.approx(best, abs=1e-12)


# before a run


def said(model: ModelConfig, settings=ALONE, captions=False) -> list[str]:
    return [str(one) for one in problems(model, settings, captions=captions)]


@pytest.mark.ci
def test_every_mistake_is_told_before_a_run(folder, tiny_folder):
    assert said(model_config(folder)) == []
    others = {"checkpoint": "a/blip2", "language_checkpoint": "gpt2", "prompt": "an image of"}
    keys = {one.partition(":")[0] for one in said(model_config(folder, **others))}
    assert keys == {f"model.{key}" for key in others}
    assert said(model_config(folder, lora={}))[0].startswith("model.lora.parts: family encoder has no lang")
    (size,) = said(model_config(folder).model_copy(update={"image_size": 60}))
    assert "60 is not a multiple of 8" in size
    (lacking,) = said(ModelConfig(family="encoder"))
    assert lacking.startswith("model.vision_checkpoint: family encoder needs it")
    (words,) = said(model_config(folder, "gpt2"))
    assert "which is no image encoder" in words
    (captions,) = said(model_config(folder), captions=True)
    assert captions == "model.family: the family encoder writes no captions; it predicts concepts"
    whole = ALONE.model_copy(update={"train_language": True, "language_dropout": 0.1})
    assert len(said(model_config(folder), whole)) == 2
    texts = ALONE.model_copy(update={"stages": TrainConfig().stages[:1]})
    aim, *others = said(model_config(folder), texts)
    assert aim.startswith("train.stages: no stage has the loss concepts")
    kinds = [one.rpartition("no loss ")[2] for one in others]
    assert kinds == ["caption; concepts are allowed", "concept; concepts are allowed"]
    assert said(model_config(folder), ALONE.model_copy(update={"stages": ()})) == []
    vlm = ModelConfig(family="vlm", checkpoint=str(tiny_folder))
    assert any("the family vlm has no loss concepts" in one for one in said(vlm))


@pytest.mark.slow
def test_the_forecast_counts_the_encoder_and_a_head(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_config(folder)
    found = classifier(folder).model
    own = sum(weight.numel() for name, weight in found.named_parameters() if parts.changes(found, name))
    shape = family(model).shape(model, ALONE)
    assert shape.trained(True) == own + (LABELS - len(HEAD[0])) * (found.feature_width + 1)
    less = ALONE.model_copy(update={"train_vision": False})
    assert family(model).shape(model, less).trained(False) == LABELS * (found.feature_width + 1)
    work = Work(4, 0, False, False, False, captions=False, concepts=False, labels=LABELS)
    assert shape.flops(work) > 4 * 3 * 2 * LABELS * found.feature_width
    build = partial(shape._built, ALONE)
    peak = contentless.step(build, shape.pixels, work, 1, False)["peak"]
    assert peak == pytest.approx(allocated(build(), partial(shape.pixels, 4)), rel=0.1)
    assert (
        family(model.model_copy(update={"vision_checkpoint": "/nowhere"})).shape(
            model.model_copy(update={"vision_checkpoint": "/nowhere"}), ALONE
        )
        is None
    )


def allocated(model, images) -> int:
    """The most bytes that torch's allocator gave at once in a step with real tensors."""
    model.use_plain_attention()
    model.freeze(["concepts"])
    model.train()
    for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        model(images(), concepts=torch.zeros(4, LABELS, dtype=torch.uint8)).concepts.backward()
    events = seen.profiler.kineto_results.events()
    now = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        most = max(most, now)
    return most


# runs

BESIDE_RUNS = EXPERIMENT.partition("variants:")[0].replace("name: small", "name: beside")
STAGES = "stages: [{epochs: 2, losses: {caption: 1, concepts: 0.1}}]"
RUNS = f"""
variants:
  alone: {{train: {{keep_best: 2}}}}
  both: {{train: {{keep_best: 2, {STAGES}}}, concepts: {{head: {{class_weights: balanced}}}}}}
  later:
    train: {{start_from: beside/both-s42, stages: [{{epochs: 1, losses: {{caption: 1}}}}]}}
"""
SOUP = f"""
variants:
  soup:
    train: {{{STAGES}}}
    concepts: {{head: {{class_weights: balanced}}}}
    soup: {{runs: [beside/both-s42]}}
"""
OTHER_LABELS = (
    f"""
variants:
  started:
    train: {{start_from: beside/both-s42, {STAGES}}}
    concepts: {{min_images: 20}}
""",
    f"""
variants:
  averaged:
    train: {{{STAGES}}}
    concepts: {{min_images: 20}}
    soup: {{runs: [beside/both-s42]}}
""",
)


@pytest.mark.slow
def test_runs_with_concepts_beside_captions(tmp_path, empty_store):
    """They are scored, averaged, started from and exported; only weights for the same concepts are mixed."""
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    for name, runs in (("beside", RUNS), ("soup", SOUP)):
        (tmp_path / f"{name}.yaml").write_text(BESIDE_RUNS + runs)
        harness(tmp_path, "run", f"{name}.yaml")
    records = {name: json.loads((tmp_path / f"runs/beside/{name}-s42/run.json").read_text()) for name in KEPT}
    assert {record["status"] for record in records.values()} == {"FINISHED"}
    logs = {
        name: [
            json.loads(line)
            for line in (tmp_path / "runs" / record["steps"]["train"] / "losses.jsonl").open()
        ]
        for name, record in records.items()
        if "train" in record["steps"]
    }
    for row in logs["both"]:
        if "valid_loss" in row:
            assert 0 < row["valid_concept_f1"] <= 1
            assert row["valid_primary"] == row["valid_bertscore"]
    assert not any("concept_f1" in key for row in logs["alone"] + logs["later"] for key in row)
    assert records["both"]["concepts"]["scores"]["valid"]["f1"]["value"] > 0
    assert "head" in records["both"]["training"]["new"]
    weights = {name: load_file(tmp_path / "runs" / steps(records[name]) / training.BEST) for name in KEPT}
    assert {name for name, own in weights.items() if "head.linear.weight" in own} == {"both", "soup"}
    harness(tmp_path, "export", "runs/beside/both-s42", "out")
    assert not any("head" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    for others in OTHER_LABELS:
        (tmp_path / "other.yaml").write_text(BESIDE_RUNS + others)
        done = harness(tmp_path, "run", "other.yaml", code=None)
        assert done.returncode
        assert "it has another labels" in " ".join(done.stderr.split())


KEPT = ("alone", "both", "soup", "later")


def steps(record: dict) -> str:
    """The step with the weights of a run."""
    return record["steps"].get("soup") or record["steps"]["train"]
