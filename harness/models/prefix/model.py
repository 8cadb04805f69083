"""An image encoder, a connector, and a causal language model that reads the connector's output first."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.errors import UserError
from harness.models import parts
from harness.models.base import Losses, Samples
from harness.models.cache import CachedDecoding, Speaker, logits_of
from harness.models.needs import too_long
from harness.models.prefix.vision import Encoder, Seeing
from harness.models.settings import ConnectorConfig
from harness.models.text import summed_loss


class Pooled(nn.Module):
    """The means of a grid of features over `tokens` parts: (B, N, D) -> (B, tokens, D).

    The parts are the cells of a grid that is as square as `tokens` allows. Class tokens are left out.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if not tokens % rows)
        self.grid = (rows, tokens // rows)

    def forward(self, features: Tensor) -> Tensor:
        side = math.isqrt(features.shape[1])
        planes = features[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(planes, self.grid).flatten(2).transpose(1, 2)


def connector(config: ConnectorConfig, inner: int, outer: int) -> nn.Sequential:
    """A newly initialised connector: features (B, N, inner) -> embeddings (B, T, outer).

    Each kind begins with a layer norm, because features of most encoders have no scale of their own. `linear`
    is that of CSIRO's winner of 2023: layer norm and a matrix without biases.
    """
    pooling = [Pooled(config.tokens)] if config.kind == "pooled" else []
    norm = nn.LayerNorm(inner)
    if config.kind == "mlp":
        return nn.Sequential(norm, nn.Linear(inner, outer), nn.GELU(), nn.Linear(outer, outer))
    return nn.Sequential(*pooling, norm, nn.Linear(inner, outer, bias=False))


class Captioner(Seeing):
    """`base.Captioner`: image features become embeddings before the text; there is no cross-attention.

    `trained_parts` are the parts that training may change in full. `room` is the most tokens that the
    language model reads, with those of the image; None: any number.
    """

    def __init__(
        self,
        vision: Encoder,
        connector: nn.Module,
        language: PreTrainedModel,
        trained_parts: frozenset[str],
        room: int | None,
    ) -> None:
        super().__init__(vision, trained_parts)
        self.connector, self.language, self.room = connector, language, room
        every = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        self._tied = every - {name for name, _ in self.named_parameters()}

    def _embeds(self, prefix: Tensor, ids: Tensor) -> Tensor:
        """Embeddings of the image, (B, P, D), and of the text after it, ids (B, T): (B, P + T, D)."""
        words = self.language.get_input_embeddings()(ids)
        return torch.cat([prefix.to(words.dtype), words], dim=1)

    def _read(self, prefix: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The logits (B, T, V) after each of the ids (B, T)."""
        seen = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)
        return logits_of(self.language, self._embeds(prefix, ids), ids.shape[1], attention_mask=seen)

    def forward(
        self,
        pixels: Tensor,
        caption: Mapping[str, Tensor] | None = None,
        concept: Mapping[str, Tensor] | None = None,
        label_smoothing: float = 0.0,
        samples: Samples | None = None,
        concepts: Tensor | None = None,
    ) -> Losses:
        """Training losses of one micro-batch.

        pixels (B, 3, S, S). `caption` holds ids, mask and labels, each (B, T), labels -100 for tokens without
        a loss. There is no loss `concept`. `concepts` (B, L) are labels. As in BLIP-2, a language model's
        loss has no label smoothing.
        """
        caption_loss = reward_loss = concepts_loss = None
        with self.autocast():
            features = self.see(pixels)
            if caption is not None or samples is not None:
                prefix = self.connector(features)
            if caption is not None:
                logits = self._read(prefix, caption["ids"], caption["mask"])
                caption_loss = summed_loss(logits, caption["labels"])
            if samples is not None:
                ids, mask = samples.text["ids"], samples.text["mask"]
                repeated = prefix.repeat_interleave(len(ids) // len(pixels), 0)
                reward_loss = samples.loss(self._read(repeated, ids, mask))
            if concepts is not None:
                concepts_loss = self.head.loss(features, concepts)
        return Losses(caption_loss, None, reward_loss, concepts_loss)

    @contextlib.contextmanager
    def decoder(self, width: int, length: int) -> Iterator[Callable[[Tensor, Tensor], CachedDecoding]]:
        """A function that begins the captions of pixels (B, 3, S, S), which follow the prompts (B, P).

        Each image has `width` rows and room for `length` new tokens. Raises `UserError` if the language model
        cannot read so many tokens.
        """
        with torch.no_grad(), self.autocast():
            speaker = Speaker(self.language, width, length)

            def begin(pixels: Tensor, prompts: Tensor) -> CachedDecoding:
                embeds = self._embeds(self.connector(self.see(pixels)), prompts)
                check_room(self.room, embeds.shape[1], length, "predict.max_new_tokens")
                return speaker(embeds)

            yield begin

    def compute_in(self, dtype: torch.dtype | None, vision_in_fp32: bool) -> None:
        """Set the precision of every forward pass, and of the language model's weights that never train."""
        super().compute_in(dtype, vision_in_fp32)
        for name, weight in self.named_parameters():
            if self.part_of(name) == "language" and not parts.changes(self, name):
                weight.data = weight.data.to(dtype or torch.float32)

    def use_plain_attention(self) -> None:
        """Use plain products for attention in both models of transformers."""
        super().use_plain_attention()
        self.language.set_attn_implementation("eager")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """Keep only the inputs of layers, in those of the two models that support it."""
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        if self.language.supports_gradient_checkpointing:
            self.language.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def freeze(self, losses: Collection[str]) -> None:
        """Freeze what never trains, and the parts that write if no loss is of what they write."""
        super().freeze(losses)
        if not {"caption", "reward"} & set(losses):
            self.connector.requires_grad_(False)
            self.language.requires_grad_(False)


def check_room(room: int | None, before: int, new: int, key: str) -> None:
    """Raise `UserError` if the language model cannot read `before` tokens and `new` ones after them."""
    shorter = ", or give an image fewer tokens: model.connector: {kind: pooled, tokens: 32}"
    if found := too_long(room, before, new, key, shorter):
        raise UserError(found)
