"""What can be said of an image encoder and a language model from their `config.json` alone: no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import Problem
from harness.models import checkpoints as files
from harness.models import speaking
from harness.models.blip2.sizes import image_side
from harness.models.settings import TINY, ModelConfig, TinyConfig

VISION, LANGUAGE = "vision_checkpoint", "language_checkpoint"
CONNECTOR = "connector.checkpoint"
_EXAMPLES = {VISION: "microsoft/cvt-21-384-22k", LANGUAGE: "distilgpt2"}
_OF_OTHERS = ("checkpoint", "text_checkpoint", "text_head_checkpoint")
_INSTEAD = f"Use model.{VISION} and model.{LANGUAGE}."


def problems(model: ModelConfig) -> list[Problem]:
    """The problems of the keys of this family, of its two checkpoints and of the image size."""
    found = [
        Problem("family prefix does not read it", key=f"model.{key}", hint=_INSTEAD)
        for key in _OF_OTHERS
        if getattr(model, key) != ModelConfig.model_fields[key].default
    ]
    if not model.language_model:
        found.append(Problem("family prefix has one; use true", key="model.language_model"))
    found += vision_problems(model) + _of_key(model, LANGUAGE, lambda _, folder: speaking.problems(folder))
    if (name := model.connector.checkpoint) and files.find(name) is None:
        found.append(files.missing(name, f"model.{CONNECTOR}"))
    return found


def vision_problems(model: ModelConfig) -> list[Problem]:
    """The problems of the checkpoint of an image encoder, and of the image size for it."""
    return [] if model.vision_checkpoint == TINY else _of_key(model, VISION, _vision)


def new(model: ModelConfig) -> tuple[str, ...]:
    """The connector, unless a checkpoint has it."""
    return () if model.connector.checkpoint else ("connector",)


def values_of(model: ModelConfig) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The contents of `config.json` of image encoder and language model; None if it is not at hand."""
    return vision_of(model), (model.language_checkpoint and files.config(model.language_checkpoint)) or None


def vision_of(model: ModelConfig) -> Mapping[str, Any] | None:
    """The contents of `config.json` of the image encoder; None if it is not at hand."""
    if model.vision_checkpoint == TINY:
        return vision_values(model.tiny)
    return (model.vision_checkpoint and files.config(model.vision_checkpoint)) or None


def built_from(model: ModelConfig) -> int | None:
    """Side in pixels of the training images that a tiny image encoder is built from; None if it is loaded."""
    return image_side(model.tiny) if model.vision_checkpoint == TINY else None


def vision_values(tiny: TinyConfig) -> dict[str, Any]:
    """The config of a tiny ViT for images of any size, by transformers' names."""
    return {
        "model_type": "vit",
        "hidden_size": tiny.hidden_size,
        "intermediate_size": 4 * tiny.hidden_size,
        "num_hidden_layers": tiny.vision_layers,
        "num_attention_heads": max(tiny.hidden_size // 32, 1),
        "patch_size": tiny.patch_size,
        "initializer_range": 0.02,
    }


def _of_key(model: ModelConfig, key: str, check: Any) -> list[Problem]:
    name = getattr(model, key)
    if name is None:
        hint = f"Name a checkpoint, such as --set model.{key}={_EXAMPLES[key]}"
        return [Problem(f"family {model.family} needs it", key=f"model.{key}", hint=hint)]
    at_hand = files.find(name)
    if at_hand is None:
        return [files.missing(name, f"model.{key}")]
    flaws = files.flaws(at_hand, f"model.{key}", tokenizer=False) or check(model, at_hand.folder)
    return flaws or files.flaws(at_hand, f"model.{key}", tokenizer=key == LANGUAGE)


def config_of(folder: Path) -> Mapping[str, Any]:
    """The contents of a checkpoint's `config.json`."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _vision(model: ModelConfig, folder: Path) -> list[Problem]:
    config, key = config_of(folder), f"model.{VISION}"
    sizes = config.get("vision_config", config)
    if not {"image_size", "patch_size", "num_channels", "vision_config"} & {*config}:
        what = f"{folder} holds a model of type {config.get('model_type')}, which is no image encoder"
        hint = f"Name one that AutoModel of transformers reads, such as {_EXAMPLES[VISION]}."
        return [Problem(what, key=key, hint=hint)]
    patch, size = sizes.get("patch_size"), model.image_size
    if isinstance(patch, int) and size % patch:
        near = sorted({max(size // patch, 1) * patch, -(-size // patch) * patch})
        what = f"{size} is not a multiple of {patch}, the patch size of {folder}"
        hint = "Use " + " or ".join(map(str, near)) + "."
        return [Problem(what, key="model.image_size", hint=hint)]
    return []
