"""The family of vision-language models of transformers, by their own processors and chat templates."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import Problem, UserError
from harness.models import checkpoints as files
from harness.models import measured
from harness.models.settings import TINY, ModelConfig
from harness.models.vlm.architectures import ARCHITECTURES

if TYPE_CHECKING:
    import torch

    from harness.models.base import Sample, Shape, Usage
    from harness.models.loading import Loaded
    from harness.models.text import Codec
    from harness.training.settings import TrainConfig

LOSSES = ("caption", "reward")
WHOLE_IMAGES = True
_UNUSED = ("text_checkpoint", "text_head_checkpoint", "language_checkpoint", "vision_checkpoint")


def checkpoints(model: ModelConfig) -> dict[str, str]:
    """The checkpoint to load, by its key in `model:`."""
    return {"checkpoint": model.checkpoint}


def problems(model: ModelConfig, train: "TrainConfig", new_tokens: int) -> list[Problem]:
    """The problems of `model:` and of loading the checkpoint: missing, damaged, or of no known type.

    If there are none, those of its processor, of the lengths of texts, and of the layers for adapters.
    """
    found = [Problem(what, key=f"model.{key}") for key, what in _contradictions(model)]
    if model.checkpoint == TINY:
        hint = (
            "Name a checkpoint, such as Salesforce/blip-image-captioning-large, or use model.family: blip2."
        )
        return [*found, Problem("the family vlm has no tiny model", key="model.checkpoint", hint=hint)]
    at_hand = files.find(model.checkpoint)
    if at_hand is None:
        return [*found, files.missing(model.checkpoint, "model.checkpoint")]
    if other := _other_type(at_hand.folder):
        return [*found, other]
    found += files.flaws(at_hand, "model.checkpoint", config=True, tokenizer=True)
    if not found:
        from harness.models.vlm import loading

        try:
            loading.check(model, train, at_hand.folder, new_tokens)
        except UserError as error:
            found += error.problems
    return found


def _contradictions(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Keys that mean nothing for this family, and why."""
    for key in _UNUSED:
        if getattr(model, key, None):
            yield key, "the family vlm loads all its parts from model.checkpoint"
    if model.connector != ModelConfig.model_fields["connector"].default:
        yield "connector", "it is for family prefix"
    if not model.language_model:
        yield "language_model", "a model of the family vlm has a language model"


def _other_type(folder: Path) -> Problem | None:
    """The problem of a checkpoint whose model type this family does not load, or None."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, TypeError, KeyError):
        return Problem(f"{folder} has no config.json of a model", key="model.checkpoint")
    if kind not in ARCHITECTURES:
        what = f"{folder} holds a model of type {kind}; {', '.join(ARCHITECTURES)} are allowed"
        hint = "model.family: blip2 loads models of type blip-2." if kind == "blip-2" else None
        return Problem(what, key="model.checkpoint", hint=hint)
    if kind == "instructblip" and not config.get("use_decoder_only_language_model", True):
        hint = "Name one with a decoder alone, such as Salesforce/instructblip-vicuna-7b."
        what = f"{folder} has a language model with an encoder, which is not supported"
        return Problem(what, key="model.checkpoint", hint=hint)
    return None


def new(model: ModelConfig) -> tuple[str, ...]:
    """Nothing: every weight comes from the checkpoint."""
    return ()


def settings(model: ModelConfig) -> dict[str, Any]:
    """The part of `model:` that affects training; an image's own prompt is that of another step."""
    from harness.models.settings import prompt_text

    given = model.model_dump(include={"family", "checkpoint", "image_size", "lora"}, exclude_none=True)
    return given | {"prompt": prompt_text(model.prompt)}


def shape(model: ModelConfig, train: "TrainConfig") -> "Shape | None":
    """The shape of the model with square images of `model.image_size`; None if its config is not at hand."""
    at_hand, folder = files.find(model.checkpoint), Path(model.checkpoint)
    folder = at_hand.folder if at_hand else folder
    if not (folder / "config.json").is_file() or _other_type(folder):
        return None
    processors = [folder / name for name in files.PROCESSORS if (folder / name).is_file()]
    if not processors:
        return None

    def build(train: "TrainConfig") -> Any:
        from harness.models.vlm import loading

        return loading.without_weights(model, train, folder)

    def pixels(batch: int) -> Any:
        from harness.models.vlm import loading

        return loading.blank(folder, model.image_size, batch)

    texts = [file.read_text(encoding="utf-8") for file in (folder / "config.json", *processors)]
    return measured.Shape(train, {**settings(model), "configs": texts}, build, pixels)


def built_from(model: ModelConfig) -> int | None:
    """None: no model is built here."""
    return None


def sample() -> "Sample | None":
    """None: `doctor --selftest` has no small model of this family."""
    return None


def codecs(model: ModelConfig, folder: Path, max_tokens: int) -> "tuple[Codec, Codec]":
    """The codec of captions, twice, since the family has no loss on concept sentences."""
    from harness.models.vlm import loading

    codec = loading.codec(model, folder, max_tokens)
    return codec, codec


def export(loaded: "Loaded", folder: Path) -> dict[str, str]:
    """Write the model as a checkpoint folder; see `loading.export`."""
    from harness.models.vlm import loading

    loading.export(loaded, folder)
    return {"checkpoint": "."}


def usage(model: ModelConfig, loaded: "Loaded") -> "Usage":
    """How the exported folder is used without the harness; see `exporting.usage`."""
    from harness.models.vlm import exporting

    return exporting.usage(model, loaded)


def load(model: ModelConfig, train: "TrainConfig", folder: Path, frozen_dtype: "torch.dtype") -> "Loaded":
    """The model with its codec and image processor; see `loading.load`."""
    from harness.models.vlm import loading

    return loading.load(model, train, folder, frozen_dtype)
