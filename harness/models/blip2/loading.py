"""Loading a BLIP-2 from checkpoint folders: every weight comes from a file, none stays random."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2Config,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from harness.errors import Problem, UserError
from harness.models import adapters, checkpoints, parts, speaking
from harness.models.blip2 import sizes
from harness.models.blip2.model import Captioner
from harness.models.blip2.text import DEC, language_codec, qformer_codec
from harness.models.contentless import without_contents
from harness.models.loading import Loaded
from harness.models.needs import as_user_error, lengths, too_long
from harness.models.settings import ModelConfig, RetrievedPrompt, longest_prompt, prompt_text
from harness.models.text import Codec

if TYPE_CHECKING:
    from harness.training.settings import TrainConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
QFORMER_TOKENIZER = "qformer_tokenizer"
_TEXT_PATH = re.compile(r"embeddings\.|cls\.|qformer\.encoder\.layer\.\d+\.(intermediate|output)\.")
_VOCABULARY = {"embeddings.word_embeddings.weight", "cls.predictions.bias"}


def codecs(config: ModelConfig, folder: Path, max_tokens: int) -> tuple[Codec, Codec]:
    """The codecs of captions and of concept sentences, without weights.

    Raises `UserError` if no configured checkpoint has a tokenizer for the Q-Former's text path, or if
    an image's own prompt and its caption may be too long for the model.
    """
    text, head = (_folder(name) for name in (config.text_checkpoint, config.text_head_checkpoint))
    concept = qformer_codec(_qformer_tokenizer([folder / QFORMER_TOKENIZER, text, head]), max_tokens)
    blip2 = Blip2Config.from_pretrained(folder)
    if not config.language_model:
        _check_room(config, concept, blip2.qformer_config.max_position_embeddings)
        return concept, concept
    text_config, speaks = blip2.text_config, _folder(config.language_checkpoint)
    if speaks:
        text_config = AutoConfig.from_pretrained(speaks, trust_remote_code=False)
    language = AutoTokenizer.from_pretrained(speaks or folder, trust_remote_code=False)
    caption = language_codec(language, text_config, prompt_text(config.prompt), max_tokens)
    positions = getattr(text_config, "max_position_embeddings", None)
    _check_room(config, caption, positions and positions - blip2.num_query_tokens)
    return caption, concept


def check(config: ModelConfig, train: "TrainConfig", new_tokens: int) -> None:
    """Raise `UserError` for what `load` or decoding would raise for `model.language_checkpoint`.

    Weights that are missing are not looked for. `new_tokens` is the most that decoding adds.
    """
    name, found = config.language_checkpoint, sizes.values_of(config)
    codec = speaking.codec(name, prompt_text(config.prompt), train.max_caption_tokens)
    with without_contents(accelerator=False), as_user_error("the language model", speaking.KEY):
        language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoints.config(name)))
        speaking.check(language)
    before = (found or {}).get("num_query_tokens", 32) + len(codec.prompt) + longest_prompt(config.prompt)
    room, wanted = speaking.room(language.config), lengths(train, new_tokens)
    if long := [one for key, count in wanted.items() for one in too_long(room, before, count, key)]:
        raise UserError(long)


def _check_room(config: ModelConfig, codec: Codec, positions: int | None) -> None:
    """Raise `UserError` if an image's own prompt and its caption may be longer than the model reads."""
    own = longest_prompt(config.prompt)
    needed = len(codec.prompt) + own + codec.max_tokens
    if own and positions and needed > positions:
        said, key, others = "concepts", "most", ""
        if isinstance(config.prompt, RetrievedPrompt):
            said, key, others = "retrieved captions", "words", " or model.prompt.retrieved,"
        what = f"{said} and a caption may have {needed} tokens; this model reads {positions}"
        hint = f"Lower it,{others} or train.max_caption_tokens ({codec.max_tokens})."
        raise UserError([Problem(what, key=f"model.prompt.{key}", hint=hint)])


def load(
    config: ModelConfig,
    folder: Path,
    max_tokens: int,
    dropout: float | None = None,
    language_dtype: torch.dtype = torch.float32,
    language_dropout: float | None = None,
    trained: Collection[str] = ("vision", "connector"),
) -> Loaded:
    """Load BLIP-2 from `folder`, and a missing text path from the other configured checkpoints.

    `trained` are the parts that training may change. Weights are fp32; those of a language model that is not
    trained, two thirds of all, are loaded as `language_dtype`. Raises `UserError` naming the weights that no
    configured checkpoint has.
    """
    if "language" in trained:
        language_dtype = torch.float32
    speaks = _folder(config.language_checkpoint)
    caption, concept = codecs(config, folder, max_tokens)
    blip2 = Blip2Config.from_pretrained(folder)
    blip2.qformer_config.vocab_size = len(concept.tokenizer)
    _set_dropouts(blip2, dropout, language_dropout)
    # missing weights are an error below; unused weights need no warning
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtypes = dict.fromkeys(("", "vision_config", "qformer_config"), torch.float32)
    model, info = Captioner.from_pretrained(
        folder,
        config=blip2,
        language_model=config.language_model and not speaks,
        dtype=dtypes | {"text_config": language_dtype},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    lacking = set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}
    texts = [_folder(name) for name in (config.text_checkpoint, config.text_head_checkpoint)]
    lacking = _fill(model, lacking - model.tied, filter(None, texts))
    if lacking:
        raise UserError([_unfilled(lacking, folder)])
    model.tie_weights()
    if speaks:
        _speak_by(model, speaks, language_dtype, language_dropout)
    model.resize_images(config.image_size)
    model.trained_parts = frozenset(trained)
    if config.lora:
        adapters.add(model, config.lora)
    new = ("language_projection",) if speaks else ()
    return Loaded(model, caption, concept, *_pixel_units(folder), new)


def without_weights(
    config: ModelConfig,
    train: "TrainConfig",
    values: Mapping[str, Any],
    language: Mapping[str, Any] | None,
) -> Captioner:
    """The model that `load` gives, but with random weights.

    `values` is the `config.json` of its checkpoint, and `language` that of its `language_checkpoint`, if any.
    """
    blip2 = Blip2Config.from_dict(dict(values))
    _set_dropouts(blip2, train.dropout, train.language_dropout)
    model = Captioner(blip2, config.language_model and not language)
    if language:
        speaks = AutoConfig.for_model(**language)
        set_dropout(speaks, train.language_dropout)
        model.speak_by(AutoModelForCausalLM.from_config(speaks))
    model.tie_weights()
    model.resize_images(config.image_size)
    model.trained_parts = parts.trained(config, train)
    if config.lora:
        adapters.add(model, config.lora)
    return model


def _speak_by(model: Captioner, folder: Path, dtype: torch.dtype, dropout: float | None) -> None:
    """Give the model the language model in `folder`, behind a new projection."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    set_dropout(config, dropout)
    language, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    tied = language._tied_weights_keys or () if getattr(config, "tie_word_embeddings", False) else ()
    if lacking := set(info["missing_keys"]) - set(tied):
        raise UserError([_unfilled(lacking, folder, "model.language_checkpoint")])
    with parts.new():
        model.speak_by(language)
        model.language_projection.weight.data.normal_(std=model.config.initializer_range)
        model.language_projection.bias.data.zero_()


def _set_dropouts(config: Blip2Config, dropout: float | None, language_dropout: float | None) -> None:
    """Set the dropouts of Q-Former and language model that are given."""
    if dropout is not None:
        config.qformer_config.hidden_dropout_prob = dropout
        config.qformer_config.attention_probs_dropout_prob = dropout
    set_dropout(config.text_config, language_dropout)


def set_dropout(config: PretrainedConfig, share: float | None) -> None:
    """Set the dropout of a language model's layers, if given; 0 also turns off all its other dropouts."""
    if share is None:
        return
    for name in ("dropout", "dropout_rate", "resid_pdrop", "hidden_dropout"):  # OPT, T5, GPT-2, NeoX
        if hasattr(config, name):
            setattr(config, name, share)
    for name in ("attention_dropout", "activation_dropout", "layerdrop", "attn_pdrop", "embd_pdrop"):
        if share == 0 and hasattr(config, name):
            setattr(config, name, 0.0)


def _folder(name: str | None) -> Path | None:
    found = checkpoints.find(name) if name else None
    return found.folder if found else None


def _qformer_tokenizer(folders: Iterable[Path | None]) -> PreTrainedTokenizerBase:
    for folder in folders:
        if folder is not None and any((folder / name).exists() for name in ("vocab.txt", "tokenizer.json")):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if DEC not in tokenizer.get_vocab():
                tokenizer.add_special_tokens({"bos_token": DEC})
            return tokenizer
    raise UserError(
        [
            Problem(
                "the checkpoint has no tokenizer for the Q-Former's text path",
                key="model.text_head_checkpoint",
                hint="Set it to bert-base-uncased, and model.text_checkpoint to Salesforce/blip2-itm-vit-g.",
            )
        ]
    )


def _fill(model: Captioner, lacking: set[str], folders: Iterable[Path]) -> set[str]:
    """Copy missing weights of text path and head from the first folder that has them -> those still missing.

    ViT and query path must come from `model.checkpoint`, because they were trained together.
    """
    parameters = dict(model.named_parameters())
    wanted = {name for name in lacking if _TEXT_PATH.match(name)}
    for folder in folders:
        for name, weight in _weights(folder, wanted):
            target, rows = parameters[name], len(weight)
            without_dec = name in _VOCABULARY and rows == len(target) - 1
            if weight.shape[1:] != target.shape[1:] or not (rows == len(target) or without_dec):
                continue
            with torch.no_grad():
                target[:rows] = weight.to(target.dtype)
                if without_dec:  # BERT lacks [DEC]: start from the mean of the known words
                    target[rows:] = weight.float().mean(0)
            wanted.discard(name)
            lacking = lacking - {name}
    return lacking


def _weights(folder: Path, wanted: set[str]) -> Iterable[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118  (safe_open is no mapping)
                if _own_name(key) in wanted:
                    yield _own_name(key), weights.get_tensor(key)
    if not any(folder.glob("*.safetensors")):
        for file in sorted(folder.glob("pytorch_model*.bin")):
            for key, weight in torch.load(file, map_location="cpu", weights_only=True, mmap=True).items():
                if _own_name(key) in wanted:
                    yield _own_name(key), weight


def _own_name(key: str) -> str:
    """Our name of a weight; old BERT checkpoints call LayerNorm's weight and bias gamma and beta."""
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _unfilled(lacking: set[str], folder: Path, key: str = "model.checkpoint") -> Problem:
    names = sorted(lacking)
    shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
    return Problem(
        f"no configured checkpoint has these weights, and they can't stay random: {shown}",
        folder,
        key=key,
        hint="The Q-Former's text path: model.text_checkpoint: Salesforce/blip2-itm-vit-g; its head: "
        "model.text_head_checkpoint: bert-base-uncased."
        if key == "model.checkpoint"
        else "It must be a whole causal language model.",
    )


def _pixel_units(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    values = checkpoints.image_processor(folder)
    return tuple(values.get("image_mean", CLIP_MEAN)), tuple(values.get("image_std", CLIP_STD))
