"""One message for each cause, and each piece of advice followed on the command line."""

import csv
import gzip
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from support import commands

from harness.data.captionfiles import read_ids
from harness.data.forms import REPAIR
from harness.errors import UserError
from harness.records.files import sameness
from harness.submission import check

ROWS = 17_237  # of a team's run in 2024
IDS = [f"scan_{number:06d}" for number in range(5)]


def harness(folder: Path, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = commands.harness(folder, *arguments, code=code)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "IDS").write_text("\n".join(IDS))
    return tmp_path


def table(path: Path, separator: str, header: str = "", caption: str = "axial CT") -> Path:
    path.write_text(header + "".join(f"{key}{separator}{caption} {key}\n" for key in IDS))
    return path


OTHER_FORMATS = {
    "commas": (",", "", 2023, "separated by commas; the edition of 2023 has ID|caption without a header"),
    "tabs as 2026": ("\t", "", 2026, "separated by tabs; the edition of 2026 has the header ID,Caption"),
    "pipes": ("|", "", 2025, "separated by pipes"),
}


@pytest.mark.parametrize("case", OTHER_FORMATS)
def test_another_separator_is_one_message_and_its_command_makes_a_valid_file(case, folder):
    separator, header, edition, words = OTHER_FORMATS[case]
    table(folder / "mine.csv", separator, header, "CT, axial | left" if separator == "\t" else "CT")
    for fix in ([], ["--fix", "out"]):
        done = harness(
            folder, "submission", "check", "mine.csv", f"--edition={edition}", "--ids=IDS", *fix, code=3
        )
        assert done.stderr.count("error: ") == 1
        assert words in done.stderr
        assert not (folder / "out").exists()
    command = re.search(r"harness (submission make .*)", done.stderr)[1]
    made = harness(folder, *shlex.split(command)).stdout.strip()
    harness(folder, "submission", "check", made, f"--edition={edition}", "--ids=IDS")


def test_advice_is_given_only_where_it_leads_to_a_file(folder):
    """Semicolons and JSON of other kinds are not read, so that no command is named for them."""
    table(folder / "mine.csv", ";", "", "CT, axial")
    (folder / "other.json").write_text(json.dumps(dict.fromkeys(IDS, "CT")))
    for name, words in (("mine.csv", "separated by semicolons"), ("other.json", "not COCO results")):
        said = harness(folder, "submission", "check", name, "--edition=2023", "--ids=IDS", code=3).stderr
        assert words in said
        assert "submission make" not in said
        made = harness(folder, "submission", "make", name, "--edition=2023", "--ids=IDS", code=2).stderr
        assert words in made.replace("but not", "not")


@pytest.mark.ci
def test_17237_rows_with_the_same_fault_are_one_message(tmp_path):
    ids = [f"scan_{number:06d}" for number in range(ROWS)]
    path = tmp_path / "run.csv"
    path.write_text("".join(f"{key},C0040405;C0817096\n" for key in ids))
    assert len(check(path, ids, 2023, "concept")) == 1
    faults = {
        "|C1;C1": "holds a CUI twice",
        "|D1": "holds something that is not a CUI",
        "|C1|C2": "has more than one pipe",
        "": "has no '|'",
        ".jpg|C1": "an id with the ending of an image",
        " |C1": "the id is empty or holds white space",
        "|C1\n": "a blank line",
    }
    for tail, words in faults.items():
        path.write_text("".join(f"{key}{tail}\n" for key in ids))
        problems = check(path, ids, 2023, "concept")
        found = next(problem for problem in problems if words in problem.what)
        assert "(17,237 rows)" in found.what
        assert found.line == (2 if "\n" in tail else 1)
        assert sum(len(str(problem)) for problem in problems) < 1500
        assert len(problems) <= 3
    path.write_text("".join(f"{key} x\n" for key in ids))
    with pytest.raises(UserError, match=r"\(17,237 rows\)"):
        read_ids(path)


def test_what_edition_2024_advises_works(folder):
    """Its files have no established format; one of a team has commas and no header."""
    table(folder / "FILE", ",")
    for do in (["check", "FILE"], ["make", "FILE"]):
        said = harness(folder, "submission", *do, "--edition=2024", "--ids=IDS", code=2).stderr
        command = re.search(r"submission make RUN\|FILE --ids IDS", said)[0].replace("RUN|", "")
        editions = re.findall(r"--edition (\d+)", said)
        assert editions == ["2023", "2025"]
        for edition in editions:
            made = harness(folder, *shlex.split(command), "--edition", edition).stdout.strip()
            harness(folder, "submission", "check", made, "--edition", edition, "--ids=IDS")
    said = harness(
        folder, "submission", "check", "FILE", "--edition=2024", "--ids=IDS", "--task=concept", code=2
    )
    assert said.stderr.count("--task concept") == 2


def test_fix_is_advised_where_it_helps_and_nowhere_else(folder):
    (folder / "bad.csv").write_text("ID,Caption\n" + "".join(f"{key},x\n" for key in reversed(IDS)))
    command = ["submission", "check", "bad.csv", "--edition=2026", "--ids=IDS"]
    said = harness(folder, *command, code=3).stderr
    assert "add to this command: --fix OUT" in said
    assert "ok: 5 rows" in harness(folder, *command, "--fix", "OUT").stdout
    (folder / "bad.csv").write_text(
        "ID,Caption\n" + "".join(f"{key},x\n" for key in IDS) + 'new,"x\u2028y"\n'
    )
    said = harness(folder, *command, "--fix", "OUT", code=3).stderr
    assert "U+2028" in said
    assert "Repair it by hand." in said
    assert "--fix" not in said


@pytest.mark.parametrize(
    ("name", "data", "words", "advice"),
    [
        ("a.gz", gzip.compress(b"ID,Caption\n", mtime=0), "gzip", "Unpack it"),
        ("a.csv", b"\x89PNG\r\n\x1a\n\0\0", "a PNG image", "text file or its zip"),
        (
            "a.csv",
            "ID,Caption\n".encode("utf-16-le"),
            "UTF-16 without",
            "Export it as CSV (UTF-8, with commas)",
        ),
        ("a.zip", b"PK", "not a zip that can be read", "submission make RUN"),
    ],
)
def test_files_of_other_kinds_are_one_message(name, data, words, advice, tmp_path):
    (tmp_path / name).write_bytes(data)
    (problem,) = check(tmp_path / name, IDS, 2026)
    assert words in problem.what
    assert advice in problem.hint


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([""] * 3, "all 3 captions are empty"),
        ([" ", "\t", ""], "all 3 captions are empty"),
        (["an x-ray"] * 3, "all 3 captions are the same: 'an x-ray'"),
        (["a  b", "a b"], "all 2 captions are the same: 'a b'"),
        (["x" * 99] * 2, f"all 2 captions are the same: '{'x' * 80}'..."),
        (["x"] * 19 + ["y"], "19 of 20 captions (95.0 %) are the same: 'x'"),
        ([""] * 10_001 + ["y"] * 99, "10,001 of 10,100 captions (99.0 %) are empty"),
        (["x"] * 18 + ["y"] * 2, None),
        (["x"], None),
        ([""], "the only one of the captions is empty"),
        ([], None),
        (["x", "y"], None),
    ],
)
def test_sameness(texts, said):
    assert sameness(texts) == said


def test_captions_that_are_all_the_same_are_warned_of_and_accepted(folder):
    (folder / "same.csv").write_text("".join(f"{key}|an x-ray\n" for key in IDS))
    same = "warning: all 5 captions are the same: 'an x-ray'"
    for edition in ("2023", "2026"):
        made = harness(folder, "submission", "make", "same.csv", "--edition", edition, "--ids=IDS")
        assert same in made.stderr
        upload = folder / made.stdout.strip()
        assert json.loads((upload.parent / "manifest.json").read_text())["warnings"] == [same[9:]]
        options = ("--edition", edition, "--ids=IDS")
        done = harness(folder, "submission", "check", str(upload), *options)
        assert same in done.stderr
        assert "ok: 5 rows" in done.stdout
        report = json.loads(
            harness(folder, "submission", "check", str(upload), *options, "--format=json").stdout
        )
        assert report["warnings"] == [same[9:]]
    (folder / "none.csv").write_text("ID,CUIs\n" + "".join(f"{key},\n" for key in IDS))
    options = ("--edition=2026", "--ids=IDS", "--task=concept")
    done = harness(folder, "submission", "check", "none.csv", *options)
    assert "warning: all 5 lists of concepts are empty" in done.stderr


def test_make_says_what_it_read_and_how_ids_were_matched(folder):
    entries = [{"image_id": number, "caption": f"CT {number}"} for number in range(5)]
    (folder / "results.json").write_text(json.dumps(entries))
    done = harness(folder, "submission", "make", "results.json", "--edition=2026", "--ids=IDS")
    assert "results.json: 5 captions, COCO results (JSON)" in done.stderr
    assert "warning: results.json: 5 image_ids matched by number: 0 is scan_000000" in done.stderr
    rows = list(csv.reader((folder / "submissions/results/caption-test/submission.csv").open()))
    assert rows[1:] == [[key, f"CT {number}"] for number, key in enumerate(IDS)]


@pytest.mark.parametrize(
    ("edition", "task", "text", "advice"),
    [
        (2026, "caption", "ID,Caption\na,x, y\n", "Quote captions that hold a comma."),
        (2026, "concept", "ID,CUIs\na,C1,C2\n", "Join the concepts by ;"),
        (2023, "caption", "a|x|y\n", REPAIR),
        (2023, "concept", "a|C1|C2\n", "Join the concepts by ;"),
    ],
)
def test_a_separator_too_many_has_the_advice_of_its_task(edition, task, text, advice, tmp_path):
    (tmp_path / "file.csv").write_text(text)
    (problem,) = check(tmp_path / "file.csv", ["a"], edition, task)
    assert problem.hint == advice


def test_blanks_beside_cuis_are_mended_as_advised(folder):
    (folder / "bad.csv").write_text("ID,CUIs\n" + "".join(f"{key},C1 ; C2\n" for key in IDS))
    command = ["submission", "check", "bad.csv", "--edition=2025", "--ids=IDS", "--task=concept"]
    assert "add to this command: --fix OUT" in harness(folder, *command, code=3).stderr
    harness(folder, *command, "--fix", "OUT")


def test_copies_that_mlflow_keeps_are_no_runs_to_choose_from(folder):
    for place in ("runs/exp/base-s1", "mlartifacts/1/2/artifacts"):
        (folder / place).mkdir(parents=True)
        (folder / place / "run.json").write_text("{}")
    said = harness(folder, "submission", "make", ".", code=2).stderr
    assert "Runs: runs/exp/base-s1\n" in said
