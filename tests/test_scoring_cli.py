"""`harness score` as a user calls it: golden values, output, settings, runs, mistakes, Ctrl-C."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import commands
from support.golden_pairs import GOLDEN, PREDICTIONS, REFERENCES, written

from harness import cli, scoring
from harness.errors import UserError
from harness.metrics.base import STANDIN
from harness.records.files import write_captions
from harness.store import seal

OVER_ALL = {
    "bertscore": 0.649737943,
    "rouge1": 0.460836720,
    "bleu1": 0.480769231,
    "cider": 2.253344314,
    "cider_ptb": 2.084978765,
}
"""From golden/README.md: the official evaluator of 2023 and pycocoevalcap."""
FILES = ("predictions.csv", "--references", "labels.csv")
ALL = (*FILES, "--standins", "--metrics", "bertscore,rouge1,bleu1,cider,bleurt,clipscore")
"""All but METEOR, whose JVM takes seconds to start in each worker; test_metrics.py has its values."""


def harness(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = commands.harness(folder, "score", *arguments, code=code)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    """The golden pairs in two official formats, and a run that has predicted and scored two images."""
    folder = tmp_path_factory.mktemp("golden")
    write_captions(folder / "predictions.csv", PREDICTIONS)
    labels = written(REFERENCES, "\t", True, "\r\n")
    (folder / "labels.csv").write_text(labels, encoding="utf-8", newline="")
    few = dict(list(PREDICTIONS.items())[:2])
    write_captions(folder / "runs" / "steps" / "postprocess-1" / "predictions.csv", few)
    score = folder / "runs" / "steps" / "score-1"
    score.mkdir()
    with (score / "per_image.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["ID", "reference", "prediction", "rouge1"])
        table.writerows([[key, REFERENCES[key], text, "0.5"] for key, text in few.items()])
    for name, metric, done in (
        ("own", "bleurt", True),
        ("newest", "bleurt", True),
        ("half", "bleurt", False),
        ("clip", "clipscore", True),
    ):
        step = folder / "runs" / "steps" / f"standin-{name}"
        step.mkdir()
        (step / "inputs.json").write_text(json.dumps({"facts": {"metric": metric}}))
        if done:
            seal(step, {})
    os.utime(folder / "runs" / "steps" / "standin-own" / "DONE", (1, 1))
    record = {
        "name": "group/exp",
        "status": "FINISHED",
        "edition": 2025,
        "command": "harness run experiments/exp.yaml",
        "config": {
            "score": {"metrics": ["rouge1", "bleurt"], "bleurt": {"checkpoint": STANDIN}, "bootstrap": 7}
        },
        "steps": {"standin-bleurt": "steps/standin-own"},
        "artifacts": {
            "predictions/valid_after.csv": "steps/postprocess-1/predictions.csv",
            "scores/valid_after_per_image.csv": "steps/score-1/per_image.csv",
        },
    }
    run = folder / "runs" / "group" / "exp" / "base-s1"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def first(golden) -> dict:
    """What the command prints as JSON; the other tests score the same files again."""
    done = harness(golden, *ALL, "--format", "json")
    assert done.stderr.count("32 captions") == 2
    return json.loads(done.stdout)


def test_values_through_the_command_are_the_golden_ones(first):
    assert list(first) == ["edition", "n", "scores", "warnings", "inputs"]
    assert (first["edition"], first["n"]) == (2023, 32)
    assert first["inputs"] == [
        "predictions.csv: 32 captions, comma-separated with header (since 2024)",
        "labels.csv: 32 captions, tab-separated with header (labels of 2022, 2023)",
    ]
    scores = first["scores"]
    for name, value in OVER_ALL.items():
        assert scores[name]["value"] == pytest.approx(value, abs=1e-6)
        assert scores[name]["low"] <= value <= scores[name]["high"]
        assert list(scores[name]) == ["value", "low", "high", "n", "signature", "official", "seconds"]
        assert scores[name]["signature"].startswith(f"{name}|clef2023|")
    assert not scores["bertscore"]["official"]
    assert scores["rouge1"]["official"]
    for name, reason in (("clipscore", "images"), ("bleurt", "")):
        assert scores[name]["value"] is None
        assert reason in scores[name]["reason"]
    assert any("blank after pre-processing" in warning for warning in first["warnings"])


def test_table_csv_and_per_image_say_the_same(golden, first):
    table = harness(golden, *ALL, "--per-image", "out/each.csv")
    lines = {line.split()[0]: line for line in table.stdout.splitlines()}
    assert "warning: " in table.stderr
    plain = harness(golden, *ALL, "--format", "csv")
    rows = {row["metric"]: row for row in csv.DictReader(io.StringIO(plain.stdout))}
    assert list(rows) == list(first["scores"]) == list(lines)[: len(rows)]
    for name, score in first["scores"].items():
        if score["value"] is None:
            assert f"absent: {score['reason']}" in lines[name]
            assert rows[name]["value"] == ""
            assert rows[name]["reason"] == score["reason"]
        else:
            star = "" if score["official"] else "*"
            shown = f"{score['value']:.4f} [{score['low']:.4f}, {score['high']:.4f}]{star}"
            line = re.split(" {2,}| (?=n=)", lines[name])
            assert line == [name, shown, "n=32", score["signature"]]
            assert float(rows[name]["value"]) == pytest.approx(score["value"], abs=1e-9)
            assert (rows[name]["n"], rows[name]["signature"]) == ("32", score["signature"])
    assert "not comparable with official scores" in lines["*"]
    with (golden / "out" / "each.csv").open(encoding="utf-8", newline="") as file:
        each = list(csv.DictReader(file))
    assert [(r["ID"], r["reference"], r["prediction"]) for r in each] == [
        (r["ID"], r["reference"], r["prediction"]) for r in GOLDEN
    ]
    for ours, official in zip(each, GOLDEN, strict=True):
        assert float(ours["bertscore"]) == pytest.approx(float(official["bertscore_f1_minilm6"]), abs=2e-6)
        assert float(ours["rouge1"]) == pytest.approx(float(official["rouge1_f"]), abs=2e-6)
        assert float(ours["cider"]) == pytest.approx(float(official["cider_segment"]), abs=2e-6)


def test_a_terminal_of_80_columns_is_not_overrun(golden, first):
    import pty

    parent, child = pty.openpty()
    environment = os.environ | {"COLUMNS": "80"}
    with open(os.devnull, "wb") as nowhere:
        assert commands.on_streams(golden, ["score", *ALL], environment, (child, nowhere.fileno())) == 0
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while part := os.read(parent, 1 << 16):
            shown += part
    os.close(parent)
    text = shown.decode().replace("\r\n", "\n")
    signature = first["scores"]["bertscore"]["signature"]
    assert max(map(len, text.splitlines())) <= 80
    assert signature in re.sub(r"\n +", "", text)


def test_scoring_again_needs_no_torch(golden, first):
    code = (
        f"import contextlib, sys; sys.argv = ['harness', 'score', *{ALL!r}]\n"
        "from harness.cli import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=golden, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_run_brings_its_references_edition_and_settings(golden, refused):
    done = harness(golden, "runs/group/exp/base-s1", "--metrics", "rouge1", "--format", "json")
    found = json.loads(done.stdout)
    assert (found["edition"], found["n"]) == (2025, 2)
    expected = sum(float(row["rouge1_f"]) for row in GOLDEN[:2]) / 2
    assert found["scores"]["rouge1"]["value"] == pytest.approx(expected, abs=1e-6)
    assert "references of the run" in done.stderr
    said = refused("runs/group/exp/base-s1", "--references", "labels.csv")
    assert "no prediction in predictions.csv (30 rows): golden_03 (line 4)" in said


def test_an_altered_stand_in_of_a_run_scores_nothing(golden, tmp_path, monkeypatch):
    shutil.copytree(golden / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "steps" / "standin-own" / "inputs.json").write_text("{}")
    run = scoring.find_run(Path("runs/group/exp/base-s1"))
    with pytest.raises(UserError, match="not what the step left"):
        scoring.settings(2025, run=run)
    assert scoring.settings(2025, ["rouge1"], run=run).metrics == ("rouge1",)  # it needs no stand-in


def test_settings_of_a_run_and_stand_ins(golden, monkeypatch):
    monkeypatch.chdir(golden)
    run = scoring.find_run(Path("runs/group/exp/base-s1"))
    steps = (golden / "runs" / "steps").resolve()
    own = scoring.settings(2025, run=run)
    assert (own.metrics, own.bootstrap) == (("rouge1", "bleurt"), 7)
    assert Path(own.bleurt.checkpoint) == steps / "standin-own"
    other = scoring.settings(2023, run=run, sets=["score.bootstrap=0"])
    assert len(other.metrics) == 7
    assert other.bootstrap == 0
    plain = scoring.settings(2023)
    assert plain.bleurt.checkpoint == "lucadiliello/BLEURT-20"
    assert scoring.settings(2026).bleurt.checkpoint == "lucadiliello/BLEURT-20-D12"
    standing = scoring.settings(2024, standins=True, sets=["score.clipscore.checkpoint=/weights/clip"])
    assert standing.bertscore.checkpoint == STANDIN
    assert Path(standing.bleurt.checkpoint).name == "standin-newest"
    assert standing.clipscore.checkpoint == "/weights/clip"
    assert Path(scoring.settings(2023, standins=True).clipscore.checkpoint).name == "standin-clip"
    monkeypatch.chdir(golden / "out" if (golden / "out").exists() else golden.parent)
    assert scoring.settings(2023, standins=True).bleurt == plain.bleurt  # nobody has made one here


@pytest.fixture
def refused(golden, monkeypatch, capsys):
    """Calls the command line in this process; gives what it says."""

    def call(*arguments: str) -> str:
        monkeypatch.chdir(golden)
        monkeypatch.setattr(sys, "argv", ["harness", "score", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        return capsys.readouterr().err

    return call


MISTAKES = {
    "unknown metric": (["--metrics", "rogue1,bleu1"], ["--metrics", "'rogue1'", "rouge1, bleurt"]),
    "unknown key": (["--set", "score.bleurt.chekpoint=x"], ["Did you mean score.bleurt.checkpoint?"]),
    "key without its section": (["--set", "bootstrap=0"], ["Did you mean score.bootstrap?"]),
    "key of another section": (["--set", "train.seed=1"], ["only keys of score"]),
    "value": (["--set", "score.precision=fp8"], ["'fp8'", "fp32 or bf16 is allowed"]),
    "no value": (["--set", "score.precision"], ["--set key=value"]),
    "edition": (["--edition", "2021"], ["2021", "2023"]),
    "per image": (["--per-image", "runs"], ["--per-image", "is a folder"]),
}


CONCEPTS = ("--task", "concept", "--manual", "labels.csv")
OTHER_TASK = {
    "manual": (["--manual", "labels.csv"], ["--manual: is for concepts; add --task concept"]),
    "captions": (
        [*CONCEPTS, "--metrics", "rouge1", "--images", "runs", "--standins"],
        [f"{name}: is for captions" for name in ("--metrics", "--images", "--standins")],
    ),
    "one": ([*CONCEPTS, "--standins"], ["--standins: is for captions; leave it out"]),
}


@pytest.mark.parametrize("case", OTHER_TASK)
def test_options_of_the_other_task_are_refused_at_once(case, refused):
    options, words = OTHER_TASK[case]
    said = refused(*FILES, *options)
    assert all(word in said for word in words)
    assert said.count("error: ") == len(words)


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_options(case, refused):
    options, words = MISTAKES[case]
    said = refused(*FILES, *options)
    for word in words:
        assert word in said
    assert "nothing was run" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.csv", "--references", "labels.csv"], "none.csv: can't be read: No such file"),
        (["predictions.csv", "--references", "none.csv"], "none.csv: can't be read: No such file"),
        (["predictions.csv"], "--references: is needed"),
        (["runs", "--references", "labels.csv"], "not a run: it has no run.json"),
        (["predictions.csv", "--references", "runs"], "runs: is a folder"),
    ],
)
def test_mistakes_in_files(arguments, words, refused):
    assert words in refused(*arguments)


def test_runs_that_are_none(golden, tmp_path):
    for text in ("{", "[]", '{"name": "x"}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match="not what a run writes"):
            scoring.find_run(tmp_path)
    record = json.loads((golden / "runs/group/exp/base-s1/run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"artifacts": {}, "status": "KILLED"}))
    with pytest.raises(UserError) as error:
        scoring.rows(tmp_path, None)
    assert "KILLED" in str(error.value)
    assert "Finish it: harness run" in str(error.value)


def test_the_hint_about_a_run_that_failed_says_why_and_not_only_to_repeat_it(golden, tmp_path):
    record = json.loads((golden / "runs/group/exp/base-s1/run.json").read_text())
    failure = {"step": "train", "error": "UserError", "reason": "loss became nan", "hint": "Lower the rate."}
    failed = {"artifacts": {}, "status": "FAILED", "failure": failure | {"exit_code": 1}}
    (tmp_path / "run.json").write_text(json.dumps(record | failed))
    with pytest.raises(
        UserError, match=r"It failed: loss became nan\. Lower the rate\. Its command: harness"
    ):
        scoring.rows(tmp_path, None)


@pytest.mark.ci
def test_ctrl_c_ends_with_130(golden, tmp_path):
    """Interrupted while METEOR works in its thread: neither a traceback nor a wait for it."""
    many = {f"x_{n}": f"{text} {n}" for n in range(20_000) for text in ["axial ct of the chest with a mass"]}
    for name in ("p.csv", "r.csv"):
        write_captions(tmp_path / name, many)
    command = [
        sys.executable,
        "-m",
        "harness",
        "score",
        "p.csv",
        "--references",
        "r.csv",
        "--metrics",
        "meteor",
    ]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert "20,000 captions" in running.stderr.readline()
    time.sleep(1.5)
    began = time.perf_counter()
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said
    assert time.perf_counter() - began < 10, "waited for METEOR"


def test_concepts_are_scored_against_all_and_against_the_manual_ones(tmp_path):
    (tmp_path / "run.txt").write_text("a|C0040405;C0000001\nb|\nc|C0024485\n")
    (tmp_path / "labels.csv").write_text("ID\tcuis\nb\tC0024485\na\tC0040405\nc\tC0024485;C0817096\n")
    (tmp_path / "manual.csv").write_text("ID,CUIs\na,C0040405\nb,C0024485\nc,C0024485\n")
    options = (
        "--references",
        "labels.csv",
        "--task",
        "concept",
        "--manual",
        "manual.csv",
        "--format",
        "json",
    )
    found = json.loads(harness(tmp_path, "run.txt", *options).stdout)
    assert found["scores"]["f1"]["value"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert found["scores"]["f1_secondary"]["value"] == pytest.approx(2 / 3)
    assert found["inputs"][0] == "run.txt: 3 lists of concepts, pipe-separated without header (2022, 2023)"
    wrong = harness(tmp_path, "run.txt", "--references", "labels.csv", code=2)
    assert "`score`, `compare` and `submission` have the option --task concept" in wrong.stderr
    (tmp_path / "captions.csv").write_text("a|C0040405\nb|a lesion\nc|C0024485\n")
    wrong = harness(tmp_path, "captions.csv", "--references", "labels.csv", "--task", "concept", code=2)
    assert "captions.csv:2: not a list of concepts: b" in wrong.stderr


@pytest.mark.parametrize("name", ["predictions.csv", "labels.csv", "link.csv", "runs/../labels.csv"])
def test_what_is_read_is_not_overwritten(name, golden, refused):
    link = golden / "link.csv"
    link.unlink(missing_ok=True)
    link.symlink_to(golden / "predictions.csv")
    before = [(golden / file).read_bytes() for file in ("predictions.csv", "labels.csv")]
    assert "--per-image: would overwrite an input" in refused(*FILES, "--per-image", name)
    assert before == [(golden / file).read_bytes() for file in ("predictions.csv", "labels.csv")]


def test_neither_are_the_manual_concepts_or_a_runs_own_files(golden, refused):
    (golden / "manual.csv").write_text("ID,CUIs\na,C0040405\n")
    concepts = ("--task", "concept", "--manual", "manual.csv")
    assert "would overwrite" in refused(*FILES, *concepts, "--per-image", "manual.csv")
    own = "runs/steps/score-1/per_image.csv"
    assert "would overwrite" in refused("runs/group/exp/base-s1", "--per-image", own)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("labels.csv/each.csv", ("File exists", "Not a directory")),
        ("x" * 300 + ".csv", ("File name too long",)),
        ("x" * 250 + ".csv", ("File name too long",)),  # with what the temporary name adds
        ("/proc/each.csv", ("No such file", "Permission denied")),
        ("pipe", ("is not a regular file",)),
    ],
)
def test_a_table_that_cannot_be_written_is_said_before_scoring(name, words, golden, refused):
    if name == "pipe":
        os.mkfifo(golden / name)
    said = refused(*FILES, "--per-image", name)
    assert any(word in said for word in words)
    assert "--per-image: " in said
    assert "32 captions" not in said


def test_trying_whether_a_table_can_be_written_leaves_nothing(golden, refused):
    refused("none.csv", "--references", "labels.csv", "--per-image", "tried/each.csv")
    assert not (golden / "tried").exists()


def test_blanks_between_metrics_do_not_matter(golden):
    done = harness(
        golden, *FILES, "--metrics", "rouge1, bleu1", "--set", "score.bootstrap=0", "--format", "csv"
    )
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == ["metric", "rouge1", "bleu1"]


def test_more_concepts_than_the_evaluator_takes_are_named(tmp_path):
    many = [";".join(f"C{number:07}" for number in range(count)) for count in (101, 100, 101)]
    files = dict(zip("abc", many, strict=True))
    (tmp_path / "p.csv").write_text("ID,CUIs\n" + "".join(f"{key},{text}\n" for key, text in files.items()))
    (tmp_path / "r.csv").write_text("ID,CUIs\na,C0000001\nb,C0000001\nc,C0000001\n")
    arguments = ("p.csv", "--references", "r.csv", "--task", "concept")
    said = harness(tmp_path, *arguments, "--edition", "2023").stderr
    assert "warning: 2 rows hold more than 100 concepts (a, c); the organisers' evaluator refuses" in said
    assert "more than" not in harness(tmp_path, *arguments, "--edition", "2024").stderr  # not established


def test_one_image_has_a_value_and_no_interval_in_the_table(tmp_path):
    (tmp_path / "p.csv").write_text("ID,Caption\na,ct of the chest\n")
    (tmp_path / "r.csv").write_text("ID,Caption\na,ct of the head\n")
    done = harness(tmp_path, "p.csv", "--references", "r.csv", "--metrics", "rouge1,bleu1")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["rouge1", "bleu1"]
    for line in lines:
        assert re.match(r"(rouge1|bleu1) +0\.75\d+ +n=1 ", line), line
