"""Captions, records and numbers at the limits of scoring: a value or a reason, never a traceback."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from harness import metrics, scoring
from harness.errors import UserError
from harness.metrics import bertscore, meteor, neural
from harness.metrics.base import Absent, Measured
from harness.metrics.meteor import TooMuch
from harness.metrics.settings import ScoreConfig

ODD_SECTIONS = [{"bleurt": 7}, {"bleurt": None}, {"bleurt": ["a"]}, {"medcat": 7}, {"metrics": 3}]


def scored(pairs: list[tuple[str, str]], names: list[str], edition: int = 2023) -> dict[str, metrics.Score]:
    values = {"metrics": names, "bootstrap": 0, "bertscore": {"checkpoint": "standin"}}
    sides = map(list, zip(*pairs, strict=True))
    return metrics.score(*sides, None, ScoreConfig.model_validate(values), edition)[0]


@pytest.mark.parametrize("section", ODD_SECTIONS, ids=str)
@pytest.mark.parametrize("edition", [2023, 2025])
def test_a_runs_score_section_may_be_anything(section, edition):
    run = (Path("runs/x"), {"edition": 2023, "config": {"score": section}, "name": "x"})
    try:
        found = scoring.settings(edition, run=run)
    except UserError as error:
        assert any("run.json" in str(problem) for problem in error.problems)  # noqa: PT017
    else:
        assert found == ScoreConfig().for_edition(edition)


def test_a_caption_too_long_for_the_memory_is_a_reason(monkeypatch):
    checkpoint, layer = bertscore.locate(ScoreConfig.model_validate(STANDIN).bertscore)
    store = bertscore.Embeddings(checkpoint.folder, layer, "cpu", limit=None)
    heads = store.model.config.num_attention_heads
    monkeypatch.setattr(bertscore, "ram", lambda: 8 * 4 * heads * 3000**2)
    store.check_memory(3000)
    with pytest.raises(Absent, match=r"3,001 tokens, whose attention takes \d+\.\d GB; \d+\.\d GB are free"):
        store.check_memory(3001)
    monkeypatch.setattr(bertscore, "ram", lambda: 0)
    store.check_memory(neural.WIDE)


STANDIN = {"bertscore": {"checkpoint": "standin"}}


def test_wide_batches_are_computed_one_at_a_time_and_in_their_order():
    now, most = set(), 0

    def compute(rows, width):
        nonlocal most
        if width > neural.WIDE:
            now.add(rows[0])
            most = max(most, len(now))
            now.discard(rows[0])
        return [(row, width) for row in rows]

    lengths = [5, 2000, 700, 1025, 1024, 3000, 9]
    found = neural.by_length(compute, lengths, None, "cpu")
    assert [row for row, _ in found] == list(range(len(lengths)))
    assert most == 1


@pytest.mark.slow
def test_captions_that_are_slow_together_are_asked_for_one_by_one(monkeypatch):
    pairs = [("a mass in the lung", "a nodule in the lung"), ("ct chest", "ct of the chest")]
    whole = scored(pairs, ["meteor"])["meteor"].statistics
    real = meteor.Meteor.statistics

    def slow(self, predictions, references):
        if len(predictions) > 1:
            raise TooMuch("METEOR gave no answer in 60 s")
        return real(self, predictions, references)

    monkeypatch.setattr(meteor.Meteor, "statistics", slow)
    np.testing.assert_array_equal(scored(pairs, ["meteor"])["meteor"].statistics, whole)


def test_a_caption_that_is_slow_alone_is_named_and_costs_no_other_metric(monkeypatch):
    pairs = [("ct chest", "ct of the chest"), ("endless words", "a mass")]
    real = meteor.Meteor.statistics

    def slow(self, predictions, references):
        if "endless words" in predictions:
            raise TooMuch("METEOR gave no answer in 60 s: Java said nothing")
        return real(self, predictions, references)

    monkeypatch.setattr(meteor.Meteor, "statistics", slow)
    found = scored(pairs, ["meteor", "rouge1"])
    assert found["meteor"].value is None
    assert found["meteor"].reason.endswith("it was the caption or reference of row 2, with 2 words")
    assert found["rouge1"].value > 0


def test_time_out_of_the_jar_is_told_from_its_other_failures(monkeypatch):
    with meteor.Meteor() as client:
        client._process.kill()
        with pytest.raises(Absent) as failed:
            client.statistics(["a"], ["a"])
    assert not isinstance(failed.value, TooMuch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_absent(value):
    with pytest.raises(Absent, match="no finite number for all captions together"):
        metrics.finite(Measured(np.ones(2), "x", value=value))
    assert metrics.finite(Measured(np.ones(2), "x", value=0.5)).value == 0.5


def test_signatures_name_the_packages_that_are_installed():
    names = ["bertscore", "rouge1", "bleu1", "cider"]
    signatures = [one.signature for one in scored([("a mass", "a nodule"), ("ct", "ct")], names).values()]
    source = Path(bertscore.__file__).parent
    text = "".join(signatures) + "".join((source / f"{n}.py").read_text() for n in ("meteor", "bleurt"))
    said = set(re.findall(r"(bert-score|rouge-score|pycocoevalcap|bleurt-pytorch):([\d.]+\d)", text))
    assert len(said) == 4
    assert said == {(name, metadata.version(name)) for name, _ in said}


@pytest.mark.slow
def test_idf_of_the_original_package_starts_no_processes(tmp_path):
    """They would print a traceback each, since this program takes SIGTERM for an interruption."""
    for name in ("p.csv", "r.csv"):
        (tmp_path / name).write_text("ID,Caption\na,a mass in the lung\nb,ct of the chest\n")
    command = [sys.executable, "-m", "harness", "score", "p.csv", "--references", "r.csv", "--standins"]
    command += ["--edition", "2025", "--metrics", "bertscore", "--verify", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert all(re.match(r"(p|r)\.csv: |verifying |warning: ", line) for line in lines), done.stderr


def test_blank_captions_have_no_word_for_meteor():
    pairs = [(blank, "ct of the chest") for blank in ("", " ", "...")] + [("", ""), ("a mass", "a mass")]
    found = scored(pairs, ["meteor"])["meteor"].per_image
    assert found[:4].tolist() == [0, 0, 0, 0]
    assert found[4] > 0.9


def test_a_caption_too_long_for_the_memory_of_meteor_is_named_without_javas_stack(monkeypatch):
    said = 'Exception in thread "main" java.lang.OutOfMemoryError: Java heap space'
    script = f"read line; printf '%s\\n\\tat Aligner.resolve(Unknown Source)\\n' '{said}' >&2"
    monkeypatch.setattr(meteor.java, "command", lambda *_: ["sh", "-c", script])
    monkeypatch.setattr(meteor, "_running", None)
    pairs = [("word " * 700, "a"), ("b", "c")]
    with pytest.raises(Absent) as error:
        meteor._lines(pairs, pairs)
    assert said in str(error.value)
    assert "row 1, with 700 words" in str(error.value)
    assert "Aligner" not in str(error.value)
