"""The family of BLIP-2: ViT, Q-Former with its text path, and an optional frozen language model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import Problem, UserError
from harness.models import checkpoints as files
from harness.models import measured, needs, speaking
from harness.models.blip2 import sizes
from harness.models.settings import TINY, ModelConfig, prompt_text

if TYPE_CHECKING:
    import torch

    from harness.models.base import Sample, Shape, Usage
    from harness.models.loading import Loaded
    from harness.models.text import Codec
    from harness.training.settings import TrainConfig

LOSSES = ("caption", "concept", "reward", "concepts")
WHOLE_IMAGES = False
_OF_OTHERS = ("vision_checkpoint", "connector")  # keys of the family prefix
_KEYS = ("checkpoint", "text_checkpoint", "text_head_checkpoint", "language_checkpoint")


def checkpoints(model: ModelConfig) -> dict[str, str]:
    """The checkpoints to load, by their key in `model:`; a tiny model is built here."""
    built = _KEYS[:3] if model.checkpoint == TINY else ()
    return {key: name for key in _KEYS if key not in built and (name := getattr(model, key))}


def problems(model: ModelConfig, train: "TrainConfig", new_tokens: int) -> list[Problem]:
    """The problems of loading these checkpoints: files that are missing, damaged or of another model."""
    found = []
    for key, name in checkpoints(model).items():
        at_hand, main = files.find(name), key == "checkpoint"
        if at_hand is None:
            found.append(files.missing(name, f"model.{key}"))
            continue
        speaks = key == "language_checkpoint" or (main and model.language_model)
        other = files.other_kind(at_hand, sizes.MODEL_TYPE, "model.checkpoint") if main else None
        flaws = files.flaws(at_hand, f"model.{key}", config=main or speaks, tokenizer=speaks)
        if key == "language_checkpoint" and not flaws:
            flaws = speaking.problems(at_hand.folder)
        found += [other] if other else flaws
    found += [
        Problem("it is for family prefix", key=f"model.{key}")
        for key in _OF_OTHERS
        if getattr(model, key) != ModelConfig.model_fields[key].default
    ]
    if not model.language_model:
        found += [Problem(what, key=f"model.{key}") for key, what in _without_language_model(model)]
    if model.language_checkpoint and not found:
        from harness.models.blip2 import loading

        try:
            loading.check(model, train, new_tokens)
        except UserError as error:
            found += error.problems
    return found or list(_too_long(model, train, new_tokens))


def _too_long(model: ModelConfig, train: "TrainConfig", new_tokens: int) -> Iterator[Problem]:
    """Lengths that the model's own position table does not have, if its config is known.

    A tiny model has no tokenizer yet, so each word of the prompt is counted as one token.
    """
    shape = None if model.language_checkpoint else sizes.of_model(model)
    if shape is None:
        return
    reads = shape.language or shape.qformer
    before = 1 + (len(prompt_text(model.prompt).split()) + shape.queries if shape.language else 0)
    for key, count in needs.lengths(train, new_tokens).items():
        yield from needs.too_long(reads["max_position_embeddings"], before, count, key)


def _without_language_model(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Keys that contradict `language_model: false`, and why."""
    if model.language_checkpoint:
        yield "language_checkpoint", "model.language_model is false, so no language model is used"
    if model.lora and "language" in model.lora.parts:
        yield "lora.parts", "model.language_model is false, so language can't be adapted; use [vision]"


def new(model: ModelConfig) -> tuple[str, ...]:
    """The projection to a language model that the Q-Former has not learned."""
    return ("language_projection",) if model.language_checkpoint else ()


def shape(model: ModelConfig, train: "TrainConfig") -> "Shape | None":
    """The shape of the model; None if a config is not at hand.

    It is counted without torch if only ViT and Q-Former are trained, the language model is OPT, and no stage
    has the loss `concepts`.
    """
    counted = not (model.language_checkpoint or model.lora or train.train_language or train.trains_head)
    if counted and (found := sizes.of_model(model)):
        return found
    values = sizes.values_of(model)
    language = files.config(model.language_checkpoint) if model.language_checkpoint else None
    if values is None or (model.language_checkpoint and not language):
        return None
    if not language and values.get("text_config", {}).get("model_type") == "t5":
        return None
    return by_running(model, train, values, language)


def by_running(
    model: ModelConfig, train: "TrainConfig", values: Mapping[str, Any], language: Mapping[str, Any] | None
) -> measured.Shape:
    """The shape by a run without contents; `values` and `language` are `config.json` of both checkpoints."""

    def build(train: "TrainConfig") -> Any:
        from harness.models.blip2 import loading

        return loading.without_weights(model, train, values, language)

    def pixels(batch: int) -> Any:
        import torch

        return torch.zeros(batch, 3, model.image_size, model.image_size)

    return measured.Shape(train, {**settings(model), "configs": [values, language]}, build, pixels)


def settings(model: ModelConfig) -> dict[str, Any]:
    """The part of `model:` that affects training.

    It has no family name, so trainings from before there were families keep their fingerprints. Retrieved
    captions and concepts in a prompt are those of another step.
    """
    unused = {"text_checkpoint", "text_head_checkpoint"} if model.checkpoint == TINY else set()
    unused |= {key for key in ("language_checkpoint", "lora") if getattr(model, key) is None}
    given = model.model_dump(exclude={"family", "tiny", *_OF_OTHERS} | unused)
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


def export(loaded: "Loaded", folder: Path) -> dict[str, str]:
    """Write the model with its tokenizers as a checkpoint folder; see `exporting.export`."""
    from harness.models.blip2 import exporting

    exporting.export(loaded, folder)
    return {"checkpoint": "."}


def usage(model: ModelConfig, loaded: "Loaded") -> "Usage":
    """How the exported folder is used without the harness; see `exporting.usage`."""
    from harness.models.blip2 import exporting

    return exporting.usage(loaded)


def load(model: ModelConfig, train: "TrainConfig", folder: Path, frozen_dtype: "torch.dtype") -> "Loaded":
    """The model with its codecs, ready to train; see `loading.load`."""
    from harness.models import parts
    from harness.models.blip2 import loading

    return loading.load(
        model,
        folder,
        train.max_caption_tokens,
        train.dropout,
        frozen_dtype,
        train.language_dropout,
        parts.trained(model, train),
    )
