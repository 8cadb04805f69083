"""Where the queries look in an image: the attention of the Q-Former over the patches of the ViT."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from harness.models.blip2.model import Captioner

LAYERS = 2
"""The last layers with attention over the image, whose mean is taken."""
SIDE = 16
"""A finer map is pooled to at most so many rows and columns."""


@contextlib.contextmanager
def watched(model: "Captioner") -> Iterator[Callable[[], Tensor | None]]:
    """While it is open, the function gives where the queries looked in the last batch of images.

    The map is uint8 (B, h, w), rows and columns of the image as the model gets it, 255 where it looks most:
    the mean over queries, heads and `LAYERS`. It is None before the first batch. The forward pass is only
    read, so captions do not change. A layer costs one more product of queries and keys.
    """
    layers = model.qformer.encoder.layer
    if model.language_model is None:
        layers = layers[:-1]  # text attends to the queries at a layer's input
    watching = [
        _Watch(layer.crossattention.attention) for layer in layers if hasattr(layer, "crossattention")
    ]

    def seen() -> Tensor | None:
        maps = [one.map for one in watching[-LAYERS:] if one.map is not None]
        return _picture(torch.stack(maps).mean(0)) if maps else None

    with contextlib.ExitStack() as opened:
        for one in watching[-LAYERS:]:
            opened.enter_context(one)
        yield seen


class _Watch:
    """The attention of a layer, from the outputs of its linear layers; `map` is (B, tokens of the image)."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention, self.map = attention, None
        self._parts: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        self._hooks = [
            getattr(self.attention, name).register_forward_hook(self._keep(name)) for name in ("query", "key")
        ]

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, given: Any, out: Tensor) -> None:
            self._parts[name] = out
            if len(self._parts) == 2:
                self.map = _mean_attention(
                    **{key: one.detach() for key, one in self._parts.items()},
                    heads=self.attention.num_attention_heads,
                )
                self._parts = {}

        return keep


def _mean_attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Queries (B, Q, D) and keys (B, P, D) -> the mean of attention over queries and heads, (B, P)."""
    queries, keys = (one.unflatten(-1, (heads, -1)) for one in (query, key))
    total = torch.zeros(key.shape[:2], device=key.device)
    for head in range(heads):  # one at a time needs little memory
        scores = queries[:, :, head] @ keys[:, :, head].transpose(1, 2)
        total += (scores.float() / math.sqrt(queries.shape[-1])).softmax(-1).mean(1)
    return total / heads


def _picture(attention: Tensor) -> Tensor | None:
    """(B, 1 + patches) -> uint8 (B, h, w), relative to the most in each image; None if it is no square."""
    patches = attention[:, 1:]  # the first token is of no part of the image
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        return None
    size = math.ceil(side / SIDE)
    maps = F.avg_pool2d(patches.unflatten(1, (side, side)), size, ceil_mode=True, count_include_pad=False)
    return (255 * maps / maps.amax((1, 2), keepdim=True)).round().to(torch.uint8).cpu()
