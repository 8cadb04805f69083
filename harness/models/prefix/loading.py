"""Loading image encoder and language model from their checkpoints; the connector between them is new."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from harness.errors import Problem, UserError
from harness.models import adapters, parts, speaking
from harness.models import checkpoints as files
from harness.models.blip2.loading import set_dropout
from harness.models.contentless import without_contents
from harness.models.loading import Loaded
from harness.models.needs import as_user_error, lengths
from harness.models.prefix import vision
from harness.models.prefix.checks import CONNECTOR, LANGUAGE, VISION, new, values_of
from harness.models.prefix.model import Captioner, check_room, connector
from harness.models.settings import TINY, ModelConfig, longest_prompt, prompt_text
from harness.models.text import Codec

if TYPE_CHECKING:
    from harness.training.settings import TrainConfig

_WEIGHTS = "model.safetensors"


def codec(config: ModelConfig, max_tokens: int) -> Codec:
    """The codec of captions; see `speaking.codec`."""
    return speaking.codec(config.language_checkpoint, prompt_text(config.prompt), max_tokens)


def check(config: ModelConfig, train: "TrainConfig", new_tokens: int) -> None:
    """Raise `UserError` for what `load` or decoding would raise, but for weights that are missing.

    `new_tokens` is the most that decoding adds.
    """
    spoken = codec(config, train.max_caption_tokens)
    with without_contents(accelerator=False):
        model = without_weights(config, train, *values_of(config))
        speaking.check(model.language)
    if config.connector.checkpoint:
        _of_this_shape(model.connector, files.find(config.connector.checkpoint).folder)
    before = _before(config, model.vision, spoken)
    for key, count in lengths(train, new_tokens).items():
        check_room(model.room, before, count, key)


def load(config: ModelConfig, train: "TrainConfig", folder: Path | None, frozen_dtype: torch.dtype) -> Loaded:
    """Load both models; weights are fp32, those of a language model that is never trained `frozen_dtype`.

    `folder` is that of a tiny image encoder. Raises `UserError` if weights are missing, or if the models do
    not fit together.
    """
    logging.set_verbosity_error()  # missing weights are errors below; unused weights need no warning
    logging.disable_progress_bar()
    seen = folder if config.vision_checkpoint == TINY else files.find(config.vision_checkpoint).folder
    encoder = vision.load(seen, config.image_size)
    dtype = torch.float32 if "language" in parts.trained(config, train) else frozen_dtype
    speaks = files.find(config.language_checkpoint).folder
    model = _joined(config, train, encoder, _language(speaks, dtype, train.language_dropout))
    if config.connector.checkpoint:
        _fill(model.connector, files.find(config.connector.checkpoint).folder)
    caption = codec(config, train.max_caption_tokens)
    key, before = "train.max_caption_tokens", _before(config, encoder, caption)
    check_room(model.room, before, train.max_caption_tokens, key)
    return Loaded(model, caption, caption, *vision.pixel_units(seen), new(config))


def _before(config: ModelConfig, encoder: vision.Encoder, codec: Codec) -> int:
    """The most tokens that precede a caption: those of the image, the prompt and what was retrieved."""
    return (config.connector.tokens or encoder.tokens) + len(codec.prompt) + longest_prompt(config.prompt)


def _joined(
    config: ModelConfig, train: "TrainConfig", encoder: vision.Encoder, language: PreTrainedModel
) -> Captioner:
    """Both models with a new connector, and with adapters if the config has them."""
    with parts.new():
        between = connector(config.connector, encoder.width, language.get_input_embeddings().embedding_dim)
    model = Captioner(
        encoder, between, language, parts.trained(config, train), speaking.room(language.config)
    )
    if config.lora:
        adapters.add(model, config.lora)
    return model


def without_weights(
    config: ModelConfig, train: "TrainConfig", sees: Mapping[str, Any], speaks: Mapping[str, Any]
) -> Captioner:
    """The model that `load` gives, but with random weights; `sees` and `speaks` are two `config.json`."""
    with as_user_error("the image encoder", f"model.{VISION}"):
        encoder = vision.without_weights(AutoConfig.for_model(**sees), config.image_size)
    with as_user_error("the language model", f"model.{LANGUAGE}"):
        language = AutoConfig.for_model(**speaks)
        set_dropout(language, train.language_dropout)
        made = AutoModelForCausalLM.from_config(language)
    return _joined(config, train, encoder, made)


def export(loaded: Loaded, folder: Path) -> dict[str, str]:
    """Write both models and the connector as checkpoints in `folder` -> the folder of each by its key.

    transformers reads the two models too.
    """
    model, words = loaded.model, loaded.caption.tokenizer
    vision.save(model.vision, loaded.mean, loaded.std, folder / "vision")
    model.language.save_pretrained(folder / "language")
    words.save_pretrained(folder / "language")
    (folder / "connector").mkdir()
    save_file(model.connector.state_dict(), folder / "connector" / _WEIGHTS)
    return {VISION: "vision", LANGUAGE: "language", CONNECTOR: "connector"}


def _fill(connector: nn.Module, folder: Path) -> None:
    """Read the weights of a connector that `export` wrote."""
    _of_this_shape(connector, folder)
    connector.load_state_dict(load_file(folder / _WEIGHTS))


def _of_this_shape(connector: nn.Module, folder: Path) -> None:
    """Raise `UserError` unless `export` wrote the weights of such a connector into this folder."""
    own = {name: list(weight.shape) for name, weight in connector.state_dict().items()}
    with (
        as_user_error(f"the connector in {folder}", f"model.{CONNECTOR}"),
        safe_open(folder / _WEIGHTS, "pt") as file,
    ):
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    if found != own:
        what = f"{folder} has the weights of another connector, or of one between other models"
        raise UserError([Problem(what, key=f"model.{CONNECTOR}")])


def _language(folder: Path, dtype: torch.dtype, dropout: float | None) -> PreTrainedModel:
    """The causal language model of a checkpoint; `dropout` replaces all dropouts of its layers."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        set_dropout(config, dropout)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except (ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        what = f"AutoModelForCausalLM of transformers can't read {folder}: {first}"
        raise UserError([Problem(what, key=f"model.{LANGUAGE}")]) from error
    own = {name for name, _ in model.named_parameters()}  # tied weights once
    if lacking := own & set(info["missing_keys"]):
        raise UserError([vision.unfilled(lacking, folder, f"model.{LANGUAGE}")])
    return model
