"""Hostile captions in memory against the rules of the editions: no traceback, no hang, no shifted row.

HARNESS_FUZZ_CASES=2000 tries more of them.
"""

import math
import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from support.fuzzing import cases
from support.rules import rouge1, settled

from harness import metrics
from harness.config.editions import EDITIONS
from harness.errors import UserError
from harness.metrics import clipscore, java
from harness.metrics.settings import ScoreConfig

SECONDS = 120
CONFIG = ScoreConfig.model_validate(
    {"bertscore": {"checkpoint": "standin"}, "bootstrap": 20, "metrics": ["bertscore", "rouge1", "bleu1"]}
)
PIECES = [
    *("\n", "\r", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\u2028", "\u2029", "\xa0", "\u202f"),
    *("\x00", "\x1b[31m", "\x7f", "\u200b", "\u200d", "\u202e", "\ufeff", "\ufffd", "\uffff", "\U0010ffff"),
    *(
        "|||",
        "|",
        "||| EVAL |||",
        '"',
        "''",
        "`",
        "-LRB-",
        "...",
        "!",
        ";",
        ",",
        "\\",
        "%s",
        "{}",
        "&lt;br&gt;",
    ),
    *(
        "<s>",
        "</s>",
        "[SEP]",
        "[CLS]",
        "[PAD]",
        "[MASK]",
        "<pad>",
        "Ġ",
        "##ing",
        "\u0301" * 40,
        "ﬁ",
        "ẞ",
        "İ",
    ),
    *("中文", "العربية", "👩\u200d⚕️", "½", "٣", "²", "1e308", "NaN", "None", "-1", "0" * 300, "a" * 300),
    *("axial ct of the chest", "lesion", "mass", "T2-weighted", "3.5 cm", "x" * 99, "", " ", "  "),
]


def caption(draw: random.Random) -> str:
    """Pieces in any order, now and then nothing, any characters, or far too long."""
    kind = draw.random()
    if kind < 0.15:
        return draw.choice(["", " ", "\n", "\u202f", "...", "!!! ... ---", "\x00", "\u200b"])
    if kind < 0.3:
        return "".join(
            chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(30)
        )
    text = draw.choice(["", " ", "  "]).join(draw.choices(PIECES, k=draw.randint(1, 12)))
    return text * 60 if kind > 0.97 else text


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fails a case that takes too long."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"a case took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.ci
def test_hostile_captions_get_what_the_rules_give_them(in_time):
    draw = random.Random(11)
    for case in range(cases(10)):
        signal.alarm(SECONDS)
        year = draw.choice(list(EDITIONS))
        pairs = [(caption(draw), caption(draw)) for _ in range(draw.randint(1, 4))]
        pairs = [(one, draw.choice([one, other])) for one, other in pairs]
        found, _ = metrics.score(*map(list, zip(*pairs, strict=True)), None, CONFIG, year)
        for row, pair in enumerate(pairs):
            blank = settled(year, *pair)
            what = f"case {case}, {year}: {pair!r}"
            expected = rouge1(*pair) if blank is None else blank
            assert found["rouge1"].per_image[row] == pytest.approx(expected, abs=1e-12), what
            assert blank is None or found["bertscore"].per_image[row] == blank, what
            assert -1 <= found["bertscore"].per_image[row] <= 1 + 1e-6, what
            assert 0 <= found["bleu1"].per_image[row] <= 1 + 1e-6, what
        assert all(math.isfinite(score.value) for score in found.values())


def test_hostile_captions_shift_no_row_in_java(in_time):
    """Between them stand captions whose words are known."""
    draw = random.Random(12)
    signal.alarm(600)
    hostile = [caption(draw) for _ in range(cases(40))]
    woven = [text for one in hostile for text in (one, "A mass, in the left lung.")]
    tokenised = java.ptb(woven)
    assert set(tokenised[1::2]) == {"a mass in the left lung"}
    assert len(tokenised) == len(woven)


def test_hostile_captions_are_cleaned_for_clip(in_time):
    draw = random.Random(13)
    for _ in range(cases(40)):
        signal.alarm(SECONDS)
        clean = clipscore.clean(clipscore.PREFIX + caption(draw))
        assert clean.startswith("a photo depicts")
        assert not set(clean) & set("\n\r\t\x0b\x0c\x85\u2028\u2029")


def test_cider_of_hostile_captions_equals_pycocoevalcap(in_time):
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    from harness.metrics.lexical import cider_scores

    draw = random.Random(14)
    for _ in range(cases(40)):
        signal.alarm(SECONDS)
        pairs = [(caption(draw), caption(draw)) for _ in range(draw.randint(1, 8))]
        pairs = [(one, draw.choice([one, other, one + " " + other])) for one, other in pairs]
        pairs += draw.choices(pairs, k=draw.randint(0, 2))
        oracle = CiderScorer()
        for one, other in pairs:
            oracle += (one, [other])
        found = cider_scores(*zip(*pairs, strict=True))
        if any(other.split() for _, other in pairs):
            np.testing.assert_allclose(found, oracle.compute_score()[1], rtol=0, atol=1e-9)
        else:
            assert not found.any(), "the original stops where no reference has a word"


def test_half_a_surrogate_pair_is_refused_with_its_row():
    with pytest.raises(UserError, match="row 2 of the predictions holds half of a surrogate pair"):
        metrics.score(["a", "b\ud800"], ["a", "b"], None, CONFIG, 2023)
