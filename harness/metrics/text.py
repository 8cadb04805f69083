"""The text that metrics see: the caption as read, or after the organisers' pre-processing."""

import re
import string

_DIGITS = re.compile(r"\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def collapse(text: str) -> str:
    """The text with each run of white space as one space, none at the ends: one line, for the Java tools."""
    return " ".join(text.split())


def official(text: str) -> str:
    """Lower case, runs of digits as `number`, ASCII punctuation deleted: the 2023 evaluator's order."""
    return _DIGITS.sub("number", text.lower()).translate(_PUNCTUATION)


def is_empty(text: str) -> bool:
    """Whether it holds nothing but white space."""
    return not text.strip()
