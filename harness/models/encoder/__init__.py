"""The family `encoder`: an image encoder alone, whose features predict concepts; it writes no captions."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import Problem, UserError
from harness.models import measured
from harness.models.base import Usage
from harness.models.prefix import checks
from harness.models.settings import TINY, ModelConfig

if TYPE_CHECKING:
    import torch

    from harness.models.loading import Loaded
    from harness.training.settings import TrainConfig

LOSSES = ("concepts",)
WHOLE_IMAGES = False
_VISION = checks.VISION
_OF_OTHERS = (
    "checkpoint",
    "text_checkpoint",
    "text_head_checkpoint",
    "language_checkpoint",
    "language_model",
)
_OF_OTHERS += ("connector", "prompt")


def checkpoints(model: ModelConfig) -> dict[str, str]:
    """The checkpoint of the image encoder; a tiny one is built here."""
    name = model.vision_checkpoint
    return {_VISION: name} if name and name != TINY else {}


def problems(model: ModelConfig, train: "TrainConfig", new_tokens: int) -> list[Problem]:
    """The problems of keys that this family lacks, of its checkpoint, image size and adapters."""
    found = [
        Problem("family encoder does not read it", key=f"model.{key}", hint=f"Use model.{_VISION}.")
        for key in _OF_OTHERS
        if getattr(model, key) != ModelConfig.model_fields[key].default
    ]
    if model.lora and "language" in model.lora.parts:
        what = "family encoder has no language model, so only vision can be adapted; use [vision]"
        found.append(Problem(what, key="model.lora.parts"))
    found += checks.vision_problems(model)
    if not found and model.vision_checkpoint != TINY:
        from harness.models.encoder import loading

        try:
            loading.check(model, train)
        except UserError as error:
            found += error.problems
    return found


def new(model: ModelConfig) -> tuple[str, ...]:
    """Nothing: the encoder is a checkpoint's, and a head exists only if a stage trains it."""
    return ()


def settings(model: ModelConfig) -> dict[str, Any]:
    """The part of `model:` that affects training."""
    return model.model_dump(include={"family", _VISION, "lora", "image_size"})


def shape(model: ModelConfig, train: "TrainConfig") -> measured.Shape | None:
    """The shape of the model, found by running it without contents; None if its config is not at hand."""
    sees = checks.vision_of(model)
    if sees is None:
        return None

    def build(train: "TrainConfig") -> Any:
        from harness.models.encoder import loading

        return loading.without_weights(model, train, sees)

    def pixels(batch: int) -> Any:
        import torch

        return torch.zeros(batch, 3, model.image_size, model.image_size)

    return measured.Shape(train, {**settings(model), "configs": [sees]}, build, pixels)


def built_from(model: ModelConfig) -> int | None:
    """Side in pixels of the training images that a tiny image encoder is built from; None if it is loaded."""
    return checks.built_from(model)


def sample() -> None:
    """None: `doctor --selftest` passes over this family."""


def codecs(model: ModelConfig, folder: Path | None, max_tokens: int) -> None:
    """None: this family has no texts."""


def export(loaded: "Loaded", folder: Path) -> dict[str, str]:
    """Write the encoder, without its head, as a checkpoint folder; see `prefix.vision.save`."""
    from harness.models.prefix import vision

    vision.save(loaded.model.vision, loaded.mean, loaded.std, folder / "vision")
    return {_VISION: "vision"}


def usage(model: ModelConfig, loaded: "Loaded") -> "Usage":
    """How the exported encoder is used without the harness."""
    what = (
        "`vision` is the image encoder, which transformers loads by `AutoModel`. The classifier of concepts "
    )
    return Usage(f"{what}is not in this folder: it stays with the run.")


def load(
    model: ModelConfig, train: "TrainConfig", folder: Path | None, frozen_dtype: "torch.dtype"
) -> "Loaded":
    """The encoder without a head, ready to train; see `loading.load`."""
    from harness.models.encoder import loading

    return loading.load(model, train, folder)
