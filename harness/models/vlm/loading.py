"""Loading a vision-language model with its processor from a checkpoint folder."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BlipForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from harness.errors import Problem, UserError
from harness.machine import device
from harness.models import adapters, parts
from harness.models.contentless import without_contents
from harness.models.needs import as_user_error, lengths
from harness.models.remarks import quieten
from harness.models.settings import ModelConfig, longest_prompt, prompt_text
from harness.models.text import Codec
from harness.models.vlm.architectures import ARCHITECTURES
from harness.models.vlm.blip import Blip
from harness.models.vlm.images import NAMES, Images, WholeLoaded
from harness.models.vlm.model import Captioner, Chatter
from harness.models.vlm.text import blip_codec, image_token, turn_codec

if TYPE_CHECKING:
    from harness.training.settings import TrainConfig

_KEY = "model.checkpoint"
_PROCESSOR_FILES = {".json", ".jinja", ".txt", ".model"}
_DROPOUTS = ("attention_dropout", "dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")


def codec(config: ModelConfig, folder: Path, max_tokens: int) -> Codec:
    """The codec of captions; raises `UserError` if a user turn does not have one image token."""
    return _codec(config, folder, processor(folder), max_tokens)


def check(config: ModelConfig, train: "TrainConfig", folder: Path, new_tokens: int) -> None:
    """Raise `UserError` for what `load` or decoding would raise, but for weights that are missing.

    `new_tokens` is the most that decoding adds.
    """
    own = processor(folder)
    for key, count in lengths(train, new_tokens).items():
        _codec(config, folder, own, count, key)
    if config.lora:
        with without_contents(accelerator=False):
            without_weights(config, train, folder)


def load(config: ModelConfig, train: "TrainConfig", folder: Path, frozen_dtype: torch.dtype) -> WholeLoaded:
    """Load the model, with adapters if `model.lora` asks for them.

    Weights that training may change are fp32, the others `frozen_dtype`. Raises `UserError` naming the
    weights that the checkpoint lacks.
    """
    own = processor(folder)
    captions = _codec(config, folder, own, train.max_caption_tokens)
    weights = _weights(folder, _configured(folder, train), parts.trained(config, train), frozen_dtype)
    kind, instruction = weights.config.model_type, None
    if kind == "instructblip":
        instruction = own.qformer_tokenizer(prompt_text(config.prompt)).input_ids
    image = None if kind == "blip" else image_token(kind, own)
    model, images = _captioner(weights, image, instruction, config, train), own.image_processor
    units = tuple(images.image_mean), tuple(images.image_std)
    return WholeLoaded(model, captions, captions, *units, processor=images, folder=folder)


def without_weights(config: ModelConfig, train: "TrainConfig", folder: Path) -> Captioner:
    """The captioner that `load` gives, made from its config alone: weights are random."""
    made = _configured(folder, train)
    words = [1] * (len(prompt_text(config.prompt).split()) + 2)  # about as many tokens as the instruction has
    image, instruction = -1, words if made.model_type == "instructblip" else None
    return _captioner(_class_of(made)._from_config(made), image, instruction, config, train)


def blank(folder: Path, side: int, batch: int) -> Images:
    """Black square images as the model takes them."""
    image = np.zeros((side, side, 3), np.uint8)
    own = AutoImageProcessor.from_pretrained(folder, use_fast=False, trust_remote_code=False)
    found = own(images=image, input_data_format="channels_last", return_tensors="np")
    given = {name: np.asarray(found[name]) for name in NAMES if name in found}
    one = {
        name: torch.zeros(value.shape) if value.dtype.kind == "f" else torch.tensor(value.tolist())
        for name, value in given.items()
    }
    return Images([one] * batch)


def export(loaded: WholeLoaded, folder: Path) -> dict[str, str]:
    """Write a checkpoint folder that `load` and transformers read; the processor's files are copied."""
    loaded.model.model.save_pretrained(folder)
    for file in sorted(loaded.folder.rglob("*")):
        name = file.relative_to(loaded.folder)
        weights = file.name.endswith(".index.json") or str(name) == "config.json"
        if file.is_file() and file.suffix in _PROCESSOR_FILES and not weights:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    return {"checkpoint": "."}


def _captioner(
    model: PreTrainedModel,
    image: int | None,
    instruction: list[int] | None,
    config: ModelConfig,
    train: "TrainConfig",
) -> Captioner:
    """The captioner of a model, with adapters if `model.lora` asks for them; see `Chatter`."""
    trained = parts.trained(config, train)
    blip = model.config.model_type == "blip"
    made = Blip(model, trained) if blip else Chatter(model, trained, image, instruction)
    if config.lora:
        adapters.add(made, config.lora)
    return made


def processor(folder: Path) -> Any:
    """The processor of a checkpoint, with an image processor by PIL.

    Raises `UserError` naming what it needs and this machine lacks.
    """
    quieten()
    local = {"trust_remote_code": False}
    with as_user_error(f"the config of {folder}", _KEY):
        kind = AutoConfig.from_pretrained(folder, **local).model_type
    with as_user_error(f"the image processor of {folder}", _KEY):
        # torchvision gives other pixels than PIL, and it need not be installed
        images = AutoImageProcessor.from_pretrained(folder, use_fast=False, **local)
    with as_user_error(f"the tokenizer of {folder}", _KEY):
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    if ARCHITECTURES[kind].rotated:
        return _WithoutVideo.of(images, tokenizer)
    with as_user_error(f"the processor of {folder}", _KEY):
        found = AutoProcessor.from_pretrained(folder, **local)
    found.image_processor = images
    return found


@dataclass(frozen=True)
class _WithoutVideo:
    """The parts of Qwen's processor that images need; that of videos needs torchvision."""

    image_processor: Any
    tokenizer: Any
    image_token_id: int

    @classmethod
    def of(cls, images: Any, tokenizer: Any) -> "_WithoutVideo":
        return cls(images, tokenizer, tokenizer.convert_tokens_to_ids("<|image_pad|>"))


def _codec(
    config: ModelConfig, folder: Path, own: Any, max_tokens: int, key: str = "train.max_caption_tokens"
) -> Codec:
    """See `codec`; `max_tokens` is the value of `key`."""
    words, model = prompt_text(config.prompt), AutoConfig.from_pretrained(folder)
    text = model.get_text_config(decoder=True)
    if model.model_type == "blip":
        found = blip_codec(own.tokenizer, text.bos_token_id, words, max_tokens)
    else:
        architecture = ARCHITECTURES[model.model_type]
        found = turn_codec(own, folder, model.model_type, architecture, words, max_tokens)
    needed, positions = len(found.prompt) + longest_prompt(config.prompt) + max_tokens, _positions(text)
    if positions and needed > positions:
        what = f"a prompt and a caption may have {needed} tokens; this model reads {positions}"
        hint = f"Lower {key} ({max_tokens}), or shorten the prompt."
        raise UserError([Problem(what, key=key, hint=hint)])
    return found


def _positions(text: Any) -> int | None:
    return getattr(text, "max_position_embeddings", None)


def _configured(folder: Path, train: "TrainConfig") -> PretrainedConfig:
    """The config of a checkpoint, with the dropout of `train`."""
    config = AutoConfig.from_pretrained(folder)
    chosen = [(config.get_text_config(decoder=True), train.language_dropout)]
    chosen += [(config.qformer_config, train.dropout)] if config.model_type == "instructblip" else []
    for part, share in chosen:
        for name in _DROPOUTS:
            if share is not None and hasattr(part, name):
                setattr(part, name, share)
    return config


def _class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    blip = config.model_type == "blip"
    return BlipForConditionalGeneration if blip else AutoModelForImageTextToText._model_mapping[type(config)]


def _weights(
    folder: Path, config: PretrainedConfig, trained: Collection[str], frozen_dtype: torch.dtype
) -> PreTrainedModel:
    """The model of a checkpoint; raises `UserError` if a weight would stay random."""
    # missing weights are an error below; unused weights need no warning
    logging.set_verbosity_error()
    (logging.disable_progress_bar if device.rank() else logging.enable_progress_bar)()
    model, info = _in_fp32(_class_of(config), config, trained).from_pretrained(
        folder, config=config, dtype=frozen_dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    lacking = set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}
    lacking -= set(model._tied_weights_keys or ()) | _tied(model)
    if lacking:
        names = sorted(lacking)
        shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
        what = f"the checkpoint lacks these weights, and they can't stay random: {shown}"
        raise UserError([Problem(what, folder, key=_KEY)])
    return model.train()


def _in_fp32(kind: type[PreTrainedModel], config: Any, trained: Collection[str]) -> type[PreTrainedModel]:
    """The class of a model that loads the weights of trained parts in fp32, whatever the others are."""
    with torch.device("meta"):
        names = {part for name, _ in kind(config).named_parameters() for part in name.split(".")}
    wanted = ARCHITECTURES[config.model_type].modules(trained)
    kept = [name for name in wanted if name in names]
    return type(kind.__name__, (kind,), {"_keep_in_fp32_modules_strict": kept, "__module__": kind.__module__})


def _tied(model: PreTrainedModel) -> set[str]:
    every = dict(model.named_parameters(remove_duplicate=False))
    return set(every) - set(dict(model.named_parameters()))
