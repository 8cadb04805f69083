"""Decoding with a transformer: one token a row and step, over keys and values that are kept.

Memory for keys and values is reserved once, and attention reads the part that is filled. On CUDA, attention
reads all of it under a mask. Then every step has the same shapes and can be captured as a graph: the host
starts one graph for each token instead of hundreds of kernels.
"""

import functools
import inspect
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from harness.machine.device import module

States = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (B, heads, T, D)."""
_WARM_UPS = 3


class CachedDecoding(Cache):
    """`base.Decoding` of a transformer; it is also the cache that transformers' models write.

    Each image has `width` rows and room for `length` new tokens; `kind` is the kind of the device. Batches of
    one object share memory and graphs, so it must not outlive a change of the model.
    """

    captured: bool

    def __init__(self, width: int, length: int, kind: str) -> None:
        super().__init__(layers=[])
        self.width, self.new, self.captured = width, length, kind == "cuda"
        self.stores: list[tuple[Tensor, Tensor]] = []
        self.graphs: dict[int, _Graph | None] = {}

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """The logits (R, V) that follow these tokens (R,), whose keys and values it gives to `update`."""

    def begin(self, logits: Tensor, states: States, context: Tensor) -> "CachedDecoding":
        """Start a batch of images from the states of their prefix and the logits (B, V) that follow it."""
        self.logits, self.context = logits, context
        images, self.prefix = len(logits), states[0][0].shape[2]
        self.rows = images * self.width
        if not self.stores or len(self.stores[0][0]) < self.rows or self.room < self.prefix + self.new:
            self._reserve(states)
        for store, given in zip(self.stores, states, strict=True):
            for kept, one in zip(store, given, strict=True):
                kept[: self.rows, :, : self.prefix].unflatten(0, (images, self.width)).copy_(one[:, None])
        self._move_to(self.prefix)
        return self

    def step(self, tokens: Tensor) -> Tensor:
        """The logits (R, V) that follow these tokens (R,); the next step may overwrite them."""
        logits = self._replay(tokens) if self.captured else self.forward(tokens)
        self._move_to(self.length + 1)
        return logits

    def reorder(self, rows: Tensor) -> None:
        """Let each row go on from one of `rows` (R,), which has the same image and so the same prefix."""
        for store in self.stores:
            for kept in store:
                part = kept[: self.rows, :, self.prefix : self.length]
                part.copy_(part.index_select(0, rows))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        for store in self.stores:
            for kept in store:
                kept[: len(rows), :, : self.length] = kept[:, :, : self.length].index_select(0, rows)
        self.rows = len(rows)

    @property
    def mask(self) -> Tensor:
        """What attention adds to its scores, (1, 1, 1, T): the lowest number where nothing is stored yet."""
        keys = self.stores[0][0]
        if not self.captured:
            return keys.new_zeros(1, 1, 1, self.length + 1)
        empty = torch.arange(self.room, device=keys.device) > self.position
        return keys.new_zeros(1, 1, 1, self.room).masked_fill(empty, torch.finfo(keys.dtype).min)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (R, heads, 1, D) of this step -> those that attention reads."""
        keys, values = (kept[: self.rows] for kept in self.stores[layer_idx])
        if self.captured:
            keys.index_copy_(2, self.position, key_states)
            values.index_copy_(2, self.position, value_states)
            return keys, values
        keys[:, :, self.length] = key_states[:, :, 0]
        values[:, :, self.length] = value_states[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens that are stored; transformers' models ask for it."""
        return self.length

    def _move_to(self, length: int) -> None:
        self.length = length
        self.position.fill_(length)

    def _reserve(self, states: States) -> None:
        self.room = self.prefix + self.new
        if self.captured:
            self.room = -8 * (-self.room // 8)  # fused attention pads other masks in each step
        self.graphs, self.stores = {}, []  # before new memory is taken
        self.stores = [
            tuple(one.new_zeros(self.rows, one.shape[1], self.room, one.shape[3]) for one in pair)
            for pair in states
        ]
        self.position = torch.zeros(1, dtype=torch.long, device=states[0][0].device)

    def _replay(self, tokens: Tensor) -> Tensor:
        """One step by the graph for this number of rows, or without it if it could not be captured."""
        if self.rows not in self.graphs:
            self.graphs[self.rows] = self._capture(tokens.clone())
        graph = self.graphs[self.rows]
        if graph is None:
            return self.forward(tokens)
        graph.tokens.copy_(tokens)
        graph.graph.replay()
        return graph.logits

    def _capture(self, tokens: Tensor) -> "_Graph | None":
        """Capture a step as PyTorch's notes on CUDA graphs say; the replay stores again what it stores."""
        device = tokens.device.type
        # a graph must not read casts of weights that autocast frees at the end of its context
        casts = torch.autocast(
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        )
        cuda = module("cuda")
        try:
            with casts:
                side = cuda.Stream()
                side.wait_stream(cuda.current_stream())
                with cuda.stream(side):
                    for _ in range(_WARM_UPS):
                        self.forward(tokens)
                cuda.current_stream().wait_stream(side)
                graph = cuda.CUDAGraph()
                with cuda.graph(graph):
                    logits = self.forward(tokens)
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            logging.getLogger(__name__).warning("Decoding goes on without a CUDA graph: %s", first)
            return None
        return _Graph(graph, tokens, logits)


@dataclass(frozen=True)
class _Graph:
    """A captured step with the tensors that it reads and writes."""

    graph: Any
    tokens: Tensor
    logits: Tensor


@functools.cache
def _arguments(kind: type[PreTrainedModel]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def keyword(model: PreTrainedModel) -> str:
    """The argument of a model for its cache: `cache` in newer releases of transformers 5."""
    return "cache" if "cache" in _arguments(type(model)) else "past_key_values"


def logits_of(
    model: PreTrainedModel, embeds: Tensor, last: int, cache: Cache | None = None, **inputs: Any
) -> Tensor:
    """The logits (B, last, V) after the last of embeddings (B, T, D), by a causal language model.

    Some models scale or cap the logits of their head, such as Gemma 2 and Granite, so their own forward pass
    computes them. Older ones cannot leave out the logits of other tokens, and change none.
    """
    inputs |= {"inputs_embeds": embeds, "use_cache": cache is not None, keyword(model): cache}
    if "logits_to_keep" in _arguments(type(model)):
        return model(logits_to_keep=last, **inputs).logits
    hidden = model.base_model(**inputs).last_hidden_state[:, -last:]
    return model.get_output_embeddings()(hidden)


class Speaker(CachedDecoding):
    """Decoding with a causal language model of transformers, after a prefix of embeddings."""

    def __init__(self, model: PreTrainedModel, width: int, length: int) -> None:
        super().__init__(width, length, model.device.type)
        self.model = model

    def __call__(self, embeds: Tensor) -> CachedDecoding:
        """Begin after the prefix of each image, embeddings (B, T, D), which is read once for all its rows."""
        cache, seen = DynamicCache(), embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        logits = logits_of(self.model, embeds, 1, cache, attention_mask=seen)
        states = [(layer.keys, layer.values) for layer in cache.layers]
        return self.begin(logits[:, 0], states, seen[:, :0])

    def forward(self, tokens: Tensor) -> Tensor:
        logits = logits_of(
            self.model,
            self.model.get_input_embeddings()(tokens[:, None]),
            1,
            self,
            attention_mask=self.mask,
            position_ids=self.position[None],
            cache_position=self.position,
        )
        return logits[:, 0]
