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
    """The codec of captions for the language model: start, prompt, caption, end (a line break for OPT)."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else text_config.bos_token_id
    ids = tokenizer(prompt, add_special_tokens=False).input_ids if prompt else []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else text_config.pad_token_id
    separator = " " if prompt else ""
    return Codec(tokenizer, (start, *ids), text_config.eos_token_id, pad, max_tokens, separator, prompt)


def qformer_codec(tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> Codec:
    """The codec of text for the Q-Former's own language model: [DEC] in place of [CLS], text, [SEP]."""
    start = tokenizer.convert_tokens_to_ids(DEC)
    return Codec(tokenizer, (start,), tokenizer.sep_token_id, tokenizer.pad_token_id, max_tokens)
