"""Loading an image encoder from its checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig
from transformers.utils import logging

from harness.models import adapters, parts
from harness.models import checkpoints as files
from harness.models.contentless import without_contents
from harness.models.encoder.model import Classifier
from harness.models.loading import Loaded
from harness.models.prefix import vision
from harness.models.prefix.checks import vision_of
from harness.models.settings import TINY, ModelConfig

if TYPE_CHECKING:
    from harness.training.settings import TrainConfig


def load(config: ModelConfig, train: "TrainConfig", folder: Path | None) -> Loaded:
    """Load the encoder in fp32; `folder` is that of a tiny one. Raises `UserError` if weights are missing."""
    logging.set_verbosity_error()  # missing weights are errors; unused weights need no warning
    logging.disable_progress_bar()
    seen = folder if config.vision_checkpoint == TINY else files.find(config.vision_checkpoint).folder
    model = _made(config, train, vision.load(seen, config.image_size))
    return Loaded(model, None, None, *vision.pixel_units(seen))


def check(config: ModelConfig, train: "TrainConfig") -> None:
    """Raise `UserError` for what `load` would raise, but for weights that are missing."""
    with without_contents(accelerator=False):
        without_weights(config, train, vision_of(config))


def without_weights(config: ModelConfig, train: "TrainConfig", sees: Mapping[str, Any]) -> Classifier:
    """The model that `load` gives, but with random weights; `sees` is the `config.json` of its encoder."""
    return _made(config, train, vision.without_weights(AutoConfig.for_model(**sees), config.image_size))


def _made(config: ModelConfig, train: "TrainConfig", encoder: vision.Encoder) -> Classifier:
    model = Classifier(encoder, parts.trained(config, train))
    if config.lora:
        adapters.add(model, config.lora)
    return model
