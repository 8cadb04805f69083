"""The ids of transformers' slow tokenizers, made with the parts of the fast ones.

bert-score uses slow tokenizers, which transformers 5 no longer has. On some Unicode the two kinds take a text
apart in other ways: Python splits it into words here, as a slow tokenizer does, and only then come the fast
one's pieces.
"""

import unicodedata
from collections.abc import Callable
from typing import Any

_BYTE_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CHINESE = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)
"""What BERT takes for Chinese characters, each a word."""


def of(fast: Any) -> Callable[[str], list[int]] | None:
    """A function from a text to ids with special tokens; None if this tokenizer is not of a known kind.

    Known are word pieces as BERT's, and byte pairs as GPT-2's, RoBERTa's and DeBERTa's. Special tokens that
    are written in a text are taken apart like other text.
    """
    from tokenizers import models, normalizers, pre_tokenizers

    backend = getattr(fast, "backend_tokenizer", None)
    if backend is None:
        return None
    model, normalizer, splitter = backend.model, backend.normalizer, backend.pre_tokenizer
    if isinstance(model, models.WordPiece) and isinstance(normalizer, normalizers.BertNormalizer):
        return _Ids(fast, lambda text: bert_words(text, normalizer))
    if isinstance(model, models.BPE) and isinstance(splitter, pre_tokenizers.ByteLevel) and not normalizer:
        return _Ids(fast, lambda text: byte_words(text, splitter.add_prefix_space))
    return None


class _Ids:
    def __init__(self, fast: Any, words: Callable[[str], list[str]]) -> None:
        self.model, self.words = fast.backend_tokenizer.model, words
        around = fast("")["input_ids"]
        self.before, self.after = around[: len(around) // 2], around[len(around) // 2 :]

    def __call__(self, text: str) -> list[int]:
        pieces = [piece.id for word in self.words(text) for piece in self.model.tokenize(word)]
        return [*self.before, *pieces, *self.after]


def byte_words(text: str, prefix: bool) -> list[str]:
    """The words of GPT-2's tokenizer, each byte as its letter; `prefix`: the first word gets a space, too."""
    import regex

    letters = _letters()
    text = " " + text if prefix and text and not text[0].isspace() else text
    return ["".join(letters[byte] for byte in word.encode()) for word in regex.findall(_BYTE_WORDS, text)]


def _letters() -> list[str]:
    """GPT-2's letter of each byte: itself if Latin-1 prints it, else one of those that follow U+00FF."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def bert_words(text: str, how: Any) -> list[str]:
    """The words of BERT's tokenizer; `how` says what it does: `lowercase`, `strip_accents` and the like."""
    if how.lowercase:
        text = "".join(letter.lower() for letter in text)
    if how.clean_text:
        text = "".join(map(_cleaned, text))
    if how.handle_chinese_chars:
        text = "".join(f" {letter} " if _is_chinese(letter) else letter for letter in text)
    words = unicodedata.normalize("NFC", text).split()
    if how.lowercase if how.strip_accents is None else how.strip_accents:
        words = [_without_accents(word) for word in words]
    spaced = "".join(f" {letter} " if _is_punctuation(letter) else letter for letter in " ".join(words))
    return spaced.split()


def _cleaned(letter: str) -> str:
    category = unicodedata.category(letter)
    if letter in " \t\n\r" or category == "Zs":
        return " "
    return "" if letter == "\ufffd" or category.startswith("C") else letter


def _is_chinese(letter: str) -> bool:
    return any(first <= ord(letter) <= last for first, last in _CHINESE)


def _without_accents(word: str) -> str:
    return "".join(one for one in unicodedata.normalize("NFD", word) if unicodedata.category(one) != "Mn")


def _is_punctuation(letter: str) -> bool:
    ascii_sign = "!" <= letter <= "~" and not letter.isalnum()
    return ascii_sign or unicodedata.category(letter).startswith("P")
