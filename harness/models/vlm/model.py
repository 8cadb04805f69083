"""Vision-language models of transformers: losses of a batch, and decoding with the model's own forward pass.

Ids hold one token for the image. The model reads as many of them as its image features are, and gives logits
for the ids alone, so nothing outside this folder knows how many tokens an image has.
"""

import contextlib
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from harness.models import parts
from harness.models.base import Losses, Samples
from harness.models.cache import keyword
from harness.models.text import IGNORE, summed_loss
from harness.models.vlm.architectures import ARCHITECTURES
from harness.models.vlm.images import Images


@dataclass(frozen=True)
class Seen:
    """The image features (T, D) of each image, and those that are added to the first layers' outputs.

    `grids` (B, 3) are the images' numbers of patches by time, height and width, for models that need them.
    """

    images: list[Tensor]
    deep: list[list[Tensor]]
    grids: Tensor | None = None

    def repeated(self, count: int) -> "Seen":
        """The features with `count` rows for each image."""
        grids = None if self.grids is None else self.grids.repeat_interleave(count, 0)
        return Seen(_times(self.images, count), [_times(layer, count) for layer in self.deep], grids)


def _times(values: list[Tensor], count: int) -> list[Tensor]:
    return [value for value in values for _ in range(count)]


class Captioner(nn.Module):
    """What all models of the family have in common; see `base.Captioner`."""

    def __init__(self, model: PreTrainedModel, trained_parts: Collection[str]) -> None:
        super().__init__()
        self.model, self.trained_parts = model, trained_parts
        self.architecture = ARCHITECTURES[model.config.model_type]
        self.autocast_dtype: torch.dtype | None = None
        self.vision_in_fp32 = False
        self.tied = frozenset(dict(self.named_parameters(remove_duplicate=False))) - frozenset(
            dict(self.named_parameters())
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def _see(self, pixels: Images) -> Seen:
        """Run image encoder and connector."""

    @abstractmethod
    def _say(self, seen: Seen, text: Mapping[str, Tensor]) -> Tensor:
        """The logits (R, T, V) that follow each of the ids (R, T) of `Codec.collate`."""

    @abstractmethod
    def _begin(self, seen: Seen, prompts: Tensor) -> "Growing":
        """Read the prompts (B, P)."""

    smooths = False
    """Whether label smoothing is a part of the model's loss."""

    def see(self, pixels: Images) -> Seen:
        """Run image encoder and connector, without autocast if the image encoder is to compute in fp32."""
        mixed = torch.is_autocast_enabled(self.device.type) and not self.vision_in_fp32
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=mixed):
            return self._see(pixels)

    def forward(
        self,
        pixels: Images,
        caption: Mapping[str, Tensor] | None = None,
        concept: Mapping[str, Tensor] | None = None,
        label_smoothing: float = 0.0,
        samples: Samples | None = None,
    ) -> Losses:
        """Training losses of one micro-batch; label smoothing affects BLIP alone, as in LAVIS."""
        caption_loss = reward_loss = None
        with self.autocast():
            seen = self.see(pixels)
            if caption is not None:
                smoothing = label_smoothing if self.smooths else 0.0
                caption_loss = summed_loss(self._say(seen, caption), caption["labels"], smoothing)
            if samples is not None:
                count = len(samples.text["ids"]) // len(pixels)
                reward_loss = samples.loss(self._say(seen.repeated(count), samples.text))
        return Losses(caption_loss, None, reward_loss)

    @contextlib.contextmanager
    def decoder(self, width: int, length: int) -> Iterator[Callable[[Images, Tensor], "Growing"]]:
        """A function that begins the captions of images, which follow the prompts (B, P).

        Each image has `width` rows; the memory of `length` new tokens grows with them.
        """
        with torch.no_grad(), self.autocast():
            yield lambda pixels, prompts: self._begin(self.see(pixels), prompts).widened(width)

    @torch.no_grad()
    def image_features(self, pixels: Images) -> Tensor:
        """The mean of each image's features, (B, 1, D), since images differ in their number."""
        with self.autocast():
            return torch.stack([features.float().mean(0) for features in self.see(pixels).images])[:, None]

    def autocast(self) -> torch.autocast:
        """The precision of every forward pass: fp32, or autocast to `autocast_dtype`."""
        return parts.autocast(self.device, self.autocast_dtype)

    def part_of(self, name: str) -> str:
        """The part of a weight."""
        return self.architecture.part_of(name)

    def is_saved(self, name: str) -> bool:
        """Whether training may change a weight; tied weights once."""
        return parts.is_saved(self, name, self.tied)

    def freeze(self, losses: Collection[str]) -> None:
        """Freeze what is never trained, and what no caption depends on."""
        parts.train_only(self)
        unused = _unused(self.model.config)
        for name, parameter in self.named_parameters():
            if unused.search(name):
                parameter.requires_grad_(False)

    def compute_in(self, dtype: torch.dtype | None, vision_in_fp32: bool) -> None:
        """Set the precision of every forward pass, and of the weights that are never trained."""
        self.autocast_dtype, self.vision_in_fp32 = dtype, vision_in_fp32
        for name, weight in self.named_parameters():
            if not parts.changes(self, name) and weight.is_floating_point():
                full = dtype is None or (vision_in_fp32 and self.part_of(name) != "language")
                weight.data = weight.data.to(torch.float32 if full else dtype)

    def use_plain_attention(self) -> None:
        """Use plain products for attention in all parts."""
        self.model.set_attn_implementation("eager")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        """Keep only the inputs of layers, and recompute the rest in the backward pass."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def parts_to_compile(self, how: Literal["layers", "whole"]) -> list[nn.Module]:
        """None: images and texts differ in length, so parts would be compiled often."""
        return []


class Chatter(Captioner):
    """A causal language model that reads image features among the tokens of a user turn.

    `image` is the id of the image's token. `instruction` are the ids (T,) that InstructBLIP's Q-Former reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trained_parts: Collection[str],
        image: int,
        instruction: list[int] | None = None,
    ) -> None:
        super().__init__(model, trained_parts)
        self.image, self.instruction = image, instruction

    @property
    def body(self) -> nn.Module:
        """The module that reads embeddings."""
        return self.model.get_submodule(self.architecture.body)

    def _see(self, pixels: Images) -> Seen:
        given = pixels.joined()
        inner = getattr(self.model, "model", self.model)
        if self.instruction is not None:
            words = torch.tensor(self.instruction, device=self.device).expand(len(pixels), -1)
            given |= {"qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)}
        found, layers = _features(inner.get_image_features(**given))
        lengths = [len(one) for one in found]
        deep = [list(layer.split(lengths)) for layer in layers]
        return Seen(list(found), deep, given.get("image_grid_thw"))

    def _say(self, seen: Seen, text: Mapping[str, Tensor]) -> Tensor:
        wide = _Expanded(text["ids"], text["mask"], text["labels"], self._lengths(seen), self.image)
        hidden = self._read(seen, wide, self._positions(wide, seen), use_cache=False)
        wanted = wide.places[:, :, None].expand(-1, -1, hidden.shape[-1])
        return self.model.get_output_embeddings()(hidden.gather(1, wanted))

    def _begin(self, seen: Seen, prompts: Tensor) -> "Growing":
        ones, none = torch.ones_like(prompts), torch.full_like(prompts, IGNORE)
        wide = _Expanded(prompts, ones, none, self._lengths(seen), self.image, left=True)
        cache, positions = DynamicCache(config=self.model.config), self._positions(wide, seen)
        hidden = self._read(seen, wide, positions, **self._kept(cache))
        logits = self.model.get_output_embeddings()(hidden[:, -1])
        last = positions.amax(0) if positions.ndim == 3 else positions
        return Growing(self._next, logits, cache, wide.mask, last.amax(1) + 1)

    def _next(self, tokens: Tensor, state: "Growing") -> Tensor:
        """The logits (R, V) that follow these tokens (R,)."""
        positions = state.next[:, None]
        if self.architecture.rotated:
            positions = positions.expand(3, -1, -1)
        output = self.body(
            inputs_embeds=self.model.get_input_embeddings()(tokens[:, None]),
            attention_mask=state.mask,
            position_ids=positions,
            cache_position=torch.tensor([state.mask.shape[1] - 1], device=tokens.device),
            **self._kept(state.cache),
        )
        return self.model.get_output_embeddings()(output.last_hidden_state[:, -1])

    def _kept(self, cache: Cache) -> dict[str, Any]:
        """The arguments of `body` for a cache that it fills."""
        return {keyword(self.body): cache, "use_cache": True}

    def _lengths(self, seen: Seen) -> list[int]:
        return [len(features) for features in seen.images]

    def _positions(self, wide: "_Expanded", seen: Seen) -> Tensor:
        """The positions of tokens (R, L), or (3, R, L) for a model whose positions have three axes."""
        order = (wide.mask.cumsum(1) - 1).clamp(min=0)
        if self.architecture.rotated:
            merged = self.model.config.vision_config.spatial_merge_size
            return _rotated(order, wide.is_image, seen.grids[:, 1:] // merged)
        return order + self.architecture.first

    def _read(self, seen: Seen, wide: "_Expanded", positions: Tensor, **cached: Any) -> Tensor:
        """Run the language model on expanded ids -> hidden states (R, L, D)."""
        embeds = self.model.get_input_embeddings()(wide.ids.masked_fill(wide.is_image, 0))
        images = torch.cat(seen.images).to(embeds.dtype)
        embeds = embeds.masked_scatter(wide.is_image[:, :, None], images)
        extra: dict[str, Any] = {}
        if self.architecture.marked == "image":
            extra["token_type_ids"] = wide.is_image.long()
        elif self.architecture.marked == "answer":
            extra = {"token_type_ids": (wide.labels != IGNORE).long(), "labels": wide.labels}
        if seen.deep:
            layers = [torch.cat(layer) for layer in seen.deep]
            extra |= {"visual_pos_masks": wide.is_image, "deepstack_visual_embeds": layers}
        output = self.body(
            inputs_embeds=embeds, attention_mask=wide.mask, position_ids=positions, **extra, **cached
        )
        return output.last_hidden_state


def _features(found: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The features (T, D) of each image, and those (all T, D) for each of the first layers.

    transformers 4.57 gives the first, or Qwen3-VL's pair of both; 5 gives an output that has them.
    """
    if hasattr(found, "pooler_output"):
        deep = getattr(found, "deepstack_features", None) or ()
        return found.pooler_output, [torch.cat(tuple(layer)) for layer in deep]
    paired = isinstance(found, tuple) and not isinstance(found[0], Tensor)
    return found if paired else (found, ())


def _rotated(order: Tensor, is_image: Tensor, grids: Tensor) -> Tensor:
    """Positions of tokens by time, row and column, (3, R, L), as Qwen-VL rotates them.

    `order` (R, L) numbers the tokens of a row. Those of the image, marked by `is_image` (R, L), have one
    time, and their rows and columns in its grid (R, 2); the text goes on after the larger of the two.
    """
    (rows, columns), count = grids[:, :, None].unbind(1), is_image.sum(1, keepdim=True)
    first = order.gather(1, is_image.int().argmax(1, keepdim=True))
    within = (order - first).clamp(min=0)
    image = torch.stack([first.expand_as(order), first + within // columns, first + within % columns])
    text = torch.where(order < first, order, order - count + torch.maximum(rows, columns))
    return torch.where(is_image, image, text)


class _Expanded:
    """Ids, mask and labels (R, L) with as many image tokens as each row's image has features.

    `is_image` (R, L) marks them. `places` (R, T) are the places of the given ids; that of the image's token
    is its last one. `left`: rows with fewer image tokens are padded on the left.
    """

    def __init__(
        self, ids: Tensor, mask: Tensor, labels: Tensor, lengths: list[int], image: int, left: bool = False
    ) -> None:
        size, longest = ids.shape[1], max(lengths)
        count = torch.tensor(lengths, device=ids.device)[:, None]
        at = (ids == image).int().argmax(1, keepdim=True)
        shift = longest - count if left else torch.zeros_like(count)
        every = torch.arange(size, device=ids.device)
        self.places = every + (every >= at) * (count - 1) + shift
        place = torch.arange(size + longest - 1, device=ids.device) - shift
        self.is_image = (place >= at) & (place < at + count)
        source = torch.where(place < at + count, torch.minimum(place, at), place - count + 1)
        there = (source >= 0) & (source < size)
        source = source.clamp(0, size - 1)
        # what pads a row must not be the image's token
        self.ids = ids.gather(1, source).where(there, torch.zeros_like(source))
        self.mask = mask.gather(1, source) * there
        self.labels = labels.gather(1, source).where(there, torch.full_like(source, IGNORE))


class Growing:
    """`base.Decoding` over transformers' growing cache.

    `forward` gives the logits (R, V) after tokens (R,). `mask` (R, L) tells what is a token, and `next` (R,)
    are the positions of the next ones. Penalties count the caption alone.
    """

    captured = False

    def __init__(
        self,
        forward: Callable[[Tensor, "Growing"], Tensor],
        logits: Tensor,
        cache: Cache,
        mask: Tensor,
        following: Tensor,
    ) -> None:
        self.forward, self.logits, self.cache = forward, logits, cache
        self.mask, self.next = mask, following
        self.context = mask[:, :0].long()

    def widened(self, width: int) -> "Growing":
        """The same with `width` rows for each image."""
        if width > 1:
            self.cache.batch_repeat_interleave(width)
        self.mask, self.next = (one.repeat_interleave(width, 0) for one in (self.mask, self.next))
        return self

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        logits = self.forward(tokens, self)
        self.next = self.next + 1
        return logits

    def reorder(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.next = self.mask[rows], self.next[rows]


def _unused(config: Any) -> re.Pattern[str]:
    """Matches the names of weights that no caption depends on, so that they must not be trained."""
    patterns = [r"vision_tower\.(vision_model\.)?head\."]
    if config.model_type in ("llava", "llava_next"):
        chosen, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
        states = [chosen] if isinstance(chosen, int) else chosen
        read = max(state if state >= 0 else layers + 1 + state for state in states)
        unread = "|".join(str(layer) for layer in range(read, layers))
        patterns += [
            r"vision_tower\..*post_layernorm\.",
            rf"vision_tower\..*layers\.({unread})\." if unread else "$^",
        ]
    if config.model_type == "instructblip":  # the language model reads the queries' outputs alone
        last = config.qformer_config.num_hidden_layers - 1
        patterns.append(rf"qformer\.encoder\.layer\.{last}\.(intermediate|output)\.")
    return re.compile("|".join(patterns))
