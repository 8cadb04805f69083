"""The family of BLIP-2: ViT, Q-Former with its text path, and an optional frozen language model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import Problem
from harness.models import checkpoints as files
from harness.models.blip2 import sizes
from harness.models.settings import TINY, ModelConfig, prompt_text

if TYPE_CHECKING:
    import torch

    from harness.models.base import Sample
    from harness.models.loading import Loaded
    from harness.models.text import Codec
    from harness.training.settings import TrainConfig

shape = sizes.of_model
_KEYS = ("checkpoint", "text_checkpoint", "text_head_checkpoint")


def checkpoints(model: ModelConfig) -> dict[str, str]:
    """The checkpoints to load, by their key in `model:`; empty for a tiny model, which is built here."""
    if model.checkpoint == TINY:
        return {}
    return {key: name for key in _KEYS if (name := getattr(model, key))}


def problems(model: ModelConfig) -> list[Problem]:
    """The problems of loading these checkpoints: files that are missing, damaged or of another model."""
    found = []
    for key, name in checkpoints(model).items():
        at_hand, main = files.find(name), key == "checkpoint"
        if at_hand is None:
            found.append(files.missing(name, f"model.{key}"))
            continue
        speaks = main and model.language_model
        other = files.other_kind(at_hand, sizes.MODEL_TYPE, "model.checkpoint") if main else None
        flaws = files.flaws(at_hand, f"model.{key}", config=main, tokenizer=speaks)
        found += [other] if other else flaws
    return found


def settings(model: ModelConfig) -> dict[str, Any]:
    """The part of `model:` that affects training.

    It has no family name, so trainings from before there were families keep their fingerprints. Retrieved
    captions are those of another step.
    """
    unused = {"text_checkpoint", "text_head_checkpoint"} if model.checkpoint == TINY else set()
    given = model.model_dump(exclude={"family", "tiny"} | unused)
    return given | {"prompt": prompt_text(model.prompt)}


def built_from(model: ModelConfig) -> int | None:
    """Side in pixels of the training images that a tiny model is built from; None if it is loaded."""
    return sizes.image_side(model.tiny) if model.checkpoint == TINY else None


def sample() -> "Sample":
    """A small model with every part, for `doctor --selftest`; see `small.make`."""
    from harness.models.blip2 import small

    return small.make()


def codecs(model: ModelConfig, folder: Path, max_tokens: int) -> "tuple[Codec, Codec]":
    """The codecs of captions and of concept sentences; see `loading.codecs`."""
    from harness.models.blip2 import loading

    return loading.codecs(model, folder, max_tokens)


def load(model: ModelConfig, train: "TrainConfig", folder: Path, frozen_dtype: "torch.dtype") -> "Loaded":
    """The model with its codecs, ready to train; see `loading.load`."""
    from harness.models.blip2 import loading

    return loading.load(
        model, folder, train.max_caption_tokens, train.dropout, frozen_dtype, train.language_dropout
    )
