"""A small BLIP-2 with random weights, whose parts compare a device with the CPU."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Blip2Config

from harness.models.base import Sample
from harness.models.blip2.model import Captioner
from harness.models.text import IGNORE

_WIDTH, _LAYERS, _SIDE, _WORDS, _PAD, _SEED = 64, 2, 56, 120, 1, 20
_LENGTHS = (12, 7, 9)
"""Tokens of each text; with padding, the language model uses a mask."""


def make() -> Sample:
    """A model with language model and text path; the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = Captioner(_config()).eval()
        nn.init.normal_(model.query_tokens)
        pixels = torch.randn(len(_LENGTHS), 3, _SIDE, _SIDE)
        caption, concept = _text(), _text()
    with torch.no_grad():
        queries, states = model.see(pixels)

    def vision(model: Captioner) -> Tensor:
        return model.vision_model(pixel_values=pixels.to(model.device)).last_hidden_state

    def image(model: Captioner) -> Tensor:
        return model.see(pixels.to(model.device))[0]

    def reading(model: Captioner) -> Tensor:
        there = [(keys.to(model.device), values.to(model.device)) for keys, values in states]
        return model.read(concept["ids"].to(model.device), there)

    def speech(model: Captioner, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        words = model.language_model.get_input_embeddings()(ids.to(model.device))
        prefix = model.language_projection(queries.to(model.device)).to(words.dtype)
        seen = torch.cat([torch.ones(prefix.shape[:2]), torch.ones(ids.shape) if mask is None else mask], 1)
        both = torch.cat([prefix, words], dim=1)
        output = model.language_model(inputs_embeds=both, attention_mask=seen.long().to(model.device))
        return output.logits[:, prefix.shape[1] :]

    paths = {
        "ViT": (_LAYERS, _cast(vision)),
        "queries": (2 * _LAYERS, _cast(image)),
        "text path": (_LAYERS, _cast(reading)),
        "language model": (_LAYERS, _cast(lambda model: speech(model, caption["ids"], caption["mask"]))),
    }
    return Sample(model, pixels, {"caption": caption, "concept": concept}, paths, _cast(speech))


def _cast(path: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The path in the precision of the model's forward pass."""

    def run(model: Captioner, *inputs: Tensor) -> Tensor:
        with model.autocast():
            return path(model, *inputs)

    return run


def _text() -> dict[str, Tensor]:
    """Random ids with padding, mask and labels, as from `Codec.collate`."""
    mask = (torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS)[:, None]).long()
    ids = torch.randint(_PAD + 1, _WORDS, mask.shape).where(mask.bool(), torch.tensor(_PAD))
    return {"ids": ids, "mask": mask, "labels": ids.where(mask.bool(), torch.tensor(IGNORE))}


def _config() -> Blip2Config:
    """Weights are large enough for attention to choose: scores have a standard deviation of about 1."""
    wide = {
        "hidden_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 2,
        "initializer_range": _WIDTH**-0.5,
    }
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    qformer = wide | still | {"intermediate_size": 4 * _WIDTH, "encoder_hidden_size": _WIDTH}
    opt = {"ffn_dim": 4 * _WIDTH, "word_embed_proj_dim": _WIDTH, "dropout": 0.0, "init_std": _WIDTH**-0.5}
    return Blip2Config(
        vision_config=wide | {"intermediate_size": 4 * _WIDTH, "image_size": _SIDE, "patch_size": 14},
        qformer_config=qformer | {"vocab_size": _WORDS, "use_qformer_text_input": True},
        text_config=wide | opt | {"model_type": "opt", "vocab_size": _WORDS, "pad_token_id": _PAD},
        num_query_tokens=4,
    )
