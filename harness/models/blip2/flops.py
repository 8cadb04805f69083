"""The FLOPs of one micro batch, from the shape of a BLIP-2 alone: no torch.

They are those of matrix products, two for each multiplication, as torch's FlopCounterMode counts them. A test
compares the two.
"""

from typing import TYPE_CHECKING

from harness.models.base import Work

if TYPE_CHECKING:
    from harness.models.blip2.sizes import Shape

_TRAINED, _FIRST, _FROZEN, _FORWARD = 3, 2, 2, 1
"""Passes over a product: forward, for the gradient of its input, and for the gradient of its weights.

`_FIRST`: the input needs no gradient; `_FROZEN`: the weights need none.
"""


def of(shape: "Shape", work: Work) -> int:
    """FLOPs of the forward and backward pass of one micro batch; sampling is not counted."""
    said = [work] * work.captions + [work.of_samples] * (work.samples > 0)
    read, spoken = (said, []) if shape.language is None else ([], said)
    read = [work] * work.concepts + read
    found = _image(shape, work) + _queries(shape, work, bool(read), bool(spoken))
    return found + sum(_text(shape, one) for one in read) + sum(_speech(shape, one) for one in spoken)


def _linear(tokens: int, inner: int, outer: int) -> int:
    return 2 * tokens * inner * outer


def _attention(work: Work, queries: int, keys: int, width: int, fused: bool = True) -> int:
    """FLOPs of both products of an attention and of their gradients; a fused one repeats one product."""
    once = 2 * _linear(work.batch * queries, width, keys)
    return once * 7 // 2 if fused and work.accelerator else 3 * once


def _image(shape: "Shape", work: Work) -> int:
    c, size = shape.vision, shape.vision["patch_size"]
    tokens, width, mlp = work.batch * shape.patches, c["hidden_size"], c["intermediate_size"]
    patches = _linear(tokens - work.batch, 3 * size**2, width)
    layer = _linear(tokens, width, 4 * width + 2 * mlp)
    attention = 2 * _linear(tokens, width, shape.patches)
    if not work.train_vision:
        return patches + c["num_hidden_layers"] * (layer + attention)
    attention = _attention(work, shape.patches, shape.patches, width)
    return _FIRST * patches + c["num_hidden_layers"] * (_TRAINED * layer + attention)


def _queries(shape: "Shape", work: Work, read: bool, speaks: bool) -> int:
    """FLOPs of the Q-Former's queries; `read`: text attends to their keys and values in each layer."""
    c, tokens = shape.qformer, work.batch * shape.queries
    width, mlp, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    states = (_TRAINED if read else _FORWARD) * 2 * _linear(tokens, width, width)
    seen = _linear(work.batch * shape.patches, c["encoder_hidden_size"], 2 * width)
    found = layers * states
    for number in range(layers):
        # without a language model nothing uses the output of the last layer
        used = speaks or number < layers - 1
        layer = _TRAINED * _linear(tokens, width, 4 * width + 2 * mlp)
        layer += _attention(work, shape.queries, shape.queries, width, fused=False)
        if number % c["cross_attention_frequency"] == 0:
            layer += _TRAINED * _linear(tokens, width, 2 * width)
            layer += (_TRAINED if work.train_vision or not used else _FIRST) * seen
            layer += _attention(work, shape.queries, shape.patches, width, fused=False)
        found += layer if used else layer // _TRAINED
    projected = _linear(tokens, width, shape.language["hidden_size"]) if shape.language and speaks else 0
    return found + _TRAINED * projected


def _text(shape: "Shape", work: Work) -> int:
    """FLOPs of one pass of a text through the Q-Former and its language-model head."""
    c, tokens = shape.qformer, work.batch * work.tokens
    width, mlp = c["hidden_size"], c["intermediate_size"]
    layer = _TRAINED * _linear(tokens, width, 4 * width + 2 * mlp)
    layer += _attention(work, work.tokens, shape.queries + work.tokens, width)
    head = _TRAINED * _linear(tokens, width, width + c["vocab_size"])
    return c["num_hidden_layers"] * layer + head


def _speech(shape: "Shape", work: Work) -> int:
    """FLOPs of the frozen language model on the queries and the caption."""
    c = shape.language or {}
    length, width = shape.queries + work.tokens, c["hidden_size"]
    layer = _FROZEN * _linear(work.batch * length, width, 4 * width + 2 * c["ffn_dim"])
    layer += _attention(work, length, length, width)
    head = _FROZEN * _linear(work.batch * work.tokens, width, c["vocab_size"])
    return c["num_hidden_layers"] * layer + head
