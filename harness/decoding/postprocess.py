"""Post-processing of captions before submission: repetitions, white space, capital letter, full stop."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from operator import eq

from harness.config.sections import Section

VERSION = 2
"""Increase it when the code gives another result for the same caption; part of the step's fingerprint."""

_RUNS = (
    # Digits do not count (10000 is a number), and three in a row are allowed ("III", "...").
    re.compile(r"([^\w\s])\1{3,}"),
    re.compile(r"([^\W\d_]{1,8}?)\1{3,}"),
)
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")
_STOPS = (".", "!", "?", "…", "。")
_CLOSERS = "\"')]}”’»"
_FUNCTION_WORDS = frozenset(
    ["a", "an", "and", "as", "at", "by", "for", "from", "in", "into", "of", "on", "or", "the", "to", "with"]
)
_ARTICLES = frozenset(["a", "an", "the"])
_WORD = re.compile(r"(?<![^\W_])[^\W\d_]{2,}(?![^\W_])")
_PERIOD = 64  # most words of a phrase that repeats directly: half of the model's 128 tokens
_PHRASE = 4  # least words of a phrase that does not repeat by chance: "end of the tibia"
_COPIED = 12  # least words of a tail of copied phrases: two labels of one figure share fewer
_LOOPS = 4  # least copies at the end that mean a language model in a loop, not emphasis
_DROP = 4  # the walk back from a loop stops when its sum is more than this below the best sum


class PostprocessConfig(Section):
    """Post-processing of captions before submission."""

    deduplicate: bool = False
    """Remove repeated characters, words, phrases and sentences (the paper's section 3.3)."""
    capitalise: bool = True
    """Start captions with a capital letter."""
    full_stop: bool = True
    """End captions with a full stop."""


def postprocess(caption: str, config: PostprocessConfig) -> str:
    """The caption as it is submitted: with collapsed white space and the changes that `config` asks for.

    A caption of white space only becomes "".
    """
    text = " ".join(caption.split())
    if config.deduplicate:
        text = deduplicate(text, config.capitalise, config.full_stop)
    if config.capitalise:
        text = _capitalised(text)
    return _stopped(text) if config.full_stop else text


def deduplicate(caption: str, capitalise: bool = True, full_stop: bool = True) -> str:
    """The caption without repeated characters, words, phrases and sentences (closeAI2023, section 3.3).

    White space is collapsed. `capitalise` capitalises the first letter. `full_stop` ends a sentence whose
    repetitive end was removed. There is no full stop if the end was not changed, or if the removed part has
    words that are nowhere else: then the sentence is incomplete (Table 2, third row).
    Idempotent; never empty for a caption that is more than white space.
    """
    text = " ".join(caption.split())
    while True:
        shorter = _shortened(text, full_stop)
        if capitalise:
            shorter = _capitalised(shorter)
        if shorter == text:
            return text
        text = shorter


def _shortened(text: str, full_stop: bool) -> str:
    """Do one pass over all kinds of repetition, from the smallest to the largest."""
    for run in _RUNS:
        text = run.sub(r"\1", text)
    words = text.split()
    keys = _completed([(_EDGES.sub("", word) or word).casefold() for word in words])
    start = _babble(keys)
    if start is not None:
        broke_off = _says_more(keys, start)
        return _closed(words, range(start), full_stop and not broke_off)
    kept = _without_neighbours(words, keys)
    kept = _without_sentences(words, keys, kept)
    kept = kept[: _copied_tail([keys[i] for i in kept])]
    return _closed(words, kept, full_stop)


def _closed(words: Sequence[str], kept: Sequence[int], full_stop: bool) -> str:
    """The text of the kept words; if the end was removed, without a final comma and with a full stop."""
    text = " ".join(words[i] for i in kept)
    if not kept or kept[-1] == len(words) - 1:
        return text
    text = text.rstrip(",;:") or text
    return _stopped(text) if full_stop or words[-1].endswith(_STOPS) else text


def _capitalised(text: str) -> str:
    """The text with a capital first letter, unless the word has its own capitals, as in pH."""
    first, second = text[:1], text[1:2]
    capital = first.upper()
    # Some letters have no capital, a capital of two letters, or one that differs even if case is ignored.
    if second.isupper() or len(capital) != 1 or capital.casefold() != first.casefold():
        return text
    return capital + text[1:]


def _stopped(text: str) -> str:
    """The text with a full stop, unless it already ends with a punctuation mark."""
    last = text.rstrip(_CLOSERS)[-1:]
    return text + "." if last.isalnum() or last in ("%", "°", "+") else text


def _without_neighbours(words: Sequence[str], keys: Sequence[str]) -> list[int]:
    """The positions of the words that stay if each directly repeated phrase is written once."""
    kept = list(range(len(words)))
    for period in range(1, min(_PERIOD, len(words) // 2) + 1):
        same = bytes(map(eq, keys[period:], keys))
        if b"\1" * period in same:
            stay = _once(words, same, period)
            kept, words, keys = ([values[i] for i in stay] for values in (kept, words, keys))
    return kept


def _once(words: Sequence[str], same: bytes, period: int) -> list[int]:
    """The positions that stay; `same[i]` is 1 if word i is repeated `period` words later."""
    stay, done = [], 0
    at = same.find(b"\1" * period)
    while at >= 0:
        end = same.find(b"\0", at)
        end = len(same) if end < 0 else end
        copies = (end - at) // period
        middle, last = at + period, at + 2 * period
        before = words[at - 1] if at else None
        if copies > 1 or _is_slip(words[at:middle], words[middle:last], before, last == len(words)):
            # Of "a, a mass" the last copy is kept, because it has no comma.
            said = at + copies if _is_little(words[at:middle]) and words[at].endswith(",") else at
            stay += [*range(done, at), *range(said, said + period)]
            # At the end of a caption the last copy may be incomplete: remove it too.
            done = len(words) if end == len(same) and copies > 1 else middle + copies * period
        at = same.find(b"\1" * period, end)
    return [*stay, *range(done, len(words))]


def _is_slip(phrase: Sequence[str], copy: Sequence[str], before: str | None, ends: bool) -> bool:
    """Whether a phrase written twice is a mistake; `ends`: the caption ends with it.

    These are no mistakes: a size (3 × 3 cm), a level (L1 L1), an abbreviation in brackets, a title that the
    first sentence repeats, a word after a comma (light blue, blue). `before` is the word before the phrase.
    """
    if _is_little(phrase):
        return _is_little_twice(phrase[0], copy[0], before)
    bare, again = ([word.casefold().rstrip(",;.") for word in words] for words in (phrase, copy))
    boundary = (*_STOPS, ":", ",", ";") if len(phrase) == 1 else (*_STOPS, ":")
    goes_on = phrase[-1].endswith(boundary) and not (ends or copy[-1].endswith(_STOPS))
    return bare == again and not goes_on and any(map(_is_word, bare))


def _is_little(phrase: Sequence[str]) -> bool:
    bare = phrase[0].rstrip(",")
    return len(phrase) == 1 and (len(bare) == 1 or bare.casefold() in _ARTICLES)


def _is_little_twice(word: str, copy: str, before: str | None) -> bool:
    """Whether an article or one letter is repeated by mistake: with a a mass, with a, a mass, A a mass.

    These are no mistakes: a capital as the second one is a name (point A A, type I I), a letter after a
    number is a unit (3 m m), an x is a sign, and a letter with a comma at the start of a sentence is the name
    of a panel (a, a mass is seen).
    """
    bare = word.casefold().rstrip(",")
    if copy.rstrip(",;.") != bare or bare == "x" or not bare.isalpha():
        return False
    if before is None or before.endswith((*_STOPS, ":", ";")):
        return not word.endswith(",")
    return bare in _ARTICLES or not before[-1].isdigit()


def _is_word(text: str) -> bool:
    """Whether a part has two or more letters and no digit, without accents; false for 5, L1, T2, 3mm, ×."""
    letters = "".join(char for char in text if not unicodedata.category(char).startswith("M"))
    return bool(_WORD.search(letters))


def _without_sentences(words: Sequence[str], keys: Sequence[str], kept: Sequence[int]) -> list[int]:
    """The positions that stay if each sentence of three or more words is written once."""
    stay: list[int] = []
    sentence: list[int] = []
    seen = set()
    for place in kept:
        sentence.append(place)
        if words[place].rstrip(_CLOSERS).endswith(_STOPS) or place == kept[-1]:
            said = tuple(keys[i] for i in sentence)
            if len(said) < 3 or said not in seen:
                stay += sentence
            seen.add(said)
            sentence = []
    return stay


def _completed(keys: list[str]) -> list[str]:
    """The keys with the last one completed if the token limit cut a word that an earlier phrase has whole."""
    if len(keys) <= _PHRASE:
        return keys
    *phrase, last = keys[-_PHRASE:]
    for i in range(len(keys) - _PHRASE):
        if keys[i : i + len(phrase)] == phrase and keys[i + len(phrase)].startswith(last):
            return [*keys[:-1], keys[i + len(phrase)]]
    return keys


def _copied_tail(keys: list[str]) -> int:
    """The position from which a caption only repeats earlier phrases; its length if there is none."""
    phrases = list(zip(*(keys[i:] for i in range(_PHRASE)), strict=False))
    seen, copied = set(), [False] * len(keys)
    for i, phrase in enumerate(phrases):
        if phrase in seen:
            copied[i : i + _PHRASE] = [True] * _PHRASE
        seen.add(phrase)
    start = len(keys)
    while start and copied[start - 1]:
        start -= 1
    if len(keys) - start < _COPIED:
        return len(keys)
    # A word between a phrase and its copy ("A note A") only links the two.
    if start > _PHRASE and phrases[start - 1 - _PHRASE] in phrases[start:]:
        start -= 1
    return _unhung(keys, start)


def _unhung(keys: Sequence[str], end: int) -> int:
    """The end moved back over words that can't end a sentence, unless there are no other words."""
    shorter = end
    while shorter and keys[shorter - 1] in _FUNCTION_WORDS:
        shorter -= 1
    return shorter or end


def _babble(keys: list[str]) -> int | None:
    """The position where a language model that ends in a loop began to babble, or None.

    A loop is a phrase that the end repeats `_LOOPS` times or more. A clean loop only repeats its phrase;
    `_without_neighbours` handles it. Babble is a distorted repetition before the loop ("ao aneurysm aoa
    aneurysm aoa", "ap patella ap patellar ligament ap patella ap patella"); none of it belongs to the
    caption. So walk back from the loop and sum: a word of the loop or of the words passed counts 1, any other
    content word -2, because it belongs to the caption. The babble begins where the sum is largest.
    """
    loop = _loop_start(keys)
    keys = _stems(keys)
    known = set(keys[loop:])
    total = best = 0
    start = loop
    for i in range(loop - 1, -1, -1):
        if keys[i] in _FUNCTION_WORDS:
            continue
        total += 1 if keys[i] in known else -2
        known.add(keys[i])
        if total >= best and total > 0:
            best, start = total, i
        if total < best - _DROP:
            break
    start = _unhung(keys, start)
    return start if best and start >= _PHRASE else None


def _loop_start(keys: Sequence[str]) -> int:
    """The start of the longest end that repeats one phrase `_LOOPS` or more times, else the length."""
    start = len(keys)
    for period in range(1, min(_PERIOD, len(keys) // _LOOPS) + 1):
        same = bytes(map(eq, keys[period:], keys))
        first = same.rfind(b"\0") + 1
        if len(keys) - first >= _LOOPS * period:
            start = min(start, first)
    return start


def _stems(keys: Sequence[str]) -> list[str]:
    """The keys, where words that differ only by added final letters become one: aoa ao, patellar patella."""
    words = {key for key in keys if len(key) > 1 and key not in _FUNCTION_WORDS}

    def stem(key: str) -> str:
        while key[:-1] in words:
            key = key[:-1]
        return key

    return [stem(key) for key in keys]


def _says_more(keys: Sequence[str], start: int) -> bool:
    """Whether the words from `start` on include one that is nowhere else."""
    stems = _stems(keys)
    times = Counter(stems)
    return any(times[stem] == 1 for stem in stems[start:])
