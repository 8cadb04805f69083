"""Forms of a caption for the metrics: in one line, and after the organisers' pre-processing."""

import re
import string

_DIGITS = re.compile(r"\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def collapse(text: str) -> str:
    """The text in one line, for the Java tools: one space for each run of white space, none at the ends."""
    return " ".join(text.split())


def official(text: str) -> str:
    """Lower case, then `number` for runs of digits, then no ASCII punctuation: the 2023 evaluator's order."""
    return _DIGITS.sub("number", text.lower()).translate(_PUNCTUATION)


def is_empty(text: str) -> bool:
    """Whether the text is empty or only white space."""
    return not text.strip()
