"""Family `prefix`: an image encoder, a connector, and a causal language model, against transformers' own."""

import json
import shutil
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import prefix as small
from support.commands import harness
from support.models import TEXTS, pixels
from support.shared_folders import made_once
from support.training import Interrupted, splits
from transformers import AutoConfig, AutoModel, CLIPVisionModel, LevitConfig, LevitModel

from harness.config.sections import AugmentConfig, PredictConfig
from harness.decoding.search import search
from harness.errors import UserError
from harness.machine import device
from harness.models import adapters, parts, problems, tiny
from harness.models.base import Samples
from harness.models.loading import Loaded, load_trained, save_trained, trained_weights
from harness.models.prefix import export, load, shape
from harness.models.settings import ModelConfig, TinyConfig
from harness.training import train
from harness.training.settings import TrainConfig

device.probe("cpu")
SCALED = ("clip", "granite")
PAIRS = [("clip", "gpt2"), ("convnext", "llama"), ("cvt", "qwen2"), ("clip", "opt")]
TRAIN = TrainConfig(
    batch_size=4,
    micro_batch_size=2,
    learning_rate=1e-2,
    warmup_steps=0,
    precision="fp32",
    language_dropout=0,
    max_caption_tokens=60,
    stages=[{"epochs": 1, "losses": {"caption": 1}}],
)
SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "prefix", small.build)


def model_config(folder: Path, vision: str = "clip", language: str = "gpt2", **changes) -> ModelConfig:
    named = {"vision_checkpoint": str(folder / vision), "language_checkpoint": str(folder / language)}
    return ModelConfig(family="prefix", image_size=SIZE, **named, **changes)


def loaded(folder: Path, vision: str = "clip", language: str = "gpt2", train=TRAIN, **changes) -> Loaded:
    return load(model_config(folder, vision, language, **changes), train, None, torch.float32)


def batch(found: Loaded, count: int = 3):
    """Images and captions of different lengths, as the model takes them."""
    texts = [found.caption.encode(TEXTS[i][1]) for i in range(count)]
    return found.normalise(torch.from_numpy(pixels(count, SIZE))), found.caption.collate(texts)


def prefix(found: Loaded, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What the language model reads: the image's embeddings, then those of the ids."""
    words = found.model.language.get_input_embeddings()(ids)
    return torch.cat([found.model.connector(found.model.vision(images)), words], 1)


@pytest.mark.parametrize(("vision", "language"), [*PAIRS, SCALED])
@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_generate(folder, vision, language, beams):
    found = loaded(folder, vision, language)
    model, codec = found.model.eval(), found.caption
    images, _ = batch(found)
    options = PredictConfig(
        num_beams=beams, max_new_tokens=20, min_new_tokens=0, no_repeat_ngram_size=3, repetition_penalty=1.2
    )
    prompts = torch.tensor(codec.prompt).expand(len(images), -1)
    with model.decoder(beams, 20) as begin:
        ours = search(begin(images, prompts), options, codec.end, codec.pad).ids[:, 0]
    embeds = prefix(found, images, prompts)
    theirs = model.language.generate(
        inputs_embeds=embeds,
        attention_mask=embeds.new_ones(embeds.shape[:2], dtype=torch.long),
        num_beams=beams,
        max_new_tokens=20,
        no_repeat_ngram_size=3,
        repetition_penalty=1.2,
        do_sample=False,
        eos_token_id=codec.end,
        pad_token_id=codec.pad,
    )
    assert len({tuple(row) for row in theirs.tolist()}) > 1
    assert [codec.decode(row) for row in ours.tolist()] == [codec.decode(row) for row in theirs.tolist()]


@pytest.mark.parametrize(("vision", "language"), [*PAIRS, SCALED])
def test_the_loss_is_that_of_transformers(folder, vision, language):
    found = loaded(folder, vision, language)
    found.model.eval()
    images, text = batch(found)
    ours = found.model(images, text).caption
    embeds = prefix(found, images, text["ids"])
    before = embeds.shape[1] - text["ids"].shape[1]
    mask = torch.nn.functional.pad(text["mask"], (before, 0), value=1)
    labels = torch.nn.functional.pad(text["labels"], (before, 0), value=-100)
    theirs = found.model.language(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    count = (text["labels"] != -100).sum()
    torch.testing.assert_close(ours / count, theirs, rtol=1e-6, atol=1e-6)
    seen = {}
    again = Samples(text, lambda logits: seen.setdefault("logits", logits).sum())
    found.model(images, samples=again)
    assert seen["logits"].shape[:2] == text["ids"].shape


# the image encoder


def test_a_position_table_is_resized_as_transformers_does(folder):
    encoder = loaded(folder).model.eval().vision
    theirs = CLIPVisionModel.from_pretrained(folder / "clip").eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)
    assert encoder.tokens == (SIZE // 8) ** 2 + 1


def saved(tmp_path, kind: str, **values) -> dict[str, str]:
    """The key of an image encoder of this type with random weights, also in its tables of positions."""
    wide = small.LAYERS | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **wide | values))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "position" in name or weight.ndim > 1:
                weight.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    return {"vision_checkpoint": str(tmp_path)}


def test_distances_of_beit_are_resized_as_transformers_does(folder, tmp_path):
    """Those of the class token are the last rows of its table."""
    named = saved(tmp_path, "beit", use_relative_position_bias=True)
    config = model_config(folder).model_copy(update=named)
    encoder = load(config, TRAIN, None, torch.float32).model.eval().vision
    theirs, images = AutoModel.from_pretrained(tmp_path).eval(), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)


def test_checks_without_contents_leave_nothing_for_a_real_model(folder, tmp_path):
    """DINOv3 keeps the grid of an image's patches between calls."""
    config = model_config(folder).model_copy(update=saved(tmp_path, "dinov3_vit", num_register_tokens=2))
    assert problems(config, TRAIN) == []
    model = load(config, TRAIN, None, torch.float32).model.eval()
    features = model.image_features(torch.randn(1, 3, SIZE, SIZE))
    assert type(features) is torch.Tensor
    assert model.class_tokens == 3


def test_an_encoder_that_draws_at_random_is_refused(folder, tmp_path):
    decoder = {"decoder_hidden_size": 32, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    config = model_config(folder).model_copy(update=saved(tmp_path, "vit_mae", **decoder))
    with pytest.raises(UserError, match="ViTMAEModel draws at random"):
        load(config, TRAIN, None, torch.float32)


@pytest.mark.parametrize("kind", ["vit", "siglip_vision_model"])
def test_layers_that_nothing_reads_are_not_adapted(folder, tmp_path, kind):
    config = model_config(folder, lora={"rank": 2, "parts": ["vision"]})
    config = config.model_copy(update=saved(tmp_path, kind))
    found = load(config, TRAIN, None, torch.float32)
    found.model.freeze(["caption"])
    found.model(*batch(found)).caption.backward()
    for name, weight in found.model.named_parameters():
        assert weight.requires_grad == (weight.grad is not None), name


def test_feature_maps_become_tokens_row_by_row(folder):
    model = loaded(folder, "convnext", "llama").model.eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        maps = model.vision.model(images).last_hidden_state
        features = model.image_features(images)
    assert features.shape == (2, 4, 32)
    assert torch.equal(features[:, 1], maps[:, :, 0, 1])


def test_pooling_is_the_mean_of_each_part_of_the_image(folder):
    model = loaded(folder, connector={"kind": "pooled", "tokens": 8}).model.eval()
    features = torch.randn(2, 65, 32)
    pooled = model.connector[0](features)
    assert pooled.shape == (2, 8, 32)
    grid = features[:, 1:].unflatten(1, (8, 8))  # without the class token
    torch.testing.assert_close(pooled[:, 5], grid[:, 4:, 2:4].mean((1, 2)))
    assert loaded(folder, connector={"kind": "mlp"}).model.connector(features).shape == (2, 65, 32)


def test_an_image_does_not_depend_on_its_batch_while_training(folder):
    """Batch norms keep the statistics of the checkpoint, which are those of no batch here."""
    model = loaded(folder, "cvt", "qwen2").model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval().train()
    for module in model.modules():  # stochastic depth draws
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    images = torch.randn(3, 3, SIZE, SIZE)
    torch.testing.assert_close(model.vision(images)[:1], model.vision(images[:1]), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_pixels_are_normalised_as_the_encoder_wants_and_else_as_imagenet(folder):
    assert loaded(folder).mean == (0.1, 0.2, 0.3)
    assert loaded(folder, "cvt", "qwen2").mean == (0.485, 0.456, 0.406)


def test_a_tiny_encoder_is_built_from_images_and_their_concepts(folder, tmp_path):
    sizes = TinyConfig(patch_size=8, hidden_size=32, vision_layers=1, vision_epochs=1)
    concepts = np.eye(4)[[0, 1, 2, 3, 0, 1]]
    tiny.build_vision(sizes, pixels(6, SIZE), concepts, AugmentConfig(), tmp_path)
    config = model_config(folder, connector={"kind": "pooled", "tokens": 4})
    config = config.model_copy(update={"vision_checkpoint": "tiny", "tiny": sizes})
    assert problems(config, TRAIN) == []
    found = load(config, TRAIN, tmp_path, torch.float32)
    assert found.model.vision.width == 32
    assert found.mean[0] == pytest.approx(pixels(6, SIZE).mean() / 255, abs=1e-6)
    assert torch.isfinite(found.model(*batch(found)).caption)


# what trains


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@pytest.mark.parametrize("trained", [("vision",), ("language",), ("vision", "language"), ()])
def test_exactly_what_should_train_has_gradients_and_is_saved(folder, vision, language, trained, tmp_path):
    settings = TRAIN.model_copy(
        update={"train_vision": "vision" in trained, "train_language": "language" in trained}
    )
    found = loaded(folder, vision, language, settings)
    model = found.model.train()
    model.freeze(["caption"])
    images, text = batch(found)
    model(images, text).caption.backward()
    meant = {name for name, weight in model.named_parameters() if weight.requires_grad}
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert moved == meant
    assert {model.part_of(name) for name in moved} == {"connector", *trained}
    assert set(trained_weights(model)) == meant
    left = {
        name
        for name, weight in model.named_parameters()
        if model.part_of(name) in trained and not weight.requires_grad
    }
    assert all("layernorm" in name for name in left)  # of the pooled output


def test_adapters_train_instead_of_the_parts_that_they_are_in(folder, tmp_path):
    lora = {"rank": 2, "parts": ("language", "vision"), "dropout": 0.0}
    found = loaded(folder, lora=lora)
    model = found.model
    model.freeze(["caption"])
    images, text = batch(found)
    model.eval()(images, text).caption.backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert moved == {name for name in dict(model.named_parameters()) if parts.changes(model, name)}
    assert {model.part_of(name) for name in moved if parts.is_adapter(name)} == {"vision", "language"}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in moved:
                weight.normal_(std=0.1)
    save_trained(model, tmp_path / "best.safetensors")
    again = loaded(folder, lora=lora).model.eval()
    load_trained(again, tmp_path / "best.safetensors")
    with torch.no_grad():
        adapted = again(images, text).caption
        assert torch.equal(adapted, model(images, text).caption)
    adapters.merge(model)
    named = {key: tmp_path / "out" / place for key, place in export(found, tmp_path / "out").items()}
    between = {"checkpoint": str(named.pop("connector.checkpoint"))}
    changes = {key: str(place) for key, place in named.items()}
    config = ModelConfig(family="prefix", image_size=SIZE, connector=between, **changes)
    assert problems(config, TrainConfig(stages=[])) == []
    other = load(config, TRAIN, None, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(other.model.eval()(images, text).caption, adapted, rtol=1e-5, atol=1e-5)
    assert (other.new, other.mean) == ((), found.mean)


def test_half_precision_is_for_what_never_trains(folder):
    for language, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        found = loaded(folder, train=TRAIN.model_copy(update={"train_language": language}))
        found.model.compute_in(torch.bfloat16, False)
        kinds = {name: weight.dtype for name, weight in found.model.named_parameters()}
        assert {kinds[name] for name in kinds if name.startswith("language.")} == {dtype}
        assert {kinds[name] for name in kinds if not name.startswith("language.")} == {torch.float32}
        assert torch.isfinite(found.model(*batch(found)).caption)


@pytest.mark.ci
def test_recomputed_layers_and_plain_attention_give_the_same_gradients(folder):
    found = []
    for vision, language in PAIRS[:3]:
        for changed in (False, True):
            one = loaded(folder, vision, language, TRAIN.model_copy(update={"train_language": True}))
            if changed:
                one.model.use_plain_attention()
                one.model.gradient_checkpointing_enable({"use_reentrant": False})
            one.model.freeze(["caption"])
            torch.manual_seed(1)
            one.model.train()(*batch(one)).caption.backward()
            found.append(one.model.connector[1].weight.grad)
        torch.testing.assert_close(found[-1], found[-2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("zero_stage", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
@pytest.mark.slow
def test_training_goes_on_to_the_bit(zero_stage, folder, tmp_path):
    """Interrupted within the second of two stages; all parts train at rates of their own, with dropout."""
    rates = {"vision": 1e-4, "language": 1e-3}
    settings = TRAIN.model_validate(
        TRAIN.model_dump()
        | {"train_language": True, "language_dropout": 0.1, "learning_rates": rates, "ema": 0.9}
        | {"stages": [{"epochs": 1, "losses": {"caption": 1}}] * 2, "zero_stage": zero_stage}
        | {"checkpoint_every_steps": 1}
    )

    scores = {"whole": count(), "cut": count()}  # better at each validation

    def run(name, log=lambda row: None):
        def make():
            return loaded(folder, "cvt", "gpt2", settings)

        (tmp_path / name).mkdir(exist_ok=True)
        given = ("cpu", 42, tmp_path / name, log, lambda _: {"valid_primary": float(next(scores[name]))})
        return train.Training(settings, AugmentConfig(), make, splits(make()), *given).run().model

    def stop(row):
        if row["step"] == 8 and "loss" in row:
            raise Interrupted

    whole = run("whole").state_dict()
    with pytest.raises(Interrupted):
        run("cut", stop)
    again = run("cut").state_dict()
    assert all(torch.equal(weight, whole[name]) for name, weight in again.items())


class Renamed(torch.nn.Module):
    """An image encoder whose weights have other names, as CLIP's in another version of transformers."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images)

    def set_attn_implementation(self, name):
        self.inner.set_attn_implementation(name)


@pytest.mark.parametrize("again", ["resumed", "loaded"])
def test_weights_of_other_names_are_refused(folder, tmp_path, again):
    """DeepSpeed passes over names that a model lacks, so the stage's start is compared before."""
    settings = TRAIN.model_copy(update={"checkpoint_every_steps": 1})

    def run(renamed, log=lambda row: None):
        def make():
            found = loaded(folder, train=settings)
            if renamed:
                found.model.vision.model = Renamed(found.model.vision.model)
            return found

        given = ("cpu", 42, tmp_path, log, lambda _: {"valid_primary": 1.0})
        return train.Training(settings, AugmentConfig(), make, splits(make()), *given).run().model

    def stop(row):
        if row["step"] == 3 and "loss" in row:
            raise Interrupted

    if again == "resumed":
        with pytest.raises(Interrupted):
            run(False, stop)
    else:
        run(False)
    with pytest.raises(UserError, match=r"other weights than the model: vision\.model\."):
        run(True)


@pytest.mark.ci
def test_the_forecast_counts_what_trains_without_weights(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for vision, language in PAIRS[:2]:
        config = model_config(folder, vision, language, lora={"rank": 2})
        model = load(config, TRAIN, None, torch.float32).model
        counted = sum(w.numel() for name, w in model.named_parameters() if parts.changes(model, name))
        assert shape(config, TRAIN).trained(True) == counted
    assert shape(config.model_copy(update={"vision_checkpoint": "/nowhere"}), TRAIN) is None


# mistakes


def said(folder: Path, train: dict | None = None, new_tokens: int = 0, **values) -> list[str]:
    config = ModelConfig.model_validate(model_config(folder).model_dump() | values)
    found = problems(config, TRAIN.model_copy(update=train or {}), new_tokens)
    return [f"{one} {one.hint}" for one in found]


def test_every_mistake_is_told_at_once_before_a_run(folder):
    nothing = {"vision_checkpoint": "/nowhere", "language_checkpoint": None, "checkpoint": "a/blip2"}
    first, second, third = said(folder, **nothing)
    assert first.startswith("model.checkpoint: family prefix does not read it")
    assert second.startswith("model.vision_checkpoint: no such folder: /nowhere")
    assert third.startswith("model.language_checkpoint: family prefix needs it")
    swapped = {"vision_checkpoint": str(folder / "gpt2"), "language_checkpoint": str(folder / "clip")}
    vision, language = said(folder, **swapped)
    assert "holds a model of type gpt2, which is no image encoder" in vision
    assert "holds CLIPVisionModel, which is no causal language model" in language
    (size,) = said(folder, image_size=60)
    assert "60 is not a multiple of 8" in size
    assert "Use 56 or 64." in size
    (loss,) = said(folder, {"stages": _concepts()})
    assert "no loss concept" in loss
    dropout, *_ = said(folder, {"dropout": 0.1})
    assert dropout.startswith("train.dropout: it is for a Q-Former")
    assert said(folder) == []


@pytest.mark.ci
def test_what_would_fail_hours_later_is_told_before(folder, tmp_path):
    """Sizes, tokens and names of layers are known from configs and tokenizers, without weights."""
    (longer,) = said(folder, {"max_caption_tokens": 250})
    assert "train.max_caption_tokens: image and prompt have 76 tokens, and 250 follow" in longer
    assert "predict.max_new_tokens: " in said(folder, new_tokens=200)[0]
    pooled = {"kind": "pooled", "tokens": 4}
    assert said(folder, new_tokens=200, connector=pooled) == []
    stage = {"losses": {"reward": 1}, "reward": {"metrics": {"rouge1": 1}, "max_new_tokens": 240}}
    rewarded = TrainConfig.model_validate({"stages": [{"epochs": 1} | stage]}).stages
    assert "train.stages.0.reward.max_new_tokens: " in said(folder, {"stages": rewarded})[0]
    (layers,) = said(folder, lora={"rank": 2, "targets": ["q_proj"]})
    assert "model.lora.targets: no layer of language is named q_proj These parts have layers" in layers
    convnext = {"vision_checkpoint": str(folder / "convnext"), "image_size": 16}
    assert "ConvNextModel can't encode images of 16 pixels" in said(folder, **convnext)[0]
    other = loaded(folder, "cvt", "gpt2")
    export(other, tmp_path)
    (connector,) = said(folder, connector={"kind": "mlp", "checkpoint": str(tmp_path / "connector")})
    assert "has the weights of another connector" in connector


@pytest.mark.ci
def test_a_table_that_depends_on_the_size_of_images_is_told_before(folder, tmp_path):
    """LeViT's distances between patches are a table for one size."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [16] * 3, "depths": [1] * 3, "num_attention_heads": [1] * 3, "key_dim": [4] * 3}
    LevitModel(LevitConfig(**sizes, image_size=64)).save_pretrained(tmp_path)
    given = {"vision_checkpoint": str(tmp_path)}
    assert said(folder, **given) == []
    (found,) = said(folder, **given, image_size=128)
    assert "weights of this encoder depend on the size of images" in found


def test_a_model_that_transformers_does_not_know_is_told_before(folder, tmp_path):
    new = tmp_path / "new"
    shutil.copytree(folder / "gpt2", new)
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps(config | {"model_type": "gpt9"}))
    (found,) = said(folder, language_checkpoint=str(new))
    assert f"model.language_checkpoint: the config of {new} can't be loaded: ValueError" in found
    assert f"this one is {version('transformers')}" in found


def test_a_folder_of_llama_cpp_gets_the_command_that_converts_it(folder, tmp_path):
    (tmp_path / "small.Q4.gguf").touch()
    (problem,) = said(folder, language_checkpoint=str(tmp_path))
    assert "has no weights that transformers reads, but small.Q4.gguf" in problem
    assert f"'{tmp_path}', 'gguf_file': 'small.Q4.gguf'}}; t.AutoModelForCausalLM" in problem
    assert "save_pretrained('small.Q4', legacy_format=False)" in problem


def _concepts():
    return TrainConfig(stages=[{"epochs": 1, "losses": {"concept": 1}}]).stages


def test_an_image_of_too_many_tokens_is_refused_by_name(folder):
    with pytest.raises(UserError, match="the language model reads 256"):
        loaded(folder, train=TRAIN.model_copy(update={"max_caption_tokens": 250}))
    found = loaded(folder)
    images, _ = batch(found)
    prompts = torch.tensor(found.caption.prompt).expand(3, -1)
    with found.model.decoder(1, 250) as begin, pytest.raises(UserError, match="max_new_tokens"):
        begin(images, prompts)


def test_an_encoder_that_cannot_read_so_small_images_says_so(folder):
    config = model_config(folder, "convnext").model_copy(update={"image_size": 16})
    with pytest.raises(UserError, match="ConvNextModel can't encode images of 16 pixels"):
        load(config, TRAIN, None, torch.float32)


def test_weights_that_a_checkpoint_lacks_are_named(folder, tmp_path):
    from safetensors.torch import save_file

    place = tmp_path / "clip"
    place.mkdir()
    weights = load_file(folder / "clip" / "model.safetensors")
    lacking = "encoder.layers.1.mlp.fc1.weight"
    kept = {name: weight for name, weight in weights.items() if not name.endswith(lacking)}
    assert len(kept) == len(weights) - 1
    save_file(kept, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_bytes((folder / "clip" / "config.json").read_bytes())
    with pytest.raises(UserError, match=lacking):
        load(
            model_config(folder).model_copy(update={"vision_checkpoint": str(place)}),
            TRAIN,
            None,
            torch.float32,
        )


# a run


@pytest.mark.slow
def test_a_run_trains_two_stages_captions_and_is_marked(folder, tmp_path, empty_store):
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    (tmp_path / "prefix.yaml").write_text(small.EXPERIMENT.replace("LANGUAGE", str(folder / "llama")))
    done = harness(tmp_path, "run", "prefix.yaml")
    assert "connector: new, so not in any checkpoint" in done.stderr
    assert "stage 1 trains vision" in done.stderr
    record = json.loads((tmp_path / "runs/prefix/base-s42/run.json").read_text())
    assert record["status"] == "FINISHED"
    assert record["standin_model"]  # its image encoder is built here
    assert record["training"]["new"] == "connector"
    weights = load_file(tmp_path / "runs" / record["steps"]["train"] / "best.safetensors")
    assert all(".lora_" in name for name in weights if name.startswith("language."))
    assert list((tmp_path / "submissions/prefix/base-s42").rglob("*.csv"))
