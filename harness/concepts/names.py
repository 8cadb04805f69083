"""The concepts whose names are in a caption: the baseline that needs a captioner only."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_TOKEN = re.compile(r"[^\W_]+|[.;:!?](?=\s|$)")
_POSSESSIVE = re.compile(r"['’]s\b")
_QUALIFIER = re.compile(r"\s*[(\[][^()\[\]]*[)\]]\s*$")
_KEPT = ("ss", "us", "is")  # abscess, thrombus, pelvis
_CUI = ""  # the key of a name that ends at this node; no word is empty


class Names:
    """The names of concepts as a tree of words, so that a caption is read once whatever their number.

    Words are compared without case, punctuation, plural and possessive. A name of UMLS that ends with a
    qualifier, as `Coronal (qualifier value)`, is also known without it. Names of one character are not known.
    A name of several concepts is that of the first one in `labels`, which is the most frequent one, or else
    of the first by CUI. A whole name comes before one that lost its qualifier.
    """

    def __init__(self, names: Mapping[str, str], labels: Sequence[str]) -> None:
        self.tree: dict[str, Any] = {}
        rank = {cui: place for place, cui in enumerate(labels)}
        ordered = sorted(names, key=lambda cui: (rank.get(cui, len(rank)), cui))
        for forms in ([(cui, names[cui]) for cui in ordered], [(cui, _bare(names[cui])) for cui in ordered]):
            for cui, name in forms:
                self._add(cui, name)

    def _add(self, cui: str, name: str) -> None:
        words = [word for word in _words(name) if word[0].isalnum()]
        if sum(map(len, words)) < 2:
            return
        node = self.tree
        for word in words:
            node = node.setdefault(word, {})
        node.setdefault(_CUI, cui)

    def find(self, caption: str) -> list[str]:
        """The CUIs of the names in a caption, in their order there, each once.

        At each word the longest name is taken, and the search goes on behind it: names do not overlap, and
        none spans two sentences.
        """
        words, found, at = _words(caption), {}, 0
        while at < len(words):
            cui, end = self._longest(words, at)
            found |= {cui: None} if cui else {}
            at = end if cui else at + 1
        return list(found)

    def _longest(self, words: Sequence[str], at: int) -> tuple[str | None, int]:
        node, best, end = self.tree, None, at
        for place in range(at, len(words)):
            node = node.get(words[place])
            if node is None:
                break
            if _CUI in node:
                best, end = node[_CUI], place + 1
        return best, end


def from_captions(captions: Sequence[str], names: Mapping[str, str], labels: Sequence[str]) -> np.ndarray:
    """1 for each label whose name is in a caption, else 0: float32 (N, L) of N captions.

    `names` are those of all concepts by CUI. A longer name of a concept without a label still hides a shorter
    one: `lung cancer` is not `lung`.
    """
    known = Names(names, labels)
    place = {cui: number for number, cui in enumerate(labels)}
    found = np.zeros((len(captions), len(labels)), dtype=np.float32)
    for row, caption in enumerate(captions):
        found[row, [place[cui] for cui in known.find(caption) if cui in place]] = 1
    return found


def _words(text: str) -> list[str]:
    """The words of a text as they are compared; the mark that ends a sentence is a word of its own."""
    return [_singular(word) for word in _tokens(text)]


def _tokens(text: str) -> Iterator[str]:
    return (match.group() for match in _TOKEN.finditer(_POSSESSIVE.sub("", text.casefold())))


def _singular(word: str) -> str:
    """The word without an English plural; words in -ss, -us and -is are none."""
    if len(word) < 4 or not word.endswith("s") or word.endswith(_KEPT):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("sses", "xes")) else word[:-1]


def _bare(name: str) -> str:
    """A name without the qualifier in parentheses or brackets at its end; a name of nothing else stays."""
    return _QUALIFIER.sub("", name) or name
