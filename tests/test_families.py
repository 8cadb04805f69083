"""Every model family fulfils the protocol, and no code outside `models/` knows a family's parts."""

import inspect
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from support import toy_family
from support.models import TEXTS, batch, load_tiny, pixels
from support.toy_family import Toy
from transformers import Blip2Model

from harness.config.sections import AugmentConfig, PredictConfig
from harness.decoding import predict
from harness.machine import device
from harness.models import FAMILIES, base, blip2, family
from harness.models.settings import ModelConfig
from harness.training import memory, train
from harness.training.settings import TrainConfig

device.probe("cpu")
SETTINGS = TrainConfig(
    batch_size=4,
    micro_batch_size=2,
    learning_rate=1e-2,
    warmup_steps=0,
    precision="fp32",
    stages=[
        {"epochs": 2, "losses": {"caption": 1, "concept": 1}},
        {"epochs": 1, "losses": {"caption": 1}},
    ],
)

HARNESS = Path(__file__).parents[1] / "harness"
PARTS = re.compile(r"qformer|language_model|\bopt\b|query_tokens|vision_model|language_projection")
ALLOWED = {
    "metrics/clipscore.py": ("self.model.vision_model(",),  # of transformers' CLIP
    "leaderboard/table3.py": ("model.language_model",),
    # what `harness init` writes
    "cli/beginning.py": (
        "blip2-opt-2.7b",
        "language_model: true",
        "qformer_layers: 2",
        "num_query_tokens: 8",
    ),
    # files and arguments of MedImageInsight, which the metric loads
    "metrics/similarity.py": (
        "language_model.pth",
        "vision_model/",
        "language_model/",
        "vision_model_name",
        "language_model_name",
    ),
}
"""Keys that users write and published names of other models."""
OPTIONAL = {"looking"}
"""What only some families can do."""


@pytest.fixture(scope="module")
def folder(tiny_folder) -> Path:
    return tiny_folder


def methods(protocol: type) -> dict[str, inspect.Signature]:
    """The methods of a protocol by name."""
    return {
        name: inspect.signature(value)
        for name, value in vars(protocol).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


def parameters(signature: inspect.Signature) -> list[str]:
    found = signature.parameters.items()  # a method of transformers may take others too
    return [name for name, one in found if name != "self" and one.kind != inspect.Parameter.VAR_KEYWORD]


def test_the_schema_names_every_family_and_no_other():
    assert get_args(ModelConfig.model_fields["family"].annotation) == tuple(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_functions_of_the_protocol(name):
    found = family(ModelConfig(family=name))
    for function, wanted in methods(base.Family).items():
        assert parameters(inspect.signature(getattr(found, function))) == parameters(wanted), function


def test_a_captioner_and_a_shape_have_the_methods_of_the_protocol(folder):
    models = (load_tiny(folder).model, Toy(300))
    shapes = (blip2.shape(ModelConfig(), SETTINGS), toy_family.Shape(300))
    every = [(base.Captioner, model) for model in models] + [(base.Shape, shape) for shape in shapes]
    for protocol, found in every:
        for method, wanted in methods(protocol).items():
            if method in OPTIONAL and not hasattr(found, method):
                continue
            assert parameters(inspect.signature(getattr(found, method))) == parameters(wanted), method


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_asked_before_a_run_imports_no_torch(name):
    code = f"""if True:
        import sys
        from harness.models.settings import ModelConfig
        from harness.models import family
        from harness.training.settings import TrainConfig
        for checkpoint in ("tiny", ModelConfig().checkpoint):
            model = ModelConfig(family="{name}", checkpoint=checkpoint)
            found = family(model)
            train = TrainConfig()
            found.checkpoints(model), found.problems(model, train, 9), found.built_from(model)
            found.settings(model), found.new(model)
            shape = found.shape(model, train)
            assert shape is None or shape.trained(True) > 0
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("checkpoint", ["tiny", ModelConfig().checkpoint])
def test_the_shape_of_blip2_is_known_without_its_weights(checkpoint):
    shape = blip2.shape(ModelConfig(checkpoint=checkpoint), SETTINGS)
    assert shape.trained(True) > shape.trained(False)


def test_blip2_is_trained_by_what_it_was_before_there_were_families():
    """Part of the train step's fingerprint: with another key, finished trainings would be done again."""
    texts = {"text_checkpoint": "a/text", "text_head_checkpoint": "a/head"}
    every = {"checkpoint": "a/model", "image_size": 364, "language_model": True, **texts}
    every |= {"prompt": "a photo of"}
    assert blip2.settings(ModelConfig(checkpoint="a/model", **texts)) == every
    built = blip2.settings(ModelConfig(checkpoint="tiny", **texts))
    assert built == {key: value for key, value in every.items() if key not in texts} | {"checkpoint": "tiny"}


def test_only_models_knows_the_parts_of_a_model():
    parts = PARTS.findall((HARNESS / "models/blip2/model.py").read_text(encoding="utf-8"))
    assert {"qformer", "language_model", "query_tokens"} <= set(parts)
    for file in HARNESS.rglob("*.py"):
        name = file.relative_to(HARNESS).as_posix()
        text = "" if name.startswith("models/") else file.read_text(encoding="utf-8")
        for allowed in ALLOWED.get(name, ()):
            assert allowed in text, (name, allowed)
            text = text.replace(allowed, "")
        assert not PARTS.findall(text), name


def test_image_features_are_the_query_outputs(folder):
    loaded = load_tiny(folder)
    theirs = Blip2Model.from_pretrained(folder).eval()
    images, *_ = batch(loaded)
    found = loaded.model.eval().image_features(images)
    with torch.no_grad():
        expected = theirs.get_qformer_features(images, interpolate_pos_encoding=True)
    expected = getattr(expected, "last_hidden_state", expected)  # of transformers 4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not found.requires_grad


@pytest.fixture
def toy(folder, monkeypatch) -> ModelConfig:
    monkeypatch.setitem(FAMILIES, "toy", "support.toy_family")
    return ModelConfig(checkpoint=str(folder), image_size=64).model_copy(update={"family": "toy"})


def test_a_family_of_another_build_trains_is_kept_and_captions(toy, folder, tmp_path):
    """Training and decoding ask the protocol alone: this model has none of BLIP-2's parts."""
    found = family(toy)
    load = partial(found.load, toy, SETTINGS, folder, torch.float32)
    caption, concept = found.codecs(toy, folder, SETTINGS.max_caption_tokens)
    concepts, captions = zip(*TEXTS, strict=True)
    texts = ([caption.encode(text) for text in captions], [concept.encode(text) for text in concepts])
    split = train.Split([str(i) for i in range(len(TEXTS))], pixels(len(TEXTS)), *texts)
    rows = []
    how = {"kind": "cpu", "seed": 1, "directory": tmp_path, "log": rows.append}
    data = {"train": split, "valid": split}
    evaluate = {"evaluate": lambda loaded: {"valid_primary": float(len(rows))}}
    loaded = train.Training(SETTINGS, AugmentConfig(), load, data, **how, **evaluate).run()
    losses = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert losses[-1] < losses[0]
    kept = load_file(tmp_path / train.BEST)
    assert {name.partition(".")[0] for name in kept} == {"encoder", "projection"}
    fresh = load().model.state_dict()
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, fresh[name]) == name.startswith("speaker."), name
    options = PredictConfig(num_beams=1, max_new_tokens=5, batch_size=3)
    said = predict.captions(loaded, split.pixels, range(4), options)
    assert len(said) == 4


def test_the_memory_forecast_asks_the_family(toy):
    found = memory.Model(family(toy).shape(toy, SETTINGS), SETTINGS, "cuda", True)
    assert found.trained == sum(
        weight.numel() for name, weight in Toy(300).named_parameters() if not name.startswith("speaker.")
    )
    used = memory.usage(found, memory.configured(SETTINGS, 1))
    assert used.weights == 4 * found.trained + 2 * sum(p.numel() for p in Toy(300).speaker.parameters())
    assert used.activations > 1000 * SETTINGS.micro_batch_size
