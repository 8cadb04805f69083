"""The two codecs of BLIP-2: one for its language model, one for the Q-Former's text path."""

from typing import TYPE_CHECKING, Any

from harness.models.text import Codec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEC = "[DEC]"
"""The start token of the Q-Former's text path, which BERT lacks."""


def language_codec(
    tokenizer: "PreTrainedTokenizerBase", text_config: Any, prompt: str, max_tokens: int
) -> Codec:
    """The codec of captions for the language model: start, prompt, caption, end.

    The end is that of the model's config, which is a line break for BLIP-2's OPT, else the tokenizer's. A
    model without a start token, such as Qwen2, starts with its end token, and one without padding pads with
    it. The mask hides padding.
    """

    def known(name: str, *others: int | None) -> int | None:
        given = (getattr(tokenizer, name), getattr(text_config, name, None), *others)
        return next((one for one in given if one is not None), None)

    end = text_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    end = known("eos_token_id") if end is None else end
    ids = tokenizer(prompt, add_special_tokens=False).input_ids if prompt else []
    separator = " " if prompt else ""
    start, pad = known("bos_token_id", end), known("pad_token_id", end)
    return Codec(tokenizer, (start, *ids), end, pad, max_tokens, separator, prompt)


def qformer_codec(tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> Codec:
    """The codec of text for the Q-Former's own language model: [DEC] in place of [CLS], text, [SEP]."""
    start = tokenizer.convert_tokens_to_ids(DEC)
    return Codec(tokenizer, (start,), tokenizer.sep_token_id, tokenizer.pad_token_id, max_tokens)
