"""The text that metrics see: the organisers' pre-processing, and line breaks made harmless."""

import re
import string

_DIGITS = re.compile(r"\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def one_line(text: str) -> str:
    """The text with every line break (\\r, \\x0b, \\x0c, U+0085, U+2028 and their kin) as one space.

    Other white space stays: DeBERTa's tokenizer tells one space from two, as the official evaluator does.
    """
    return " ".join(text.splitlines())


def collapse(text: str) -> str:
    """The text with each run of white space as one space, none at the ends."""
    return " ".join(text.split())


def official(text: str) -> str:
    """Lower case, runs of digits as `number`, ASCII punctuation deleted: the 2023 evaluator's order."""
    return _DIGITS.sub("number", text.lower()).translate(_PUNCTUATION)


def is_empty(text: str) -> bool:
    """Whether nothing but white space is left."""
    return not text.strip()
