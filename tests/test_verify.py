"""`score --verify`: our scores compared with those of the original packages; stderr stays quiet."""

import csv
import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import commands
from support.golden_pairs import PREDICTIONS, REFERENCES

from harness import metrics
from harness.cli.verified import judge, lines, plain
from harness.errors import UserError
from harness.metrics.base import Inputs
from harness.metrics.settings import ScoreConfig
from harness.scoring import verify

OURS = re.compile(r"(p|r)\.csv: \d|verifying \d|warning: |per image: |error: --verify: |$")
FILES = ("p.csv", "--references", "r.csv")
COUNTED = ("rouge1", "bleu1", "cider")


def table(file: Path, captions: list[str]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as rows:
        csv.writer(rows).writerows([("ID", "Caption"), *((f"i{n}", c) for n, c in enumerate(captions))])
    return file


def inputs(
    captions: tuple[list[str], list[str]], names: tuple[str, ...], edition: int = 2023, **values
) -> Inputs:
    config = ScoreConfig.model_validate({"metrics": names, "bootstrap": 0} | values)
    return Inputs(*captions, None, config.for_edition(edition), edition)


def scored(given: Inputs) -> dict[str, metrics.Score]:
    return metrics.score(given.predictions, given.references, None, given.config, given.edition)[0]


@pytest.fixture(scope="module")
def golden() -> tuple[list[str], list[str]]:
    return [PREDICTIONS[key] for key in REFERENCES], list(REFERENCES.values())


def harness(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness", "score", *FILES, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=500)
    assert done.returncode == code, done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if not OURS.match(line)] == []
    return done


@pytest.mark.ci
def test_the_command_compares_with_every_package(golden, tmp_path):
    """All but METEOR and BLEURT, which have tests of their own."""
    for name, side in zip(("p.csv", "r.csv"), golden, strict=True):
        table(tmp_path / name, side)
    wanted = ("--standins", "--metrics", "bertscore,rouge1,bleu1,cider,clipscore", "--verify", "8")
    done = commands.harness(tmp_path, "score", *FILES, *wanted, "--format", "json")
    assert [line for line in done.stderr.splitlines() if not OURS.match(line)] == []
    found = json.loads(done.stdout)["verified"]
    compared = {name: one for name, one in found.items() if one["ok"] is not None}
    assert set(compared) == {"bertscore", "rouge1", "bleu1", "cider", "cider_ptb"}
    assert all(one["ok"] and one["difference"] <= 1e-6 and one["rows"] >= 6 for one in compared.values())
    assert compared["bertscore"]["package"] == "bert-score 0.3.13"
    assert found["clipscore"]["ok"] is None


@pytest.mark.ci
def test_scores_that_differ_fail(golden):
    given = inputs(golden, COUNTED)
    scores = scored(given)
    assert not any(one.fails for one in verify.captions(given, scores, 8).values())
    for wrong in (2e-5, np.nan):
        spoiled = scores | {"rouge1": replace(scores["rouge1"], per_image=scores["rouge1"].per_image + wrong)}
        found = verify.captions(given, spoiled, 8)
        assert [name for name, one in found.items() if one.fails] == ["rouge1"]
        assert "TOO FAR" in "\n".join(lines(found, 8, 32))
        assert plain(found)["rouge1"]["ok"] is False
        json.dumps(plain(found), allow_nan=False)
        with pytest.raises(UserError, match="more than 1e-05: rouge1") as raised:
            judge(found)
        assert raised.value.exit_code == 1


@pytest.mark.ci
def test_cider_of_another_corpus_fails(golden, monkeypatch):
    """Both sides score the chosen rows as a corpus of their own; other document frequencies show."""
    given = inputs(golden, ("cider",))
    monkeypatch.setattr(verify, "_again", lambda name, _, rows: scored(given)[name].per_image[rows])
    assert verify.captions(given, scored(given), 8)["cider"].fails


@pytest.mark.ci
@pytest.mark.parametrize("edition", [2023, 2025])
def test_bertscore_and_its_idf_over_all_references(golden, edition):
    given = inputs(golden, ("bertscore",), edition, bertscore={"checkpoint": "standin"})
    (found,) = verify.captions(given, scored(given), 6).values()
    assert found.rows >= 4
    assert found.difference < 1e-6


@pytest.mark.ci
def test_bert_score_says_nothing_of_a_text_without_tokens(capfd):
    given = inputs(
        (["\u200b", "a mass"], ["lung", "\x07"]), ("bertscore",), bertscore={"checkpoint": "standin"}
    )
    (found,) = verify.captions(given, scored(given), 2).values()
    assert (found.rows, found.difference) == (2, 0)
    assert capfd.readouterr().err == ""


@pytest.mark.ci
def test_rows_with_a_blank_side_are_left_out_and_none_left_is_no_success():
    some = inputs((["lung", "", "a mass", "!?"], ["lung", "mass", "mass", "..."]), COUNTED)
    found = verify.captions(some, scored(some), 4)
    assert {name: one.rows for name, one in found.items()} == {
        "rouge1": 2,
        "bleu1": 2,
        "cider": 2,
        "cider_ptb": 3,
    }
    none = inputs((["", " "], ["lung", "mass"]), ("rouge1", "bleu1"))
    found = verify.captions(none, scored(none), 2)
    assert all(one.difference is None for one in found.values())
    assert "ok" not in " ".join(line.split("  ")[-1] for line in lines(found, 2, 2))
    with pytest.raises(UserError, match="no score was compared"):
        judge(found)


@pytest.mark.slow
def test_meteors_own_client_gets_one_line_a_caption():
    captions = (["a nodule\nin the lung", "left\r\nlung  mass", "x ||| y"], ["lung nodule", "mass", "x y"])
    given = inputs(captions, ("meteor",))
    (found,) = verify.captions(given, scored(given), 3).values()
    assert (found.rows, found.package) == (3, "pycocoevalcap")
    assert found.difference < 1e-6


@pytest.mark.ci
def test_what_was_not_computed_or_not_in_fp32_is_never_ok(golden):
    given = inputs(golden, ("bleurt", "clipscore"), bleurt={"checkpoint": "/no/where"})
    assert all(one.why.startswith("absent: ") for one in verify.captions(given, scored(given), 4).values())
    few = (golden[0][:4], golden[1][:4])
    rough = inputs(few, ("bertscore",), bertscore={"checkpoint": "standin"}, precision="bf16")
    (found,) = verify.captions(rough, scored(rough), 2).values()
    assert found.why == "not compared: the package computes in fp32"


def test_the_rows_are_the_same_at_every_call_and_no_more_than_there_are():
    assert verify.chosen(1000, 20) == verify.chosen(1000, 20)
    assert verify.chosen(3, 20) == [0, 1, 2]


def test_concepts_beside_sklearn(tmp_path):
    draw = np.random.default_rng(0)
    cuis = np.array(["C0040405", "C0000001", "C0000726", "C0024485", "C0000002"])
    sides = [[set(cuis[draw.random(5) < 0.4].tolist()) for _ in range(30)] for _ in range(3)]
    scores = metrics.score_concepts(*sides, 2023, 0)
    found = verify.concept_lists(*sides, scores, 2023, 30)
    secondary = {"C0040405", "C0000726", "C0024485"}
    assert found["f1"].rows == sum(bool(p | r) for p, r in zip(*sides[:2], strict=True))
    assert found["f1_secondary"].rows == sum(bool(manual & secondary) for manual in sides[2])
    assert all(one.difference < 1e-12 for one in found.values())


@pytest.fixture(scope="module")
def bleurt(tmp_path_factory) -> Path:
    from harness.models import standins

    folder = tmp_path_factory.mktemp("bleurt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standins, "BLEURT_STEPS", 2)
        standins.build_bleurt(["CT shows a nodule in the lung", "an effusion", "a torn meniscus"] * 4, folder)
    return folder


@pytest.mark.slow
def test_remarks_of_libraries_do_not_reach_the_terminal(bleurt, tmp_path):
    """Captions that are longer than every encoder, and letters that only slow tokenizers take apart."""
    table(tmp_path / "p.csv", ["naïve " + "lung mass " * 400, "a nodule", "α β γ"])
    table(tmp_path / "r.csv", ["émigré " + "α-lesion " * 400, "a mass", "mass " * 600])
    wanted = ("--metrics", "bertscore,bleurt", "--set", f"score.bleurt.checkpoint={bleurt}", "--verify", "3")
    done = harness(tmp_path, *wanted, "--standins")
    assert "cut at 512 tokens" in done.stderr
    assert re.search(r"^bleurt +3 .* ok +bleurt-pytorch 0\.0\.1$", done.stdout, re.MULTILINE)


def test_remarks_that_say_something_new_do_reach_the_terminal():
    from harness.models.remarks import REMARKS, quieten

    quieten()
    handlers = [h for h in logging.getLogger("transformers").handlers if type(h) is logging.StreamHandler]
    assert handlers
    for text, shown in ((f"{REMARKS[0]} sequence", False), ("The weights are upside down", True)):
        record = logging.LogRecord("transformers.x", logging.WARNING, "x.py", 1, text, None, None)
        assert [bool(handler.filter(record)) for handler in handlers] == [shown] * len(handlers)
