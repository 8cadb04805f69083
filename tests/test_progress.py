"""What a log says of the progress of a run: a line each minute, and where a training goes on."""

import json
import shutil
from pathlib import Path

import pytest
from support.experiments import EXPERIMENT, write

from harness.cli import terminal
from harness.cli.ahead import Ahead
from harness.cli.terminal import Terminal
from harness.config.experiment import load
from harness.steps.plan import prepare


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


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ((300.0, True), ", whole command about 6.8 min"),
        ((300.0, False), ", whole command at least 6.8 min"),
        ((0.0, False), ""),
        ((0.0, True), ""),
    ],
)
def test_a_line_says_what_is_left_of_the_whole_command(clock, capsys, after, words):
    said = Terminal()
    said.ahead = lambda run, step: after
    said.begin("a-s1", "train")
    with said.progress("Training a-s1") as advance:
        for step in range(87):
            clock[0] += 1.0
            advance(step, 171)
    assert capsys.readouterr().err.splitlines() == [
        "a-s1: train",
        f"Training a-s1: 60 of 171, about 111 s left{words}",
    ]


@pytest.mark.parametrize(
    ("after", "words"),
    [((300.0, True), "all 0:06:51"), ((300.0, False), "all over 0:06:51"), ((0.0, False), "")],
)
def test_a_bar_says_it_in_few_characters(after, words):
    said = Terminal()
    said.after = after
    assert said._clock_of_all(111.2) == words
    assert said._clock_of_all(None) == ""


def test_what_is_left_is_forecast_from_finished_runs_and_shared_steps_count_once(
    small_run, tmp_path, monkeypatch
):
    for name in ("data", "runs"):
        shutil.copytree(small_run / "kept" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, EXPERIMENT)
    seconds = {}
    for variant in ("opt_dedup", "opt"):
        seconds |= json.loads(Path(f"runs/small/{variant}-s42/run.json").read_text())["seconds"]

    ahead = Ahead(prepare(load(file, ["seed=7"], only=["opt", "opt_dedup"]), Terminal(silent=True)))
    left, whole = ahead("opt-s7", "train")
    assert whole, (ahead.seconds, ahead.known)
    captioned = seconds["predict-valid"] + seconds["predict-test"]
    assert (
        captioned < left < 3 * captioned + 4 * sum(seconds[f"score-{when}"] for when in ("before", "after"))
    )
    before, _ = ahead("opt-s7", "tiny")
    assert before > left
    assert ahead("opt_dedup-s7", "train")[0] == pytest.approx(left)
    done = Ahead(prepare(load(file, only=["opt", "opt_dedup"]), Terminal(silent=True)))
    assert done("opt-s42", "train") == (0.0, True)
    other = Ahead(prepare(load(file, ["seed=7", "predict.num_beams=3"], only=["opt"]), Terminal(silent=True)))
    assert other("opt-s7", "train") == (0.0, False)
