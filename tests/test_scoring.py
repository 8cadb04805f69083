"""`harness score`: every official format by looking, golden values, mistakes in sentences."""

import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import captions, cli, scoring, submission
from harness.config import STANDIN
from harness.errors import UserError
from harness.submission.inputs import read

with (Path(__file__).parent / "golden" / "pairs.csv").open(encoding="utf-8", newline="") as table:
    GOLDEN = list(csv.DictReader(table))
PREDICTIONS = {row["ID"]: row["prediction"] for row in GOLDEN}
REFERENCES = {row["ID"]: row["reference"] for row in GOLDEN}
OVER_ALL = {
    "bertscore": 0.649737943,
    "rouge1": 0.460836720,
    "bleu1": 0.480769231,
    "meteor": 0.245517621,
    "cider": 2.253344314,
    "cider_ptb": 2.084978765,
}
"""From golden/README.md: the official evaluator of 2023 and pycocoevalcap."""
ODD = '|,"\t\n\r\u2028\x85\x00\ud800\ufeff; aID'
ANYTHING = st.text(st.characters()) | st.text(alphabet=ODD, max_size=12)
WITHOUT_PIPES = {key: text.replace("|", "/") for key, text in PREDICTIONS.items()}


def harness(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness", "score", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def written(values: dict[str, str], separator: str, header: bool, end: str, quoted: bool = False) -> str:
    """The captions as another program would write them."""
    rows = [*([("ID", "Caption")] if header else []), *values.items()]
    if separator != ",":
        return "".join(f"{key}{separator}{value}{end}" for key, value in rows)
    text = io.StringIO()
    how = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator=end, quoting=how).writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("last", [True, False], ids=["newline", "no newline"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("header", [True, False], ids=["header", "no header"])
@pytest.mark.parametrize("separator", ["|", "\t", ",", "quoted", "zip"])
def test_each_format_reads_back_equal(separator, header, end, mark, last, tmp_path):
    kind = {"|": "pipe", "\t": "tab"}.get(separator, "comma")
    sign = separator if separator in ("|", "\t") else ","
    values = WITHOUT_PIPES if sign == "|" else PREDICTIONS
    text = written(values, sign, header, end, separator == "quoted")
    data = mark + (text if last else text.removesuffix(end)).encode()
    path = tmp_path / "file.csv"
    path.write_bytes(data)
    if separator == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("submission.csv", data)
    found = read(path)
    assert dict(found.values) == values
    assert f"32 captions, {kind}-separated {'with' if header else 'without'} header" in str(found)
    assert list(found.lines.values()) == list(range(1 + header, 33 + header))
    assert any("byte order mark" in warning for warning in found.warnings) == bool(mark)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(ANYTHING, min_size=3, max_size=3), edition=st.sampled_from([2022, 2023, 2025, 2026]))
def test_what_our_writers_write_is_read_as_they_promise(texts, edition, tmp_path_factory):
    ids = ["a_1", "b_2", "c"]
    found = dict(zip(ids, texts, strict=True))
    path = tmp_path_factory.getbasetemp() / ("written.csv" if edition < 2025 else "written.zip")
    submission.write_captions(path, found, ids, edition)
    assert dict(read(path).values) == {key: submission.as_written(v, edition) for key, v in found.items()}


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(ANYTHING, min_size=3, max_size=3))
def test_a_runs_own_file_is_read_as_it_was_written(texts, tmp_path_factory):
    # a run's captions hold no CR and no half of a surrogate pair
    texts = [re.sub("[\r\ud800-\udfff]", " ", text) for text in texts]
    found = dict(zip(["a_1", "VALID_2", "c"], texts, strict=True))
    path = captions.write_captions(tmp_path_factory.getbasetemp() / "own.csv", found)
    assert dict(read(path).values) == found


def test_tab_files_are_not_quoted_and_keep_pipes(tmp_path):
    """Of the kinds in the 2023 validation file that CSV quoting would read differently."""
    lines = {"a": '"Quoted" sign | left', "b": 'opens " and never closes', "c": '"all of it"', "d": "a,b"}
    path = tmp_path / "labels.csv"
    path.write_text(written(lines, "\t", True, "\r\n"), encoding="utf-8", newline="")
    assert dict(read(path).values) == lines


def test_line_breaks_inside_quotes_shift_nothing(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('ID,Caption\nc,"one\ntwo\n\nID,three"\nb,"x, ""y"""\na,z\n')
    found = read(path)
    assert dict(found.values) == {"c": "one\ntwo\n\nID,three", "b": 'x, "y"', "a": "z"}
    assert found.lines == {"c": 2, "b": 6, "a": 7}
    (tmp_path / "r.csv").write_text("ID\tcaption\na\tA\nb\tB\nc\tC\n")
    rows = scoring.rows(path, tmp_path / "r.csv")
    assert list(zip(rows.ids, rows.predictions, rows.references, strict=True)) == [
        ("a", "z", "A"),
        ("b", 'x, "y"', "B"),
        ("c", "one\ntwo\n\nID,three", "C"),
    ]


def test_a_pipe_file_is_read_as_the_organisers_do(tmp_path):
    (tmp_path / "p.csv").write_text("Image ID|caption\na|CT | left\nVALID_2|x\nb|plain\nc|\n\n")
    (tmp_path / "r.csv").write_text("ID,Caption\na,A | B\nb,B\nc,C\nVALID_2,D\n")
    rows = scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv")
    assert rows.predictions == ["CT ", "plain", "", "x"]
    assert rows.references[0] == "A | B"
    text = "\n".join(rows.warnings)
    assert "p.csv: 1 row (line 2) cut at a pipe" in text
    assert "p.csv: 1 row (line 1) passed over" in text
    assert "p.csv: 1 row (line 3) scored; the organisers' loader would ignore" in text
    assert "p.csv: blank lines are passed over; a submission must not have any" in text
    assert len(rows.warnings) == 4


# predictions, references, words that have to be said
REFERENCE = b"ID\tcaption\na\tA\nb\tB\nc\tC\n"
FAULTS = {
    "missing ids": (b"a|x\n", REFERENCE, ["r.csv:3", "no prediction in p.csv", "b (line 3), c (line 4)"]),
    "other ids": (b"a|x\nb|y\nc|z\nd|w\n", REFERENCE, ["p.csv:4", "not among the references in r.csv: d"]),
    "many": (
        b"".join(b"x%d|y\n" % n for n in range(1200)),
        REFERENCE,
        ["x0 (line 1), x1 (line 2), x2 (line 3) and 1,197 more", "same split"],
    ),
    "endings": (b"a.jpg|x\nb|y\nc|z\n", REFERENCE, ["p.csv:1", "a.jpg", "Leave out the ending"]),
    "twice": (b"a|x\nb|y\na|z\nc|z\n", REFERENCE, ["p.csv:3", "was there before: a, as on line 1"]),
    "twice in references": (b"a|x\nb|y\n", b"ID,Caption\na,x\na,y\nb,z\n", ["r.csv:3", "line 2"]),
    "empty id": (b"a|x\n|y\nc|z\n", REFERENCE, ["p.csv:2", "empty"]),
    "white space": (b"a |x\nb|y\nc|z\n", REFERENCE, ["p.csv:1", "'a '", "white space"]),
    "one field": (b"a|x\nb\nc|z\n", REFERENCE, ["p.csv:2", "has no pipe"]),
    "three columns": (b"ID,Caption\na,x, y\nb,y\nc,z\n", REFERENCE, ["p.csv:2", "3 columns", "Quote"]),
    "three tabs": (b"ID\tcaption\na\tx\ty\nb\ty\nc\tz\n", REFERENCE, ["p.csv:2", "3 columns"]),
    "open quote": (b'ID,Caption\na,"x\nb,y\nc,z\n', REFERENCE, ["p.csv:2", "not CSV"]),
    "after quote": (b'ID,Caption\na,"x" y\nb,y\nc,z\n', REFERENCE, ["p.csv:2", "not CSV", "Quote"]),
    "latin-1": (b"a|x\nb|\xb5m\nc|z\n", REFERENCE, ["p.csv:2", "byte 6", "0xb5", "UTF-8"]),
    "utf-16": ("a|x\nb|y\nc|z\n".encode("utf-16"), REFERENCE, ["UTF-16", "Save it as UTF-8"]),
    "empty file": (b"", REFERENCE, ["p.csv: is empty"]),
    "blank file": (b"\n\n", REFERENCE, ["p.csv: is empty"]),
    "header only": (b"ID,Caption\n", REFERENCE, ["a header and nothing else"]),
    "prose": (b"no captions here\n", REFERENCE, ["neither pipes, tabs nor commas"]),
    "semicolons": (b"ID;Caption\na;x, y\n", REFERENCE, ["semicolons", "commas"]),
    "concepts": (b"ID,CUIs\na,C0040405\nb,C0040405;C0817096\nc,C1306645\n", REFERENCE, ["holds concepts"]),
    "jpg": (b"\xff\xd8\xff\xe0" + bytes(range(256)), REFERENCE, ["is a JPEG image"]),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(99), REFERENCE, ["is a PNG image"]),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), REFERENCE, ["compressed by gzip", "Unpack"]),
    "binary": (bytes(range(256)) * 9, REFERENCE, ["UTF-8"]),
    "two files at once": (b"a|x\nb\n", b"ID,Caption\na\n", ["p.csv:2", "r.csv:2"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_mistake_is_said_with_its_place(case, tmp_path):
    predictions, references, words = FAULTS[case]
    (tmp_path / "p.csv").write_bytes(predictions)
    (tmp_path / "r.csv").write_bytes(references)
    with pytest.raises(UserError) as error:
        scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv")
    text = str(error.value)
    assert error.value.exit_code == 2
    for word in words:
        assert word in text
    assert len(text) < 2500


def test_all_kinds_of_mistakes_are_said_at_once(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"ID,Caption\na,x\na,y\n,z\nb,x,y\nc,\xff\n" + b"d,1,2\n" * 50)
    (tmp_path / "r.csv").write_bytes(REFERENCE)
    with pytest.raises(UserError) as error:
        scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv")
    assert [problem.line for problem in error.value.problems] == [6, 3, 4, 5]
    assert "lines" not in str(error.value)
    assert "and 48 more" in str(error.value)


@pytest.mark.parametrize("name", ["p.xlsx", "p.csv"])  # under a CSV's name too
def test_workbooks_are_to_be_exported(name, tmp_path):
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ("[Content_Types].xml", "_rels/.rels", "xl/workbook.xml", "xl/worksheets/sheet1.xml"):
            archive.writestr(part, "<xml/>")
    with pytest.raises(UserError, match="Excel workbook") as error:
        read(tmp_path / name)
    assert "Export it as CSV" in str(error.value)


def test_a_zip_holds_the_submission_at_its_root(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("mine/submission.csv", "ID,Caption\na,x\n")
    with pytest.raises(UserError, match="at its root"):
        read(tmp_path / "p.zip")


def test_no_damage_ends_in_a_traceback(tmp_path):
    """300 files cut short or with flipped bytes: each is read, or refused with a sentence."""
    formats = (("|", False, "\n"), ("\t", True, "\r\n"), (",", True, "\n"))
    seeds = [written(WITHOUT_PIPES, *how).encode() for how in formats]
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("submission.csv", seeds[2])
    seeds.append((tmp_path / "z.zip").read_bytes())
    references = tmp_path / "r.csv"
    references.write_text(written(REFERENCES, "\t", True, "\n"), encoding="utf-8", newline="")
    path, chance, refused = tmp_path / "p.csv", random.Random(0), []
    for case in range(300):
        data = bytearray(seeds[case % len(seeds)])
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        for _ in range(chance.randint(0, 4) if data else 0):
            data[chance.randrange(len(data))] = chance.choice([*b'|\t,"\n\r\0', chance.randrange(256)])
        path.write_bytes(data)
        try:
            rows = scoring.rows(path, references)
        except UserError as error:
            refused.append(str(error))
        else:
            assert rows.ids == list(REFERENCES)
            assert rows.references == list(REFERENCES.values())
    assert 100 < len(refused) < 300
    assert all(str(path) in text or str(references) in text for text in refused)


def test_images_are_found_by_id_one_folder_deeper_too(tmp_path):
    (tmp_path / "p.csv").write_text("a|x\nb|y\nc|z\n")
    (tmp_path / "r.csv").write_bytes(REFERENCE)
    images = tmp_path / "images"
    (images / "valid").mkdir(parents=True)
    for name in ("valid/b.PNG", "valid/a.jpeg", "c.jpg", "notes.txt"):
        (images / name).write_bytes(b"")
    rows = scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv", images)
    assert rows.images == [images / "valid" / "a.jpeg", images / "valid" / "b.PNG", images / "c.jpg"]
    (images / "c.jpg").unlink()
    (images / "a.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv", images)
    assert "no image: c" in str(error.value)
    assert "more than one image of an id" in str(error.value)
    with pytest.raises(UserError, match="no such folder"):
        scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv", tmp_path / "none")


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    """The golden pairs in two official formats, and a run that has predicted and scored two images."""
    folder = tmp_path_factory.mktemp("golden")
    captions.write_captions(folder / "predictions.csv", PREDICTIONS)
    labels = written(REFERENCES, "\t", True, "\r\n")
    (folder / "labels.csv").write_text(labels, encoding="utf-8", newline="")
    few = dict(list(PREDICTIONS.items())[:2])
    captions.write_captions(folder / "runs" / "steps" / "postprocess-1" / "predictions.csv", few)
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
        (step / "inputs.json").write_text(json.dumps({"metric": metric}))
        if done:
            (step / "DONE").write_text("")
    os.utime(folder / "runs" / "steps" / "standin-own" / "DONE", (1, 1))
    record = {
        "name": "group/exp",
        "status": "FINISHED",
        "edition": 2025,
        "command": "python -m harness run experiments/exp.yaml",
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
    done = harness(golden, "predictions.csv", "--references", "labels.csv", "--standins", "--format", "json")
    assert done.stderr.count("32 captions") == 2
    return json.loads(done.stdout)


def test_values_through_the_command_are_the_golden_ones(first):
    assert list(first) == ["edition", "n", "scores", "warnings", "inputs"]
    assert (first["edition"], first["n"]) == (2023, 32)
    assert first["inputs"] == [
        "predictions.csv: 32 captions, comma-separated with header (2024 to 2026)",
        "labels.csv: 32 captions, tab-separated with header (labels of 2022, 2023)",
    ]
    scores = first["scores"]
    for name, value in OVER_ALL.items():
        assert scores[name]["value"] == pytest.approx(value, abs=1e-6)
        assert scores[name]["low"] <= value <= scores[name]["high"]
        assert list(scores[name]) == ["value", "low", "high", "signature", "official", "seconds"]
        assert scores[name]["signature"].startswith(f"{name}|clef2023|")
    assert not scores["bertscore"]["official"]
    assert scores["rouge1"]["official"]
    for name, reason in (("clipscore", "images"), ("bleurt", "")):
        assert scores[name]["value"] is None
        assert reason in scores[name]["reason"]
    assert any("empty after pre-processing" in warning for warning in first["warnings"])


def test_table_csv_and_per_image_say_the_same(golden, first):
    files = ("predictions.csv", "--references", "labels.csv", "--standins")
    table = harness(golden, *files, "--per-image", "out/each.csv")
    lines = {line.split()[0]: line for line in table.stdout.splitlines()}
    assert "warning: " in table.stderr
    plain = harness(golden, *files, "--format", "csv")
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
        assert float(ours["meteor"]) == pytest.approx(float(official["meteor_segment"]), abs=2e-6)


def test_a_terminal_of_80_columns_is_not_overrun(golden, first):
    import pty

    parent, child = pty.openpty()
    command = ["predictions.csv", "--references", "labels.csv", "--standins"]
    subprocess.run(
        [sys.executable, "-m", "harness", "score", *command],
        cwd=golden,
        stdout=child,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"COLUMNS": "80"},
        check=True,
    )
    os.close(child)
    shown = os.read(parent, 1 << 16).decode().replace("\r\n", "\n")
    os.close(parent)
    signature = first["scores"]["bertscore"]["signature"]
    assert max(map(len, shown.splitlines())) <= 80
    assert signature in re.sub(r"\n +", "", shown)


def test_scoring_again_needs_no_torch(golden, first):
    files = ["predictions.csv", "--references", "labels.csv", "--standins"]
    code = (
        f"import sys; sys.argv = ['harness', 'score', *{files!r}]\n"
        "from harness.cli import main\n"
        "main()\n"
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
    assert "no prediction in predictions.csv: golden_03 (line 4)" in said


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
    "value": (["--set", "score.precision=fp8"], ["'fp8'", "'fp32' or 'bf16'"]),
    "no value": (["--set", "score.precision"], ["--set key=value"]),
    "edition": (["--edition", "2021"], ["2021", "2023"]),
    "per image": (["--per-image", "runs"], ["--per-image", "is a folder"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_options(case, refused):
    options, words = MISTAKES[case]
    said = refused("predictions.csv", "--references", "labels.csv", *options)
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
    assert "Finish it: python -m harness run" in str(error.value)


def test_ctrl_c_ends_with_130(golden, tmp_path):
    """Interrupted while METEOR works in its thread: neither a traceback nor a wait for it."""
    many = {f"x_{n}": f"{text} {n}" for n in range(400) for text in ["axial ct of the chest with a mass"]}
    for name in ("p.csv", "r.csv"):
        captions.write_captions(tmp_path / name, many)
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
    assert "400 captions" in running.stderr.readline()
    time.sleep(1.5)
    began = time.perf_counter()
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said
    assert time.perf_counter() - began < 15, "waited for METEOR"
