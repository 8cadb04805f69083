"""The family `prefix`: image encoder, connector, and a causal language model that reads its output first.

Frozen (Tsimpoukelli et al. 2021, arXiv:2106.13884) has the language model frozen; CSIRO's winner of 2023
(Nicolson et al., MedICap) trains all parts.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import Problem, UserError
from harness.models import measured
from harness.models.base import Usage
from harness.models.prefix import checks
from harness.models.settings import TINY, ModelConfig, prompt_text

if TYPE_CHECKING:
    import torch

    from harness.models.loading import Loaded
    from harness.models.text import Codec
    from harness.training.settings import TrainConfig

new, built_from = checks.new, checks.built_from
LOSSES = ("caption", "reward", "concepts")
WHOLE_IMAGES = False


def checkpoints(model: ModelConfig) -> dict[str, str]:
    """The checkpoints to load, by their key in `model:`; a tiny image encoder is built here."""
    named = {key: getattr(model, key) for key in (checks.VISION, checks.LANGUAGE)}
    named[checks.CONNECTOR] = model.connector.checkpoint
    return {key: name for key, name in named.items() if name and name != TINY}


def problems(model: ModelConfig, train: "TrainConfig", new_tokens: int) -> list[Problem]:
    """The problems of `model:`, of loading its checkpoints and of joining them."""
    found = checks.problems(model)
    if train.dropout:
        hint = "Dropout of the language model: train.language_dropout."
        found.append(
            Problem("it is for a Q-Former, which family prefix lacks", key="train.dropout", hint=hint)
        )
    if not found:
        from harness.models.prefix import loading

        try:
            loading.check(model, train, new_tokens)
        except UserError as error:
            found += error.problems
    return found


def settings(model: ModelConfig) -> dict[str, Any]:
    """The part of `model:` that affects training."""
    keys = {"family", checks.VISION, checks.LANGUAGE, "connector", "lora", "image_size", "prompt"}
    return model.model_dump(include=keys) | {"prompt": prompt_text(model.prompt)}


def shape(model: ModelConfig, train: "TrainConfig") -> measured.Shape | None:
    """The shape of the model, found by running it without contents; None if a config is not at hand."""
    sees, speaks = checks.values_of(model)
    if sees is None or speaks is None:
        return None

    def build(train: "TrainConfig") -> Any:
        from harness.models.prefix import loading

        return loading.without_weights(model, train, sees, speaks)

    def pixels(batch: int) -> Any:
        import torch

        return torch.zeros(batch, 3, model.image_size, model.image_size)

    return measured.Shape(train, {**settings(model), "configs": [sees, speaks]}, build, pixels)


def sample() -> None:
    """None: `doctor --selftest` passes over this family."""


def codecs(model: ModelConfig, folder: Path | None, max_tokens: int) -> "tuple[Codec, Codec]":
    """The codec of captions, twice; see `loading.codec`."""
    from harness.models.prefix import loading

    return (loading.codec(model, max_tokens),) * 2


def export(loaded: "Loaded", folder: Path) -> dict[str, str]:
    """Write both models and the connector as checkpoint folders; see `loading.export`."""
    from harness.models.prefix import loading

    return loading.export(loaded, folder)


def usage(model: ModelConfig, loaded: "Loaded") -> "Usage":
    """How the exported parts are used without the harness."""
    what = (
        "transformers has no class that joins these parts, so only the harness captions with them. It loads"
    )
    what += (
        " `vision` by `AutoModel` and `language` by `AutoModelForCausalLM`. `connector` leads from the first"
    )
    return Usage(f"{what} to the second; its weights are those of `harness.models.prefix.model.connector`.")


def load(
    model: ModelConfig, train: "TrainConfig", folder: Path | None, frozen_dtype: "torch.dtype"
) -> "Loaded":
    """The model with its codec, ready to train; see `loading.load`."""
    from harness.models.prefix import loading

    return loading.load(model, train, folder, frozen_dtype)
