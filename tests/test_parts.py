"""Parts of a captioner: other language models, adapters, what trains at which rate, and what is saved."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import language_models
from support.commands import harness
from support.experiments import EXPERIMENT
from support.generate import generated
from support.models import SIZES, batch, pixels, stages
from support.training import Interrupted, config, run
from transformers import Blip2ForConditionalGeneration

from harness import records
from harness.config.sections import PredictConfig
from harness.decoding import predict
from harness.errors import UserError
from harness.machine import device
from harness.models import adapters, blip2, family, loading, parts, problems
from harness.models.settings import ModelConfig
from harness.records.files import read_captions
from harness.training.engine import engine, release
from harness.training.settings import LearningRates, TrainConfig

device.probe("cpu")
KINDS = tuple(language_models.ARCHITECTURES)
TRAIN = TrainConfig(max_caption_tokens=32, dropout=0.0, precision="fp32")


@pytest.fixture(scope="module")
def speakers(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("speakers")
    return {kind: language_models.build(kind, tiny_folder, root / kind) for kind in KINDS}


@pytest.fixture
def load(tiny_folder, speakers):
    """A function from the kind of language model (None: the checkpoint's) to a loaded BLIP-2."""

    def loaded(kind=None, train=TRAIN, **values):
        name = str(speakers[kind]) if kind else None
        model = ModelConfig(
            checkpoint=str(tiny_folder), language_checkpoint=name, image_size=64, tiny=SIZES, **values
        )
        return family(model).load(model, train, tiny_folder, torch.float32)

    return loaded


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# another language model


@pytest.mark.parametrize("kind", KINDS)
def test_captions_of_another_language_model_are_those_of_generate(kind, load):
    loaded = load(kind)
    assert loaded.new == ("language_projection",)
    codec, images = loaded.caption, pixels(3)
    for beams in (1, 3):
        config = PredictConfig(num_beams=beams, max_new_tokens=12, min_new_tokens=3)
        found = predict.captions(loaded, images, range(3), config)
        given = {"num_beams": beams, "max_new_tokens": 12, "min_new_tokens": 3}
        seen = loaded.normalise(torch.from_numpy(images))
        _, ids = generated(loaded.model, seen, torch.tensor(codec.prompt), codec.end, codec.pad, **given)
        assert found == [codec.decode(row.tolist()) for row in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_another_language_model_is_its_own(kind, load):
    """The oracle: the model's loss for labels, of each caption alone and without padding."""
    loaded = load(kind)
    model, (images, captions, _) = loaded.model.eval(), batch(loaded)
    total = 0.0
    with torch.no_grad():
        for i in range(3):
            prefix = model.language_projection(model.see(images[i : i + 1])[0])
            length = int(captions["mask"][i].sum())
            ids, labels = (captions[key][i : i + 1, :length] for key in ("ids", "labels"))
            embeds = torch.cat([prefix, model.language_model.get_input_embeddings()(ids)], 1)
            ignored = torch.full(prefix.shape[:2], -100)
            given = {"inputs_embeds": embeds, "labels": torch.cat([ignored, labels], 1)}
            total += float(model.language_model(**given).loss) * int((labels[:, 1:] != -100).sum())
        assert float(model(images, captions).caption) == pytest.approx(total, rel=1e-5)


def test_the_end_is_the_tokenizers_and_only_captions_of_the_checkpoints_own_model_end_otherwise(load):
    own, other = load().caption, load("qwen2").caption
    assert other.end == other.tokenizer.eos_token_id
    assert own.decode([*own.tokenizer("a lung").input_ids, own.end]) == "a lung"


def test_new_weights_are_the_same_in_every_process_whatever_was_drawn_before(load):
    one = load("gpt2").model.language_projection.weight
    torch.rand(7)
    assert torch.equal(one, load("gpt2").model.language_projection.weight)


def test_what_cannot_be_is_said_before_a_run(tiny_folder, speakers):
    def said(train=TRAIN, **values):
        values = {"checkpoint": str(tiny_folder)} | values
        return [f"{one.key}: {one.what}" for one in problems(ModelConfig(**values), train)]

    gpt2 = str(speakers["gpt2"])
    assert said(language_checkpoint=gpt2) == []
    assert "model.language_checkpoint: no such folder: /nowhere" in said(language_checkpoint="/nowhere")
    (found,) = said(TrainConfig(stages=[]), language_checkpoint=gpt2)
    assert found == "train.stages: nothing is trained, but language_projection would be new and random"
    alone = {"language_model": False}
    assert "no language model is used" in said(language_checkpoint=gpt2, **alone)[0]
    assert "can't be adapted; use [vision]" in said(lora={}, **alone)[0]


def test_fingerprints_from_before_are_those_of_a_model_without_the_new_keys():
    model = ModelConfig(checkpoint="a/model")
    assert not {"lora", "language_checkpoint"} & blip2.settings(model).keys()
    adapted = ModelConfig(checkpoint="a/model", lora={})
    assert blip2.settings(adapted)["lora"]["rank"] == 16


# what trains


def test_each_part_trains_if_and_only_if_it_is_meant_to(load):
    for vision in (True, False):
        for language in (True, False):
            train = TRAIN.model_copy(update={"train_vision": vision, "train_language": language})
            model = load("llama", train).model
            model.freeze(["caption", "concept"])
            found = {model.part_of(name) for name in trained_names(model)}
            wanted = {"connector", *(["vision"] * vision), *(["language"] * language)}
            assert found == wanted
            saved = {model.part_of(name) for name in loading.trained_weights(model)}
            assert saved == wanted
            counts = parts.counts(model)
            assert {part for part, count in counts.items() if count.trained == count.total} == wanted


def test_weights_of_a_run_that_trained_other_parts_are_not_averaged(load, tmp_path):
    whole, frozen = load().model, load(train=TRAIN.model_copy(update={"train_vision": False})).model
    loading.save_trained(whole, tmp_path / "whole.safetensors")
    with pytest.raises(UserError) as caught:
        loading.load_average(frozen, [tmp_path / "whole.safetensors"])
    (problem,) = caught.value.problems
    assert "other weights than this run trains: vision_model." in problem.what
    assert "train.train_vision" in problem.hint


@pytest.mark.parametrize("adapted", [("language",), ("vision",), ("language", "vision")])
def test_an_adapted_part_trains_its_adapters_alone(adapted, load):
    model = load("qwen2", TRAIN, lora={"rank": 2, "parts": adapted}).model
    model.freeze(["caption", "concept"])
    trained = trained_names(model)
    assert {model.part_of(name) for name in trained if parts.is_adapter(name)} == set(adapted)
    plain = {model.part_of(name) for name in trained if not parts.is_adapter(name)}
    assert plain == {"connector", "vision"} - set(adapted)
    (images, captions, concepts), model = batch(load()), model.train()
    sum(model(images, captions, concepts)[:2]).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_the_learning_rate_of_a_part_is_its_own_multiple(load, tmp_path):
    rates = LearningRates(vision=1e-6, language=3e-4)
    config = TRAIN.model_copy(update={"learning_rate": 1e-4, "learning_rates": rates, "train_language": True})
    model = load("gpt2", config).model
    model.freeze(["caption", "concept"])
    trainer = engine(model, config, "cpu", tmp_path)
    try:
        found = {}
        for group in trainer.optimizer.param_groups:
            for weight in group["params"]:
                found[weight] = (round(group["factor"], 6), group["weight_decay"])
        wanted = {"vision": 0.01, "connector": 1.0, "language": 3.0}
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                decay = config.weight_decay if weight.ndim > 1 else 0.0
                assert found[weight] == (wanted[model.part_of(name)], decay), name
    finally:
        release(trainer)


# adapters


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_change_nothing_at_first_and_merged_ones_give_the_same_logits(kind, load, tmp_path):
    plain = load(kind)
    loaded = load(kind, lora={"rank": 2, "dropout": 0.0})
    images, captions, _ = batch(loaded)
    with torch.no_grad():
        assert torch.equal(plain.model(images, captions).caption, loaded.model(images, captions).caption)
        for name, weight in loaded.model.named_parameters():
            if parts.is_adapter(name):
                weight.normal_(std=0.3)
        adapted = loaded.model(images, captions).caption
    assert abs(adapted - plain.model(images, captions).caption) > 0.1
    loading.save_trained(loaded.model, tmp_path / "best.safetensors")
    saved = load_file(tmp_path / "best.safetensors")
    assert not any("language_model" in name and not parts.is_adapter(name) for name in saved)
    again = load(kind, lora={"rank": 2, "dropout": 0.0})
    loading.load_trained(again.model, tmp_path / "best.safetensors")
    with torch.no_grad():
        assert torch.equal(again.model(images, captions).caption, adapted)
        adapters.merge(again.model)
        assert not any(parts.is_adapter(name) for name in again.model.state_dict())
        merged = again.model(images, captions).caption
    assert float(merged) == pytest.approx(float(adapted), rel=1e-5)
    assert again.model.state_dict().keys() == plain.model.state_dict().keys()


def test_an_adapter_is_that_of_peft(load):
    """The oracle: peft's own `get_peft_model` with the same settings on the same language model."""
    import peft

    model = load("llama", lora={"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}).model
    theirs = load("llama").model.language_model
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(theirs, settings)
    ours = {name.removeprefix("language_model."): w for name, w in model.state_dict().items()}
    for name, weight in theirs.state_dict().items():
        own = ours[name.removeprefix("base_model.model.")]
        assert own.shape == weight.shape
        weight.copy_(own)
        if "lora_B" in name:
            own.fill_(0.1), weight.fill_(0.1)
    ids = torch.tensor([[3, 9, 27, 4]])
    with torch.no_grad():
        assert torch.allclose(model.language_model(ids).logits, theirs(ids).logits, atol=1e-6)


def test_a_target_that_no_layer_has_is_refused_with_those_that_are_there(load):
    with pytest.raises(UserError) as caught:
        load("gpt2", lora={"targets": ["q_proj"]})
    (problem,) = caught.value.problems
    assert problem.key == "model.lora.targets"
    assert "no layer of language is named q_proj" in problem.what
    assert "c_attn, c_fc, c_proj" in problem.hint


def test_default_targets_leave_out_the_head_and_the_embeddings(load):
    for kind in KINDS:
        model = load(kind, lora={"parts": ["language", "vision"]}).model
        adapted = {name.partition(".lora_")[0] for name in model.state_dict() if parts.is_adapter(name)}
        names = {name.rpartition(".")[2] for name in adapted}
        assert not names & {"lm_head", "embed_tokens", "wte", "patch_embedding"}
        assert len(names) > 4


@pytest.mark.parametrize(
    "zero_stage",
    [
        pytest.param(0, marks=pytest.mark.ci),
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3)),
    ],
)
def test_adapters_train_in_two_stages_and_go_on_to_the_bit(zero_stage, tiny_folder, load, tmp_path):
    """Interrupted within the second stage, with an average of the weights, and two learning rates."""
    settings = config(
        zero_stage=zero_stage, stages=stages(1, 2), ema=0.9, learning_rates={"connector": 1e-4}, dropout=0.0
    )
    lora = {"rank": 2, "parts": ("language", "vision")}

    def loader():
        return load("llama", settings, lora=lora)

    def stop(row):
        if row["step"] == 5 and "loss" in row:
            raise Interrupted

    whole, _ = run(tiny_folder, tmp_path / "whole", settings, load=loader, evaluate=rising())
    with pytest.raises(Interrupted):
        run(tiny_folder, tmp_path / "cut", settings, load=loader, log=stop, evaluate=rising())
    again, _ = run(tiny_folder, tmp_path / "cut", settings, load=loader, evaluate=rising(1))
    before, after = (dict(model.named_parameters()) for model in (loader().model, whole.model))
    for name, weight in again.model.named_parameters():
        assert torch.equal(weight, after[name]), name
        if not whole.model.is_saved(name):
            assert torch.equal(weight, before[name]), name
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {whole.model.part_of(name) for name in changed} == {"vision", "connector", "language"}
    assert all(parts.is_adapter(name) for name in changed if whole.model.part_of(name) != "connector")
    assert (tmp_path / "whole" / "best.safetensors").stat().st_size < 1.5e6


def rising(first=0):
    """A validation whose score is always better than before."""
    scores = iter(range(first, 100))
    return lambda: {"valid_primary": float(next(scores))}


# export


@pytest.mark.ci
def test_an_exported_run_is_a_checkpoint_that_captions_alike(small_run, tmp_path, empty_store):
    """Another run captions by the exported checkpoint as it is."""
    place, folder = tmp_path / "project", tmp_path / "exported"
    shutil.copytree(small_run / "kept", place)
    (place / "mlflow.db").write_bytes(empty_store)
    run = place / "runs" / "small" / "opt-s42"
    assert f"--set model.checkpoint={folder}" in harness(place, "export", run, folder).stdout
    assert "exists and is not an empty folder" in harness(place, "export", run, folder, code=2).stderr
    _, info = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    changes = {"checkpoint: tiny": f"checkpoint: {folder}", "name: small": "name: as_is"}
    experiment = EXPERIMENT.partition("variants:")[0]
    for old, new in changes.items():
        experiment = experiment.replace(old, new)
    (place / "as_is.yaml").write_text(experiment)
    said = harness(place, "run", "as_is.yaml", "--set", "train.stages=[]").stdout
    assert "STAND-IN model" in said
    (other,) = (place / "runs" / "as_is").glob("*-s42")
    files = [captions(records.read(one), one) for one in (run, other)]
    assert files[0] == files[1] != {}


def captions(record, run):
    return read_captions(records.artifact(run, record, "predictions/valid_before.csv"))
