"""The bytes that autograd keeps of one micro batch, from the shape of a BLIP-2 alone: no torch.

Each term counts the tensors that one module of transformers' BLIP-2 saves for its backward pass. A test
compares the sum with torch's saved-tensor hooks on the real 3.8B model without weights.
"""

from typing import TYPE_CHECKING

from harness.models.base import FLOAT, HALF, INDEX, Activations, Work

if TYPE_CHECKING:
    from harness.models.blip2.sizes import Shape


def of(shape: "Shape", work: Work) -> Activations:
    """The activations of one micro batch of a model of this shape."""
    said = [work] * work.captions + [work.of_samples] * (work.samples > 0)
    read, spoken = (said, []) if shape.language is None else ([], said)
    read = [work] * work.concepts + read
    image, image_layer, image_inputs = _image(shape, work)
    layers = [_query_layer(shape, work, number) for number in range(shape.qformer["num_hidden_layers"])]
    states = len(layers) * _states(shape, work)
    inputs = len(layers) * FLOAT * work.batch * shape.queries * shape.qformer["hidden_size"]
    text = sum(_text(shape, one) for one in read)
    speeches = [_speech(shape, one) for one in spoken]
    losses = [_loss(one, shape.qformer["vocab_size"], one is not work) for one in read]
    losses += [_loss(one, shape.language["vocab_size"], one is not work) for one in spoken]
    outside = image + text + states + sum(one[0] for one in speeches) + _queries_in(shape, work)
    speech = sum(layer * len(inputs) for _, layer, inputs in speeches)
    return Activations(
        kept=outside + len(image_inputs) * image_layer + _seen(shape, work) + sum(layers) + speech,
        kept_checkpointed=outside + sum(image_inputs) + inputs + sum(sum(one[2]) for one in speeches),
        casts=_casts(shape, work, bool(read)),
        loss=max(losses),
        layer=max(image_layer, *(one[1] for one in speeches), *layers),
    )


def _loss(work: Work, vocabulary: int, truncates: bool) -> int:
    """Bytes of temporaries of a loss; that of samples also scales and cuts the logits."""
    return work.batch * work.tokens * vocabulary * ((4 if truncates else 2) * FLOAT + work.bytes)


def _image(shape: "Shape", work: Work) -> tuple[int, int, list[int]]:
    """Bytes of the ViT: outside its layers, of one layer, of each layer's input; if frozen, of its output."""
    c, size = shape.vision, HALF if work.vision_half else FLOAT
    tokens, width, mlp = work.batch * shape.patches, c["hidden_size"], c["intermediate_size"]
    if not work.train_vision:
        output = FLOAT * tokens * width
        return 0, 0 if work.half else output, [output]
    pixels = work.batch * 3 * shape.image_size**2 * size
    after = _norm(tokens, width, FLOAT) + FLOAT * tokens * width
    norms = 2 * _norm(tokens, width, FLOAT)
    linear = size * tokens * (6 * width + 2 * mlp)
    heads = c["num_attention_heads"]
    if work.accelerator:
        attention = FLOAT * work.batch * heads * shape.patches
    else:
        attention = size * work.batch * heads * shape.patches**2
    layers = c["num_hidden_layers"]
    return pixels + after, norms + linear + attention, [FLOAT * tokens * width] * layers


def _seen(shape: "Shape", work: Work) -> int:
    """Bytes of the ViT's output in half precision, copied for keys and values of each cross-attention."""
    c = shape.qformer
    crossings = -(-c["num_hidden_layers"] // c["cross_attention_frequency"])
    copies = 2 * crossings if work.half else 0
    return copies * work.bytes * work.batch * shape.patches * shape.vision["hidden_size"]


def _queries_in(shape: "Shape", work: Work) -> int:
    """Bytes of the queries before the first layer and, for the language model, after the last."""
    tokens, width = work.batch * shape.queries, shape.qformer["hidden_size"]
    projected = work.bytes * tokens * width if shape.language and work.says else 0
    return 2 * FLOAT * tokens + _dropped(work, shape, tokens * width, FLOAT) + projected


def _states(shape: "Shape", work: Work) -> int:
    """Bytes kept for the keys and values of the queries in one layer; text attends to them."""
    return 2 * 2 * work.batch * shape.queries * shape.qformer["hidden_size"] if work.half else 0


def _query_layer(shape: "Shape", work: Work, number: int) -> int:
    """Bytes of one Q-Former layer of the queries; by default every second layer attends to the image."""
    c, size = shape.qformer, work.bytes
    tokens, width, mlp = work.batch * shape.queries, c["hidden_size"], c["intermediate_size"]
    inputs = (3 if work.half else 1) * size * tokens * width
    own = inputs + _attention(shape, work, shape.queries) + _output(shape, work, tokens, width)
    feed = size * tokens * (width + mlp) + _output(shape, work, tokens, mlp)
    if number % c["cross_attention_frequency"]:
        return own + feed
    crossing = size * tokens * width + _attention(shape, work, shape.patches)
    return own + crossing + _output(shape, work, tokens, width) + feed


def _attention(shape: "Shape", work: Work, keys: int) -> int:
    """Bytes of queries attending to `keys` tokens: q, k, v, the softmax, its dropout mask and its result."""
    c, size = shape.qformer, work.bytes
    softmax = FLOAT if work.accelerator else size
    cells = work.batch * c["num_attention_heads"] * shape.queries * keys
    rate = c["attention_probs_dropout_prob"] if work.dropout is None else work.dropout
    mask = (1 if work.accelerator else softmax) if rate else 0
    left = size if rate or softmax != size else 0
    return size * work.batch * (shape.queries + 2 * keys) * c["hidden_size"] + cells * (softmax + mask + left)


def _output(shape: "Shape", work: Work, tokens: int, inner: int) -> int:
    """Bytes of BERT's dense layer (from `inner`), dropout and norm over the residual stream in fp32."""
    width = shape.qformer["hidden_size"]
    dropped = _dropped(work, shape, tokens * width, work.bytes)
    return work.bytes * tokens * inner + dropped + _norm(tokens, width, FLOAT)


def _dropped(work: Work, shape: "Shape", numbers: int, size: int) -> int:
    """Bytes of a Q-Former dropout's mask: 1 per number on an accelerator, `size` per number on a CPU."""
    rate = shape.qformer["hidden_dropout_prob"] if work.dropout is None else work.dropout
    return numbers * (1 if work.accelerator else size) if rate else 0


def _norm(tokens: int, width: int, size: int) -> int:
    """Bytes of a layer norm's input, mean and deviation."""
    return size * tokens * (width + 2)


def _text(shape: "Shape", work: Work) -> int:
    """Bytes of one pass of a text through the Q-Former, with the loss over its vocabulary."""
    c, size = shape.qformer, work.bytes
    tokens, width, mlp = work.batch * work.tokens, c["hidden_size"], c["intermediate_size"]
    keys = work.batch * (shape.queries + work.tokens)
    cells = c["num_attention_heads"] * work.tokens * keys
    rate = c["attention_probs_dropout_prob"] if work.dropout is None else work.dropout
    if work.accelerator or not rate:
        attention = size * width * (2 * keys + 2 * tokens) + FLOAT * tokens * c["num_attention_heads"]
        attention += size * work.tokens * (shape.queries + work.tokens)
    else:  # torch's plain products, in fp32 whatever the autocast
        attention = FLOAT * (width * (2 * keys + tokens) + 3 * cells) + size * tokens * width
    inputs = (3 if work.half else 1) * size * tokens * width
    feed = size * tokens * (width + mlp) + _output(shape, work, tokens, mlp)
    after = _dropped(work, shape, tokens * width, size) + _norm(tokens, width, FLOAT)
    layer = inputs + attention + after + feed
    embedded = _norm(tokens, width, FLOAT) + _dropped(work, shape, tokens * width, FLOAT)
    head = 3 * size * tokens * width + _norm(tokens, width, FLOAT if work.accelerator else size)
    loss = _cross_entropy(work, c["vocab_size"])
    return embedded + c["num_hidden_layers"] * layer + head + loss


def _cross_entropy(work: Work, vocabulary: int) -> int:
    """Bytes of the log softmax in fp32 over the next tokens, and of their labels."""
    return work.batch * (work.tokens - 1) * (FLOAT * vocabulary + INDEX)


def _speech(shape: "Shape", work: Work) -> tuple[int, int, list[int]]:
    """Bytes of the frozen OPT: outside its layers with the loss, of one layer, and of each layer's input.

    Its weights have no gradient, so the inputs of its linear layers are not kept.
    """
    c, size = shape.language or {}, work.bytes
    length = shape.queries + work.tokens
    tokens, width = work.batch * length, c["hidden_size"]
    norm = _norm(tokens, width, FLOAT if work.accelerator else size)
    masks = 2 * tokens * width * (1 if work.accelerator else size) if c["dropout"] else 0
    kept = size * tokens * (3 * width + c["ffn_dim"])
    if work.accelerator:
        attention = size * tokens * width + FLOAT * tokens * c["num_attention_heads"]
    else:
        cells = work.batch * c["num_attention_heads"] * length**2
        attention = cells * (FLOAT + (size if work.half else 0))
    outside = norm + _cross_entropy(work, c["vocab_size"])
    outside += size * work.batch * length**2 if work.accelerator else 0
    return outside, 2 * norm + masks + kept + attention, [size * tokens * width] * c["num_hidden_layers"]


def _casts(shape: "Shape", work: Work, reads: bool) -> int:
    """Bytes of the weights of convolution and linear layers that autocast holds in half precision."""
    vision, c, language = shape.vision, shape.qformer, shape.language
    wide, width, mlp = vision["hidden_size"], c["hidden_size"], c["intermediate_size"]
    layers = c["num_hidden_layers"]
    weights = 0
    if work.vision_half and work.train_vision:
        layer = 4 * wide**2 + 2 * wide * vision["intermediate_size"]
        weights += 3 * wide * vision["patch_size"] ** 2 + vision["num_hidden_layers"] * layer
    if work.half:
        crossings = -(-layers // c["cross_attention_frequency"])
        weights += layers * (4 * width**2 + 2 * width * mlp) + crossings * 2 * width * (width + wide)
        weights += layers * 2 * width * mlp + width * (width + c["vocab_size"]) if reads else 0
        weights += width * language["hidden_size"] if language and work.says else 0
    return HALF * weights
