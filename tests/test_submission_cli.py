"""`harness submission` as a user calls it: in its own process, by exit code, output and files."""

import csv
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import commands

from harness.data.captionfiles import read_ids, read_predictions
from harness.errors import UserError
from harness.records.files import write_captions

IDS = ["img_2", "img_1", "img_3"]
CAPTIONS = {"img_1": "A CT, axial | left", "img_2": 'The "sail" sign.', "img_3": "Plain\nfilm."}
WRITTEN_2023 = 'img_2|The "sail" sign.\nimg_1|A CT, axial / left\nimg_3|Plain film.\n'


def submission(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = commands.harness(folder, "submission", *arguments, code=code)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folder(tmp_path) -> Path:
    """A project with a run that predicted its test split, and the files of the split."""
    (tmp_path / "ids.csv").write_text("ID\n" + "".join(f"{key}\n" for key in IDS))
    write_captions(tmp_path / "mine.csv", CAPTIONS)
    step = "steps/postprocess-0123456789ab/predictions.csv"
    write_captions(tmp_path / "runs" / step, {key: CAPTIONS[key] for key in IDS})
    run = tmp_path / "runs" / "group" / "exp" / "base-s42"
    run.mkdir(parents=True)
    record = {
        "name": "group/exp",
        "variant": "base",
        "seed": 42,
        "status": "FINISHED",
        "edition": 2023,
        "command": "harness run experiments/exp.yaml",
        "git": {"commit": "c0ffee", "dirty": False},
        "standin_model": True,
        "config": {"name": "group/exp"},
        "artifacts": {"predictions/test_after.csv": step},
    }
    (run / "run.json").write_text(json.dumps(record))
    return tmp_path


def test_make_from_a_run_takes_its_post_processed_captions_and_its_ids(folder):
    done = submission(folder, "make", "runs/group/exp/base-s42")
    path = folder / done.stdout.strip()
    assert path == folder / "submissions/group/exp/base-s42/caption-test/caption_prediction_test.csv"
    assert path.read_text() == WRITTEN_2023
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["run"] == "group/exp/base-s42"
    assert manifest["commit"]["commit"] == "c0ffee"
    assert manifest["standin_model"] is True
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["command"] == "harness submission make runs/group/exp/base-s42"
    assert not Path(manifest["predictions"]).is_absolute()


def test_another_edition_of_a_run_leaves_the_first_submission_alone(folder):
    first = folder / submission(folder, "make", "runs/group/exp/base-s42").stdout.strip()
    before = {path: path.read_bytes() for path in first.parent.iterdir()}
    second = (
        folder / submission(folder, "make", "runs/group/exp/base-s42", "--edition", "2026").stdout.strip()
    )
    assert {path: path.read_bytes() for path in first.parent.iterdir()} == before
    with zipfile.ZipFile(second) as archive:
        rows = list(csv.reader(archive.read("submission.csv").decode().splitlines()))
    assert rows[1:] == [[key, " ".join(CAPTIONS[key].split())] for key in IDS]
    submission(folder, "check", str(second), "--edition", "2026", "--ids", "ids.csv")


def test_make_from_files_and_check_what_was_made(folder):
    for edition in ("2022", "2023", "2025", "2026"):
        made = submission(
            folder, "make", "mine.csv", "--edition", edition, "--ids", "ids.csv", "--out", f"out{edition}"
        )
        upload = made.stdout.strip()
        done = submission(folder, "check", upload, "--edition", edition, "--ids", "ids.csv")
        assert done.stdout == f"ok: 3 rows, valid for {edition}\n"
    converted = submission(folder, "make", upload, "--edition", "2023", "--ids", "ids.csv", "--out", "back")
    assert (folder / converted.stdout.strip()).read_text() == WRITTEN_2023


def test_concepts(folder):
    (folder / "concepts.csv").write_text("ID,CUIs\nimg_1,C0040405;C0817096\nimg_2,C1306645\nimg_3,\n")
    options = ("--ids", "ids.csv", "--task", "concept")
    done = submission(folder, "make", "concepts.csv", "--edition", "2023", *options)
    path = folder / done.stdout.strip()
    assert path.read_text() == "img_2|C1306645\nimg_1|C0040405;C0817096\nimg_3|\n"
    submission(folder, "check", str(path), "--edition", "2023", *options)
    done = submission(folder, "make", "concepts.csv", "--edition", "2026", *options)
    with zipfile.ZipFile(folder / done.stdout.strip()) as archive:
        text = archive.read("submission.csv").decode()
    assert text == "ID,CUIs\nimg_2,C1306645\nimg_1,C0040405;C0817096\nimg_3,\n"
    submission(folder, "check", done.stdout.strip(), "--edition", "2026", *options)
    done = submission(folder, "make", "runs/group/exp/base-s42", "--task", "concept", code=2)
    assert "has no concepts/test.csv" in done.stderr


def test_concepts_are_never_submitted_as_captions_without_a_word(folder):
    """Without --task concept, `make` wrote a checked file of CUIs as captions."""
    given = ("--edition", "2023", "--ids", "ids.csv")
    (folder / "concepts.csv").write_text("img_2|C0040405 ; C0817096\nimg_1|\nimg_3|C1306645\n")
    done = submission(folder, "make", "concepts.csv", *given, code=2)
    assert "holds concepts, not captions" in done.stderr
    assert "--task concept" in done.stderr
    done = submission(folder, "check", "concepts.csv", *given)
    assert "warning: the captions are lists of concepts" in done.stderr
    (folder / "concepts.csv").write_text("img_2|C4 to C6 fused\nimg_1|C4;C5\nimg_3|\n")
    submission(folder, "make", "concepts.csv", *given)


def test_check_prints_line_and_fix_and_exits_with_3(folder):
    (folder / "bad.csv").write_bytes(b"\xef\xbb\xbfID,Caption\nimg_2,x, y\nimg_2,z\nimg_9,\xff\n")
    done = submission(folder, "check", "bad.csv", "--edition", "2026", "--ids", "ids.csv", code=3)
    for words in (
        "bad.csv:1:",
        "byte order mark",
        "bad.csv:2:",
        "bad.csv:4:",
        "0xff",
        "img_9",
        "2 ids (img_1",
    ):
        assert words in done.stderr
    assert "nothing was run" not in done.stderr
    options = ("--edition", "2026", "--ids", "ids.csv", "--format", "json")
    report = json.loads(submission(folder, "check", "bad.csv", *options, code=3).stdout)
    assert report["valid"] is False
    assert len(report["problems"]) == done.stderr.count("error: ")
    assert all(problem["fix"] for problem in report["problems"])
    good = submission(folder, "make", "mine.csv", "--edition", "2026", "--ids", "ids.csv").stdout.strip()
    assert json.loads(submission(folder, "check", good, *options).stdout) == {
        "file": good,
        "valid": True,
        "problems": [],
        "warnings": [],
    }


def test_fix_mends_what_needs_no_new_word_and_says_what_is_left(folder):
    (folder / "bad.csv").write_bytes(b"\xef\xbb\xbfID,Caption\nimg_1,one\nimg_2,two\nimg_3,three, four")
    options = ("--edition", "2026", "--ids", "ids.csv", "--fix", "good.csv")
    done = submission(folder, "check", "bad.csv", *options)
    for words in ("byte order mark", "order of the ids", "final newline", "wrote good.csv", "ok: 3 rows"):
        assert words in done.stdout
    assert (folder / "good.csv").read_text() == (
        'ID,Caption\nimg_2,"two"\nimg_1,"one"\nimg_3,"three, four"\n'
    )
    (folder / "bad.csv").write_bytes(b"ID,Caption\nimg_1,one\nimg_2,two\n")
    report = json.loads(submission(folder, "check", "bad.csv", *options, "--format", "json", code=3).stdout)
    assert [problem["what"] for problem in report["left"]] == ["1 id (img_3): missing"]
    assert report["out_valid"] is False
    assert "img_3" not in (folder / "good.csv").read_text()


@pytest.mark.slow
def test_bytes_of_any_kind_are_printed_whatever_the_terminal(folder):
    for n, data in enumerate(
        [
            b"img_2\xff|x\n\x1b[31mimg_1|y\r\n",
            "ID,Caption\nimg_2,\u4e2d\n".encode("utf-16"),
            bytes(range(256)),
            b"PK\3\4",
        ]
    ):
        (folder / "bad").write_bytes(data)
        for form in ("table", "json"):
            command = [sys.executable, "-m", "harness", "submission", "check", "bad", "--ids", "ids.csv"]
            command += ["--edition", ("2023", "2026")[n % 2], "--format", form]
            ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
            done = subprocess.run(command, cwd=folder, capture_output=True, env=ascii_only)
            assert done.returncode == 3, done.stderr
            assert b"Traceback" not in done.stderr
            assert b"\x1b" not in done.stdout + done.stderr


MISTAKES = {
    "no such source": (
        ["make", "none", "--edition", "2023", "--ids", "ids.csv"],
        2,
        "no such file or folder",
    ),
    "no run": (["make", "runs"], 2, "no run.json"),
    "split not predicted": (["make", "runs/group/exp/base-s42", "--split", "valid"], 2, "valid_after.csv"),
    "nothing but a file": (["make", "mine.csv"], 2, "--ids"),
    "edition": (["check", "mine.csv", "--edition", "2021", "--ids", "ids.csv"], 2, "2022, 2023"),
    "edition 2024": (["check", "mine.csv", "--edition", "2024", "--ids", "ids.csv"], 2, "not established"),
    "no ids": (["check", "mine.csv", "--edition", "2023", "--ids", "none.csv"], 2, "none.csv"),
    "no file": (["check", "none.csv", "--edition", "2023", "--ids", "ids.csv"], 2, "none.csv: no such file"),
    "not all predicted": (["make", "few.csv", "--edition", "2023", "--ids", "ids.csv"], 3, "img_3"),
    "out is a file": (
        ["make", "mine.csv", "--edition", "2023", "--ids", "ids.csv", "--out", "ids.csv"],
        2,
        "is a file",
    ),
    "repaired is a folder": (
        ["check", "mine.csv", "--edition", "2023", "--ids", "ids.csv", "--fix", "runs"],
        2,
        "is a directory",
    ),
    "repaired over the ids": (
        ["check", "mine.csv", "--edition", "2023", "--ids", "ids.csv", "--fix", "ids.csv"],
        2,
        "--fix: would overwrite an input: ids.csv",
    ),
    "repaired over itself": (
        ["check", "mine.csv", "--edition", "2023", "--ids", "ids.csv", "--fix", "./mine.csv"],
        2,
        "--fix: would overwrite an input: mine.csv",
    ),
    "twice": (["make", "twice.csv", "--edition", "2023", "--ids", "ids.csv"], 2, "twice.csv:3"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_said(case, folder):
    write_captions(folder / "few.csv", dict.fromkeys(IDS[:2], "x"))
    (folder / "twice.csv").write_text("ID,caption\nimg_1,x\nimg_1,y\nimg_2,x\nimg_3,x\n")
    arguments, code, words = MISTAKES[case]
    done = submission(folder, *arguments, code=code)
    assert words in " ".join(done.stderr.replace("\u2502", " ").split())
    assert not list(folder.rglob("manifest.json"))


@pytest.mark.parametrize(
    "text",
    [
        "ID\nimg_2\nimg_1\nimg_3\n",
        "img_2\r\nimg_1\r\nimg_3",
        '\ufeffID\tcaption\r\nimg_2\tsays "x\r\nimg_1\ta, b\r\nimg_3\tc\r\n',
        'ID,Caption\nimg_2,"two\nlines, ID"\nimg_1,\nimg_3,"c"\n\n',
        "ID,CUIs\nimg_2,C1;C2\nimg_1,C1\nimg_3,\n",
    ],
)
def test_ids_of_any_label_file(text, tmp_path):
    path = tmp_path / "ids"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_ids(path) == IDS


def test_ids_of_the_real_files(shared):
    root = shared / "data" / "medpix2"
    counts = {"train": 1653, "valid": 197}
    for split, count in counts.items():
        ids = read_ids(next(root.glob(f"*caption_prediction_{split}_labels.csv")))
        assert sorted(ids) == sorted(path.stem for path in (root / split).iterdir())
        assert len(ids) == count
    assert sorted(read_ids(root / "test_ids.csv")) == sorted(path.stem for path in (root / "test").iterdir())


@pytest.mark.parametrize(
    ("data", "lines", "words"),
    [
        (b"", [None], "no ids"),
        (b"ID\n", [None], "no ids"),
        (b"ID\na\nb\na\n", [4], "already"),
        (b"a\nb c\n d\n", [2], "white space: 'b c' (line 2), ' d' (line 3)"),
        (b"ID,Caption\n,x\na,y\n", [2], "empty"),
        (b"a\n\xff\n", [None], "byte 2"),
    ],
)
def test_ids_that_are_none_are_named_with_their_lines(data, lines, words, tmp_path):
    (tmp_path / "ids").write_bytes(data)
    with pytest.raises(UserError) as error:
        read_ids(tmp_path / "ids")
    assert [problem.line for problem in error.value.problems] == lines
    assert words in str(error.value)


def test_predictions_read_back_as_they_were_written(tmp_path):
    captions = {"a": 'x, "y"\n z', "b": "", "c": "ünï | \u2028 é"}
    assert read_predictions(write_captions(tmp_path / "p.csv", captions)) == captions
