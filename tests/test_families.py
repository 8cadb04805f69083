"""Every model family holds what the harness asks for, and nothing outside of it knows a family's parts."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from models import batch, build_tiny, load_tiny
from transformers import Blip2Model

from harness.config.schema import ModelConfig
from harness.models import FAMILIES, base, blip2, family

HARNESS = Path(__file__).parents[1] / "harness"
PARTS = re.compile(r"qformer|language_model|\bopt\b|query_tokens|vision_model|language_projection")
ALLOWED = {
    "config/schema.py": ("qformer_layers", "num_query_tokens", "language_model: bool", "blip2-opt-2.7b"),
    "leaderboard/table3.py": ("model.language_model",),
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


def methods(protocol: type) -> dict[str, inspect.Signature]:
    """The methods of a protocol by name."""
    return {
        name: inspect.signature(value)
        for name, value in vars(protocol).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


def parameters(signature: inspect.Signature) -> list[str]:
    return [name for name in signature.parameters if name != "self"]


def test_the_schema_names_every_family_and_no_other():
    assert get_args(ModelConfig.model_fields["family"].annotation) == tuple(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_functions_of_the_protocol(name):
    found = family(ModelConfig(family=name))
    for function, wanted in methods(base.Family).items():
        assert parameters(inspect.signature(getattr(found, function))) == parameters(wanted), function


def test_a_captioner_and_a_shape_have_the_methods_of_the_protocol(folder):
    shape = blip2.shape(ModelConfig())
    for protocol, found in ((base.Captioner, load_tiny(folder).model), (base.Shape, shape)):
        for method, wanted in methods(protocol).items():
            assert parameters(inspect.signature(getattr(found, method))) == parameters(wanted), method


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_asked_before_a_run_imports_no_torch(name):
    code = f"""if True:
        import sys
        from harness.config.schema import ModelConfig
        from harness.models import family
        for checkpoint in ("tiny", ModelConfig().checkpoint):
            model = ModelConfig(family="{name}", checkpoint=checkpoint)
            found = family(model)
            found.checkpoints(model), found.problems(model), found.settings(model), found.built_from(model)
            shape = found.shape(model)
            assert shape.trained(True) > shape.trained(False)
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
        expected = theirs.get_qformer_features(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not found.requires_grad
