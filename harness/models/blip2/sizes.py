"""The shape of a BLIP-2 and its number of parameters, from its config alone: no torch, no weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.models import checkpoints
from harness.models.base import FLOAT, HALF, Activations, Work
from harness.models.blip2 import activations, flops
from harness.models.settings import TINY, ModelConfig, TinyConfig

MODEL_TYPE = "blip-2"
"""The model type in the `config.json` of a BLIP-2."""
GRID = 8
"""Patches per side of a tiny model's position table when built; loading resizes it to the image size."""

# transformers' Blip2Config writes only what differs from these defaults, those of Salesforce/blip2-opt-2.7b
_VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "patch_size": 14,
    "qkv_bias": True,
}
_QFORMER = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
}
_OPT = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "dropout": 0.1,
    "max_position_embeddings": 2048,
}
OPT_2_7B = {
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "ffn_dim": 10240,
    "word_embed_proj_dim": 2560,
}
PUBLISHED = ("Salesforce/blip2-opt-2.7b", "Salesforce/blip2-opt-2.7b-coco")
"""Checkpoints whose sizes are known without their config."""


@dataclass(frozen=True)
class Sizes:
    """Number of parameters of each part of a captioner; tied weights count once."""

    vision: int
    qformer: int
    """Queries and Q-Former with its text path."""
    text: int
    """Word embeddings and language-model head of the Q-Former."""
    projection: int
    language_model: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a captioner's tensors: the three parts of its config with all defaults."""

    vision: Mapping[str, Any]
    qformer: Mapping[str, Any]
    language: Mapping[str, Any] | None
    """None: no language model."""
    queries: int
    image_size: int

    @property
    def patches(self) -> int:
        """Number of tokens of the ViT: the patches of an image and the class token."""
        return (self.image_size // self.vision["patch_size"]) ** 2 + 1

    @property
    def sizes(self) -> Sizes:
        """Number of parameters of each part."""
        qformer, language = self.qformer, self.language
        width = qformer["hidden_size"]
        return Sizes(
            vision=_vision(self.vision, self.patches),
            qformer=self.queries * width + _qformer(qformer),
            text=(qformer["vocab_size"] + qformer["max_position_embeddings"]) * width
            + _linear(width, width)
            + 2 * width
            + qformer["vocab_size"],
            projection=_linear(width, language["hidden_size"]) if language else 0,
            language_model=_opt(language) if language else 0,
        )

    def trained(self, train_vision: bool) -> int:
        """Number of parameters that training may change: not the language model, nor a frozen ViT."""
        parts = self.sizes
        return parts.qformer + parts.text + parts.projection + (parts.vision if train_vision else 0)

    def frozen(self, train_vision: bool, half: bool) -> int:
        """Bytes of the weights that are never trained; `half`: the language model is in half precision."""
        parts = self.sizes
        vision = 0 if train_vision else parts.vision
        return FLOAT * vision + (HALF if half else FLOAT) * parts.language_model

    def flops(self, work: Work) -> int:
        """The FLOPs of forward and backward pass of one micro batch."""
        return flops.of(self, work)

    def activations(self, work: Work) -> Activations:
        """The bytes that autograd keeps of one micro batch."""
        return activations.of(self, work)


def of(values: Mapping[str, Any], image_size: int, language_model: bool) -> Shape | None:
    """The shape for the contents of a `config.json`; None if its language model is not OPT."""
    language = _OPT | values.get("text_config", {})
    if language_model and language.get("model_type", "opt") != "opt":
        return None
    return Shape(
        vision=_VISION | values.get("vision_config", {}),
        qformer=_QFORMER | values.get("qformer_config", {}),
        language=language if language_model else None,
        queries=values.get("num_query_tokens", 32),
        image_size=image_size,
    )


def of_model(model: ModelConfig) -> Shape | None:
    """The shape of the configured model; None if its checkpoint is neither at hand nor known."""
    values = values_of(model)
    return None if values is None else of(values, model.image_size, model.language_model)


def values_of(model: ModelConfig) -> Mapping[str, Any] | None:
    """The contents of the checkpoint's `config.json`; None if it is neither at hand nor known."""
    if model.checkpoint == TINY:
        return _tiny(model.tiny)
    found = checkpoints.find(model.checkpoint)
    damaged = found and checkpoints.other_kind(found, MODEL_TYPE, "model.checkpoint")
    return _values(found.folder if found and not damaged else None, model.checkpoint)


def of_checkpoint(folder: Path | None, name: str, image_size: int, language_model: bool) -> Shape | None:
    """The shape of a checkpoint in a folder, or of a published one that is not at hand; None if unknown."""
    values = _values(folder, name)
    return None if values is None else of(values, image_size, language_model)


def _values(folder: Path | None, name: str) -> Mapping[str, Any] | None:
    file = folder / "config.json" if folder else None
    if file and file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    return {"text_config": OPT_2_7B} if name in PUBLISHED else None


def image_side(tiny: TinyConfig) -> int:
    """The image size in pixels for which the ViT is built; loading resizes its position table."""
    return GRID * tiny.patch_size


def of_tiny(tiny: TinyConfig, image_size: int, language_model: bool) -> Shape | None:
    """The largest shape of `model.checkpoint: tiny`; its vocabularies can be smaller."""
    return of(_tiny(tiny), image_size, language_model)


def _tiny(tiny: TinyConfig) -> dict[str, Any]:
    """The contents of its `config.json`."""
    width, text = tiny.hidden_size, tiny.text_hidden_size
    heads = max(width // 32, 1)
    return {
        "num_query_tokens": tiny.num_query_tokens,
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": tiny.vision_layers,
            "num_attention_heads": heads,
            "patch_size": tiny.patch_size,
        },
        "qformer_config": {
            "vocab_size": tiny.vocab_size,
            "hidden_size": width,
            "encoder_hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": tiny.qformer_layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 256,
        },
        "text_config": {
            "vocab_size": tiny.vocab_size,
            "hidden_size": text,
            "ffn_dim": 4 * text,
            "num_hidden_layers": tiny.text_layers,
            "num_attention_heads": max(text // 48, 1),
            "max_position_embeddings": 512,
        },
    }


def _linear(inner: int, outer: int) -> int:
    return inner * outer + outer


def _vision(c: Mapping[str, Any], positions: int) -> int:
    width, mlp = c["hidden_size"], c["intermediate_size"]
    embeddings = width + _linear(3 * c["patch_size"] ** 2, width) + positions * width
    attention = 3 * width * width + (3 * width if c["qkv_bias"] else 0) + _linear(width, width)
    layer = attention + _linear(width, mlp) + _linear(mlp, width) + 4 * width
    return embeddings + c["num_hidden_layers"] * layer + 2 * width


def _qformer(c: Mapping[str, Any]) -> int:
    width, mlp, seen = c["hidden_size"], c["intermediate_size"], c["encoder_hidden_size"]
    norm = 2 * width
    attention = 4 * _linear(width, width) + norm
    crossing = 2 * _linear(width, width) + 2 * _linear(seen, width) + norm
    feed_forward = _linear(width, mlp) + _linear(mlp, width) + norm
    layers = c["num_hidden_layers"]
    crossings = -(-layers // c["cross_attention_frequency"])
    return norm + layers * (attention + 2 * feed_forward) + crossings * crossing


def _opt(c: Mapping[str, Any]) -> int:
    width, mlp = c["hidden_size"], c["ffn_dim"]
    words = c.get("word_embed_proj_dim") or width
    embeddings = c["vocab_size"] * words + (c["max_position_embeddings"] + 2) * width
    projections = 2 * words * width if words != width else 0
    layer = 4 * _linear(width, width) + _linear(width, mlp) + _linear(mlp, width) + 4 * width
    return embeddings + projections + c["num_hidden_layers"] * layer + 2 * width
