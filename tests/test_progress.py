"""What a log says of the progress of a run: a line each minute, and where a training goes on."""

import pytest

from harness.cli import terminal
from harness.cli.terminal import Terminal


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_each_minute_with_the_time_left(clock, capsys):
    with Terminal().progress("Training a-s1") as advance:
        for step in range(90, 353):
            clock[0] += 2.0
            advance(step, 352, "loss 1.2345  56 images/s")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (352 - 90) * 2 // 60
    assert lines[0] == "Training a-s1: 120 of 352, loss 1.2345 56 images/s, about 7.7 min left"
    assert lines[-1].endswith(" left")


def test_what_takes_less_than_a_minute_says_nothing(clock, capsys):
    with Terminal().progress("Captioning valid") as advance:
        for done in range(50):
            clock[0] += 1.0
            advance(done, 100)
    assert capsys.readouterr().err == ""


def test_no_time_is_guessed_before_something_is_done(clock, capsys):
    with Terminal().progress("Captioning valid") as advance:
        for _ in range(4):
            clock[0] += 50.0
            advance(16, 100)
    assert capsys.readouterr().err.splitlines() == ["Captioning valid: 16 of 100"]
