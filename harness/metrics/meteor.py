"""METEOR 1.5 from the jar inside pycocoevalcap, with our own client.

pycocoevalcap's client hangs after a line break in a caption, never reads the errors of Java, and leaves the
process running. This client has a time limit on every exchange and reports Java's errors. The jar ends when
its standard input closes, so it also ends when this process is killed.
"""

import atexit
import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from harness.machine.limits import limited
from harness.metrics import java, text
from harness.metrics.base import Absent, Inputs, Measured, Metric, Original, Pairs, sign
from harness.metrics.cache import Row

START_SECONDS = 120
LINES = 100
LINES_SECONDS = 60
ORIGINAL_SECONDS = 300

# METEOR 1.5's English parameters (Denkowski and Lavie 2014), and the weights of its four matchers
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])


def measure(inputs: Inputs) -> Measured:
    """METEOR after the official pre-processing, without PTB, from summed statistics (n, 23)."""
    signature = sign("meteor", inputs.edition, "ptb:no", "meteor:1.5", "pycocoevalcap:1.2")

    def compute(pairs: list[Row]) -> np.ndarray:
        parts = [pairs[start : start + LINES] for start in range(0, len(pairs), LINES)]
        return parse([line for part in parts for line in _lines(part, inputs.clean_pairs)])

    statistics = inputs.scored(signature, inputs.clean_pairs, compute)
    return Measured(
        aggregate(statistics),
        signature,
        value=float(aggregate(statistics.sum(0))),
        statistics=statistics,
    )


def _lines(part: list[Row], pairs: Sequence[Row]) -> list[str]:
    """The statistics of a part of the pairs; if the part takes too much, each pair is tried alone.

    Raises `Absent` with the row of a pair that takes too much time or memory even alone.
    """
    try:
        with shared() as meteor:
            return meteor.statistics(*zip(*part, strict=True))
    except TooMuch as late:
        if len(part) > 1:
            return [line for pair in part for line in _lines([pair], pairs)]
        words = max(len(caption.split()) for caption in part[0])
        where = f"the caption or reference of row {pairs.index(part[0]) + 1}, with {words:,} words"
        raise Absent(f"{late}; it was {where}") from None


def aggregate(totals: np.ndarray) -> np.ndarray:
    """METEOR of summed statistics (..., 23), in 0 to 1, equal to the jar's EVAL.

    The statistics are: words of hypothesis and reference; function words of both; for each of four matchers
    the matched content and function words of both; chunks; matched words of both.
    """
    lengths, functions, chunks, matched = (
        totals[..., 0:2],
        totals[..., 2:4],
        totals[..., 20],
        totals[..., 21:23],
    )
    modules = totals[..., 4:20].reshape(*totals.shape[:-1], 4, 2, 2)
    content, function = modules[..., 0, :], modules[..., 1, :]
    weighted = np.einsum("m,...ms->...s", _WEIGHTS, _DELTA * content + (1 - _DELTA) * function)
    size = _DELTA * (lengths - functions) + (1 - _DELTA) * functions
    precision, recall = np.moveaxis(_ratio(weighted, size), -1, 0)
    mean = _ratio(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    return mean * (1 - _GAMMA * _ratio(chunks, matched.sum(-1) / 2) ** _BETA)


def parse(lines: Sequence[str]) -> np.ndarray:
    """The jar's lines of statistics as numbers (n, 23) that can be summed."""
    statistics = np.array([line.split() for line in lines], dtype=float)
    words, matched = statistics[:, 0:2], statistics[:, 21:23]
    # the jar's penalty is 0 for a segment that matches as a whole
    whole = (matched == words).all(1) & (statistics[:, 20] == 1)
    statistics[whole, 20] = 0
    return statistics


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.shape(b)), where=b != 0)


@contextlib.contextmanager
def shared() -> Iterator["Meteor"]:
    """The jar of this process, for one caller at a time; started in 5 s, once or after it has died."""
    global _running
    with _lock:
        if _running is None or not _running.alive:
            _running = Meteor().__enter__()
            atexit.register(_running.__exit__)
        yield _running


def stop() -> None:
    """End the jar of this process, even in the middle of an answer."""
    if _running is not None:
        _running.kill()


_running: "Meteor | None" = None
_lock = threading.Lock()


class TooMuch(Absent):
    """The jar gave no answer within the time limit or its memory."""


class Meteor:
    """The jar, running while the context lasts; every failure raises `Absent` with Java's message."""

    def __enter__(self) -> "Meteor":
        path = java.jar("meteor", "meteor-1.5.jar")
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            java.command(path, "Meteor", "-", "-", "-stdio", "-l", "en", "-norm"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=path.parent,
            encoding="utf-8",
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def kill(self) -> None:
        """End the jar; a caller that waits for an answer gets `Absent`."""
        self._process.kill()

    @property
    def alive(self) -> bool:
        """Whether the jar still runs."""
        return self._process.poll() is None

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> list[str]:
        """One line of 23 statistics for each pair."""
        lines = [_score_line(*pair) for pair in zip(predictions, references, strict=True)]
        answers = self._ask(lines[:1], 1, START_SECONDS)  # loads the paraphrase table, 5 s
        for start in range(1, len(lines), LINES):  # few enough that neither pipe can fill up
            part = lines[start : start + LINES]
            answers += self._ask(part, len(part), LINES_SECONDS)
        return answers

    def scores(self, statistics: Sequence[str]) -> tuple[float, np.ndarray]:
        """The score of the corpus and of each segment (n,)."""
        line = " ||| ".join(["EVAL", *statistics])
        *segments, corpus = self._ask([line], len(statistics) + 1, LINES_SECONDS + len(statistics) / 100)
        return float(corpus), np.array(segments, dtype=float)

    def _ask(self, lines: list[str], answers: int, seconds: float) -> list[str]:
        started = time.perf_counter()
        with limited(self._process, seconds) as late:
            try:
                self._process.stdin.write("".join(f"{line}\n" for line in lines))
                self._process.stdin.flush()
                got = [self._process.stdout.readline().rstrip("\n") for _ in range(answers)]
            except BrokenPipeError:
                got = [""]
        if not all(got):
            took = time.perf_counter() - started
            said = self._last_words()
            kind = TooMuch if late() or "OutOfMemoryError" in said else Absent
            raise kind(f"METEOR gave no answer in {took:.0f} s: {said}")
        return got

    def _last_words(self) -> str:
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").splitlines()
        # the places in Java's code tell a user nothing
        return "; ".join(line for line in said if line[:1] != "\t")[-500:] or "Java said nothing"


def _score_line(prediction: str, reference: str) -> str:
    # the jar's protocol is one line of fields between |||; its tokenizer takes any white space for one blank
    fields = [text.collapse(caption.replace("|||", " ")) for caption in (reference, prediction)]
    return " ||| ".join(["SCORE", *fields])


def _original(_: Inputs, pairs: Pairs) -> list[float]:
    """Scores from pycocoevalcap's client, which would wait forever for a caption of two lines."""
    from pycocoevalcap.meteor.meteor import Meteor

    # the jar takes any white space for one blank
    lines = [tuple(map(text.collapse, pair)) for pair in pairs]
    with java.on_path():
        original = Meteor()
    try:
        with limited(original.meteor_p, ORIGINAL_SECONDS):
            return [
                original.compute_score({0: [reference]}, {0: [prediction]})[1][0]
                for prediction, reference in lines
            ]
    finally:
        original.meteor_p.kill()
        original.meteor_p.communicate()
        if original.lock.locked():  # its destructor takes the lock again
            original.lock.release()


METRIC = Metric(measure, aggregate, java=True, stop=stop, original=Original("pycocoevalcap", _original))
