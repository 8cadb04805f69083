"""BLIP-2: ViT, Q-Former with its text path, and an optional frozen language model; losses and decoding.

Parameters have the names of transformers' Blip2 classes, so `from_pretrained` reads the published
checkpoints: the captioning ones (ViT, query path, OPT), `blip2-itm-vit-g` (text path, `embeddings`) and
`bert-base-uncased` (`cls`, the head of the text path).
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Blip2Config, PreTrainedModel
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2PreTrainedModel,
    Blip2QFormerModel,
    Blip2TextEmbeddings,
    Blip2VisionModel,
)

from harness.models import head, parts
from harness.models.base import Losses, Samples
from harness.models.blip2 import attention
from harness.models.cache import CachedDecoding, Speaker, logits_of
from harness.models.text import summed_loss

QueryStates = list[tuple[Tensor, Tensor]]


class Captioner(Blip2PreTrainedModel):
    """BLIP-2 with the Q-Former's own language model, with or without OPT after it.

    Text attends to the queries and, causally, to itself; queries never attend to text. So the query outputs
    do not depend on text, and one pass of ViT and queries serves both losses. `tied` are the names of weights
    that are tied to others, and are neither saved nor looked for.
    """

    config: Blip2Config
    _supports_flash_attn = False
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: Blip2Config, language_model: bool = True) -> None:
        config.tie_word_embeddings = True
        super().__init__(config)
        config.qformer_config.use_qformer_text_input = True
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.query_tokens = nn.Parameter(
            torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size)
        )
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config, attn_implementation="eager")
        self.text_dropout: float = config.qformer_config.attention_probs_dropout_prob
        self.embeddings = Blip2TextEmbeddings(config.qformer_config)
        self.embeddings.word_embeddings.padding_idx = None  # else transformers 5 begins with zeros in its row
        self.cls = nn.Sequential(OrderedDict(predictions=_Head(config.qformer_config)))
        self.tied = frozenset(self._tied_weights_keys)
        self.language_projection = self.language_model = None
        if language_model:
            # drawn before the language model
            projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
            self.speak_by(AutoModelForCausalLM.from_config(config.text_config), projection)
        self.trained_parts: Collection[str] = frozenset({"vision", "connector"})
        self.head: head.Head | None = None
        self.feature_width, self.class_tokens = config.qformer_config.hidden_size, 0
        self.autocast_dtype: torch.dtype | None = None
        self.vision_in_fp32 = False
        self.post_init()

    def speak_by(self, language_model: PreTrainedModel, projection: nn.Linear | None = None) -> None:
        """Write captions by a causal language model, behind `projection` or a new one."""
        inner, outer = self.config.qformer_config.hidden_size, language_model.config.hidden_size
        self.language_projection = projection or nn.Linear(inner, outer)
        self.language_model = language_model
        ties = getattr(language_model.config, "tie_word_embeddings", False)
        tied = language_model._tied_weights_keys or () if ties else ()
        own = type(self)._tied_weights_keys
        self.tied = frozenset([*own, *(f"language_model.{key}" for key in tied)])
        if isinstance(language_model._tied_weights_keys, list):  # transformers 4; peft wants all alike
            self._tied_weights_keys = sorted(self.tied)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def _tie_weights(self) -> None:
        """What transformers 4 calls; 5 reads `_tied_weights_keys`."""
        self.cls.predictions.decoder.weight = self.embeddings.word_embeddings.weight
        self.cls.predictions.decoder.bias = self.cls.predictions.bias

    def autocast(self) -> torch.autocast:
        """The precision of every forward pass: fp32, or autocast to `autocast_dtype`."""
        return parts.autocast(self.device, self.autocast_dtype)

    def see(self, pixels: Tensor) -> tuple[Tensor, QueryStates]:
        """Run ViT and queries: pixels (B, 3, S, S), normalised -> query outputs (B, Q, D) and, per Q-Former
        layer, the queries' keys and values (B, heads, Q, D / heads) that text attends to."""
        mixed = torch.is_autocast_enabled(pixels.device.type) and not self.vision_in_fp32
        with torch.autocast(pixels.device.type, dtype=self.autocast_dtype, enabled=mixed):
            image = self.vision_model(pixel_values=pixels).last_hidden_state
        hidden = self.qformer.layernorm(self.query_tokens.expand(len(pixels), -1, -1))
        hidden = self.qformer.dropout(hidden)
        states = []
        for layer in self.qformer.encoder.layer:
            attention = layer.attention.attention
            keys, values = attention.key(hidden), attention.value(hidden)
            states.append((_heads(attention, keys), _heads(attention, values)))
            hidden = layer(hidden, encoder_hidden_states=image, query_length=hidden.shape[1])
        return hidden, states

    def read(self, ids: Tensor, states: QueryStates, kept: QueryStates | None = None) -> Tensor:
        """Run the Q-Former's text path on ids (B, T) -> logits (B, T, V).

        `kept` gets the keys and values of queries and text, (B, heads, Q + T, D / heads), of each layer.
        """
        length, queries = ids.shape[1], states[0][0].shape[2]
        # added to the scores: some NPUs read boolean masks the other way round (Ascend/pytorch issue 88)
        size, like = (length, queries + length), {"dtype": states[0][0].dtype, "device": ids.device}
        mask = torch.full(size, -torch.inf, **like).triu(queries + 1)

        def attended(keys: Tensor, values: Tensor, number: int) -> tuple[Tensor, Tensor]:
            pairs = zip(states[number], (keys, values), strict=True)
            both = tuple(torch.cat(pair, dim=2) for pair in pairs)
            if kept is not None:
                kept.append(both)
            return both

        return self._read(ids, torch.arange(length, device=ids.device)[None], mask, attended)

    def _read(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        attended: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The text path; `attended` gives all keys and values of a layer from those of ids (B, T)."""
        hidden = self.qformer.layernorm(self.embeddings(ids, position_ids=positions))
        hidden = self.qformer.dropout(hidden)
        for number, layer in enumerate(self.qformer.encoder.layer):
            attention = layer.attention.attention
            keys, values = attended(
                _heads(attention, attention.key(hidden)),
                _heads(attention, attention.value(hidden)),
                number,
            )
            context = F.scaled_dot_product_attention(
                _heads(attention, attention.query(hidden)),
                keys,
                values,
                attn_mask=mask,
                dropout_p=self.text_dropout if self.training else 0.0,
            )
            hidden = layer.attention.output(context.transpose(1, 2).flatten(2), hidden)
            hidden = layer.feed_forward_chunk(hidden)
        return self.cls(hidden)

    def _speak(self, queries: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the language model on [projected queries; ids (B, T)] -> logits (B, T, V) of the ids."""
        prefix = self.language_projection(queries)
        embeds = self.language_model.get_input_embeddings()(ids)
        everything = torch.cat([prefix.to(embeds.dtype), embeds], dim=1)
        ones = mask.new_ones(prefix.shape[:2])
        seen = torch.cat([ones, mask], dim=1)
        return logits_of(self.language_model, everything, ids.shape[1], attention_mask=seen)

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

        pixels (B, 3, S, S). `caption` and `concept` hold ids, mask and labels, each (B, T), labels -100 for
        tokens without a loss. Caption ids are the language model's if there is one, else the Q-Former's.
        `concepts` (B, L) are labels, predicted from the query outputs. Label smoothing affects only the
        Q-Former's losses, as in LAVIS.
        """
        with self.autocast():
            queries, states = self.see(pixels)
            caption_loss = concept_loss = reward_loss = concepts_loss = None
            if concept is not None:
                logits = self.read(concept["ids"], states)
                concept_loss = summed_loss(logits, concept["labels"], label_smoothing)
            if caption is not None and self.language_model is not None:
                logits = self._speak(queries, caption["ids"], caption["mask"])
                caption_loss = summed_loss(logits, caption["labels"], 0.0)
            elif caption is not None:
                logits = self.read(caption["ids"], states)
                caption_loss = summed_loss(logits, caption["labels"], label_smoothing)
            if samples is not None:
                reward_loss = samples.loss(self._say(queries, states, samples.text))
            if concepts is not None:
                concepts_loss = self.head.loss(queries, concepts)
        return Losses(caption_loss, concept_loss, reward_loss, concepts_loss)

    def _say(self, queries: Tensor, states: QueryStates, text: Mapping[str, Tensor]) -> Tensor:
        """Logits (B * N, T, V) of captions, N for each image; see `see` for `queries` and `states`."""
        count = len(text["ids"]) // len(queries)
        if self.language_model is not None:
            return self._speak(queries.repeat_interleave(count, 0), text["ids"], text["mask"])
        repeated = [tuple(one.repeat_interleave(count, 0) for one in pair) for pair in states]
        return self.read(text["ids"], repeated)

    @contextlib.contextmanager
    def decoder(self, width: int, length: int) -> Iterator[Callable[[Tensor, Tensor], CachedDecoding]]:
        """A function that begins the captions of pixels (B, 3, S, S), which follow the prompts (B, P).

        Each image has `width` rows and room for `length` new tokens.
        """
        with torch.no_grad(), self.autocast():
            if self.language_model is None:
                yield _Reader(self, width, length)
            else:
                speaker = Speaker(self.language_model, width, length)
                yield lambda pixels, prompts: speaker(self._prefix(pixels, prompts))

    def _prefix(self, pixels: Tensor, prompts: Tensor) -> Tensor:
        """What the language model goes on from: projected queries and words of prompts (B, P), (B, T, D)."""
        queries = self.language_projection(self.see(pixels)[0])
        words = self.language_model.get_input_embeddings()(prompts)
        return torch.cat([queries.to(words.dtype), words], dim=1)

    def looking(self) -> contextlib.AbstractContextManager[Callable[[], Tensor | None]]:
        """See `attention.watched`."""
        return attention.watched(self)

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """The query outputs: pixels (B, 3, S, S) -> (B, Q, D)."""
        with self.autocast():
            return self.see(pixels)[0]

    def resize_images(self, size: int) -> None:
        """Resize the position table once for square images of `size` pixels (bicubic, as LAVIS does)."""
        embeddings = self.vision_model.embeddings
        patches = (size // embeddings.patch_size) ** 2
        placeholder = torch.empty(1, patches + 1, embeddings.embed_dim)
        with torch.no_grad():
            table = embeddings.interpolate_pos_encoding(placeholder, size, size)
        embeddings.position_embedding = nn.Parameter(table.clone())
        embeddings.num_patches, embeddings.num_positions = patches, patches + 1
        embeddings.image_size = self.config.vision_config.image_size = size

    def compute_in(self, dtype: torch.dtype | None, vision_in_fp32: bool) -> None:
        """Set the precision of every forward pass, and of the frozen language model's weights."""
        self.autocast_dtype, self.vision_in_fp32 = dtype, vision_in_fp32
        for name, weight in self.named_parameters():
            if name.startswith("language_model.") and not parts.changes(self, name):
                weight.data = weight.data.to(dtype or torch.float32)

    def use_plain_attention(self) -> None:
        """Use plain products for attention in ViT and language model; the Q-Former's queries always do."""
        for part in (self.vision_model, self.language_model):
            if part is not None:
                part.set_attn_implementation("eager")

    def parts_to_compile(self, how: Literal["layers", "whole"]) -> list[nn.Module]:
        """The ViT's layers or its encoder; text differs in length, so its layers would be compiled often."""
        encoder = self.vision_model.encoder
        return list(encoder.layers) if how == "layers" else [encoder]

    def part_of(self, name: str) -> str:
        """The part of a weight; queries, Q-Former with its text path, and projection are the connector."""
        return {"vision_model": "vision", "language_model": "language"}.get(name.split(".")[0], "connector")

    def is_saved(self, name: str) -> bool:
        """Whether fine-tuning may change a weight; tied weights once."""
        return parts.is_saved(self, name, self.tied)

    def freeze(self, losses: Collection[str]) -> None:
        """Freeze what is never trained, and what none of these losses needs."""
        parts.train_only(self)
        head.freeze(self, losses)
        layers, writes = self.qformer.encoder.layer, bool({"caption", "reward"} & set(losses))
        if "concept" not in losses and (self.language_model is not None or not writes):
            # nothing reads by the text path
            reading = [part for layer in layers for part in (layer.intermediate, layer.output)]
            for part in (self.embeddings, self.cls, *reading):
                part.requires_grad_(False)
        if not writes and self.language_model is not None:
            self.language_model.requires_grad_(False)
            self.language_projection.requires_grad_(False)
        if "concepts" not in losses and (self.language_model is None or not writes):
            # text attends to the queries at a layer's input, so nothing uses the last layer's query output
            for name in ("crossattention", "intermediate_query", "output_query"):
                if hasattr(layers[-1], name):
                    getattr(layers[-1], name).requires_grad_(False)


class _Head(nn.Module):
    """BERT's head of masked language modelling, whose decoder gets the weights of the word embeddings.

    transformers' own draws more random numbers in 5 than in 4, so that whatever is made after it differs.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = self.decoder.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))


class _Reader(CachedDecoding):
    """Decoding with the Q-Former's text path."""

    def __init__(self, model: Captioner, width: int, length: int) -> None:
        super().__init__(width, length, model.device.type)
        self.model = model

    def __call__(self, pixels: Tensor, prompts: Tensor) -> CachedDecoding:
        kept: QueryStates = []
        states = self.model.see(pixels)[1]
        logits = self.model.read(prompts, states, kept)
        return self.begin(logits[:, -1], kept, prompts)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = (self.position - self.model.config.num_query_tokens)[None]
        return self.model._read(tokens[:, None], positions, self.mask, self.update)[:, -1]


def _heads(attention: nn.Module, states: Tensor) -> Tensor:
    """Split (B, T, D) into the heads of an attention, (B, heads, T, D / heads)."""
    return states.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
