"""What `harness score` reads: it recognises every official format, explains mistakes, finds images."""

import csv
import random
import re
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden_pairs import PREDICTIONS, REFERENCES, written

from harness import scoring, submission
from harness.data.captionfiles import read
from harness.errors import UserError
from harness.records.files import write_captions

ODD = '|,"\t\n\r\u2028\x85\x00\ud800\ufeff; aID'
ANYTHING = st.text(st.characters()) | st.text(alphabet=ODD, max_size=12)
WITHOUT_PIPES = {key: text.replace("|", "/") for key, text in PREDICTIONS.items()}


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
    assert f"32 captions, {kind}-separated {'with' if header else 'without'} header" in found.described()
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
    path = write_captions(tmp_path_factory.getbasetemp() / "own.csv", found)
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
    assert "p.csv: 1 caption (a) cut at a pipe" in text
    assert "p.csv: 1 caption (Image ID) passed over" in text
    assert "p.csv: 1 caption (VALID_2) scored; the organisers' loader would ignore" in text
    assert "p.csv: blank lines are passed over; a submission must not have any: line 6" in text
    assert len(rows.warnings) == 4


LABELS = {"a": "A", "b": "B", "c": "C"}
OTHERWISE = {
    "no header": (
        b"a,x\nb,y\nc,z\n",
        ["has no header: the organisers' loader takes its first row, a, for one"],
    ),
    "header": (b"ID,Caption\na,x\nb,y\nc,z\n", []),
    "pipes": (b"a|x\nb|y\nc|z\n", []),
    "CR in quotes": (
        b'ID,Caption\na,x\nb,"y\rw"\nc,"z\r\nv"\n',
        ["2 captions (b, c) with a carriage return inside: the organisers' loader reads a line feed there"],
    ),
    "CR in pipes": (
        b"a|x\nb|y\rw\nc|z\n",
        ["1 caption (b) with a carriage return inside: the organisers' loader ends the row there"],
    ),
    "CR ends rows": (b"a|x\rb|y\nc|z\r", []),
    "long": (
        b"ID,Caption\na,x\nb," + b"y" * 131_073 + b"\nc,z\n",
        ["1 caption (b) of more than 131,072 characters: the organisers' loader refuses the file"],
    ),
    "as long as may be": (b"a|x\nb|" + b"y" * 131_072 + b"\nc|z\n", []),
    "quotes in tabs": (
        b'ID\tcaption\na\t"x" y\nb\ty "w"\nc\t"z"\n',
        ["2 captions (a, c) beginning with a quote: here it stays, a reader of CSV would drop it"],
    ),
    "quotes in pipes": (b'a|"x" y\nb|y\nc|z\n', []),
    "cut": (b"a|x|v\nb|y\nc|z\n", ["1 caption (a) cut at a pipe, as the organisers' loader does"]),
    "the same": (b"a|x\nb|x\nc|x\n", ["all 3 captions are the same: 'x'"]),
    "empty": (b"a|\nb|\nc|\n", ["all 3 captions are empty"]),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_where_the_organisers_read_otherwise_is_said_with_ids(case, tmp_path):
    data, warnings = OTHERWISE[case]
    (tmp_path / "p.csv").write_bytes(data)
    (tmp_path / "r.csv").write_text(written(LABELS, "\t", True, "\n"))
    rows = scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv")
    assert rows.warnings == [f"p.csv: {warning}" for warning in warnings]


def test_the_labels_of_2023_have_no_warning_of_their_own(tmp_path):
    """Of what the organisers would read, predictions alone count."""
    (tmp_path / "p.csv").write_text("a|x\nb|y\nc|z\n")
    (tmp_path / "r.csv").write_text('a,"\r"\nb,B\nc,C\n', newline="")
    assert scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv").warnings == []


def test_white_space_beside_semicolons_is_read_as_the_organisers_do(tmp_path):
    (tmp_path / "p.csv").write_text("ID,CUIs\na,C1 ; C2\nb,\nc,C3\n")
    (tmp_path / "r.csv").write_text("ID,CUIs\na,C1;C2\nb,\nc,C3\n")
    rows = scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv", task="concept")
    scores, _ = scoring.score_concepts(rows, None, 2026, 0)
    assert scores["f1"].value == 1


def test_headers_in_the_middle_of_a_pipe_file_are_passed_over_with_a_warning(tmp_path):
    """As of two files joined; the organisers' loader ignores ids that hold "ID"."""
    (tmp_path / "p.csv").write_text("ID|caption\na|x\nID|caption\nb|y\n")
    found = read(tmp_path / "p.csv")
    assert dict(found.values) == {"a": "x", "b": "y"}
    assert found.warnings == ["rows with the id ID are passed over, as in the organisers' loader: line 3"]


def test_nothing_but_empty_captions_are_not_concepts(tmp_path):
    (tmp_path / "p.csv").write_text("a|\nb|\nc|\n")
    (tmp_path / "r.csv").write_bytes(REFERENCE)
    assert scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv").predictions == ["", "", ""]


def test_a_caption_may_be_longer_than_the_csv_modules_limit(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "p.csv").write_text(f'ID,Caption\na,"{"x" * 131_073}"\nb,y\n')
    assert len(read(tmp_path / "p.csv").values["a"]) == 131_073
    assert csv.field_size_limit() == limit


# predictions, references, words that have to be said
REFERENCE = b"ID\tcaption\na\tA\nb\tB\nc\tC\n"
FAULTS = {
    "missing ids": (b"a|x\n", REFERENCE, ["r.csv:3", "no prediction in p.csv", "b (line 3), c (line 4)"]),
    "other ids": (b"a|x\nb|y\nc|z\nd|w\n", REFERENCE, ["p.csv:4", "not among the references in r.csv: d"]),
    "many": (
        b"".join(b"x%d|y\n" % n for n in range(1200)),
        REFERENCE,
        ["x3 (line 4), x4 (line 5) and 1,195 more", "same split"],
    ),
    "endings": (b"a.jpg|x\nb|y\nc|z\n", REFERENCE, ["p.csv:1", "a.jpg", "Leave out the ending"]),
    "twice": (b"a|x\nb|y\na|z\nc|z\n", REFERENCE, ["p.csv:3", "a repeated id: a, as on line 1"]),
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
    "utf-16 LE without BOM": (
        "a|x\nb|y\n".encode("utf-16-le"),
        REFERENCE,
        ["is UTF-16 without a byte order"],
    ),
    "utf-16 BE without BOM": (
        "a|x\nb|y\n".encode("utf-16-be"),
        REFERENCE,
        ["is UTF-16 without a byte order"],
    ),
    "utf-32": ("a|x\nb|y\n".encode("utf-32"), REFERENCE, ["p.csv: is UTF-32, not UTF-8"]),
    "utf-32 BE": ("\ufeffa|x\nb|y\n".encode("utf-32-be"), REFERENCE, ["is UTF-32, not UTF-8"]),
    "utf-32 without BOM": ("a|x\nb|y\n".encode("utf-32-le"), REFERENCE, ["is UTF-32, not UTF-8"]),
    "header again": (
        b"ID,Caption\na,x\nb,y\nID,Caption\nc,z\n",
        REFERENCE,
        ["p.csv:4: a header that is not"],
    ),
    "header twice": (
        b"ID,Caption\nID,Caption\na,x\n",
        REFERENCE,
        ["p.csv:2: a header that is not the first"],
    ),
    "header again in tabs": (b"a|x\nb|y\nc|z\n", REFERENCE + b"ID\tcaption\n", ["r.csv:5: a header that is"]),
    "small id in pipes": (b"a|x\nb|y\nid|w\nc|z\n", REFERENCE, ["p.csv:3: a header that is not the first"]),
    "empty file": (b"", REFERENCE, ["p.csv: is empty"]),
    "blank file": (b"\n\n", REFERENCE, ["p.csv: is empty"]),
    "header only": (b"ID,Caption\n", REFERENCE, ["a header and nothing else"]),
    "prose": (b"no captions here\n", REFERENCE, ["neither pipes, tabs nor commas"]),
    "semicolons": (b"ID;Caption\na;x, y\n", REFERENCE, ["semicolons", "commas"]),
    "concepts": (b"ID,CUIs\na,C0040405\nb,C0040405;C0817096\nc,C1306645\n", REFERENCE, ["holds concepts"]),
    "concepts, some empty": (b"a|C0040405\nb|\nc|C1306645\n", REFERENCE, ["holds concepts, not captions"]),
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
    assert "and 46 more" in str(error.value)


@pytest.mark.parametrize("name", ["p.xlsx", "p.csv"])  # under a CSV's name too
def test_workbooks_are_to_be_exported(name, tmp_path):
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ("[Content_Types].xml", "_rels/.rels", "xl/workbook.xml", "xl/worksheets/sheet1.xml"):
            archive.writestr(part, "<xml/>")
    with pytest.raises(UserError, match="Excel workbook") as error:
        read(tmp_path / name)
    assert "Export it as CSV" in str(error.value)


@pytest.mark.parametrize("name", ["mine/submission.csv", "captions.TXT", "submission.csv"])
def test_the_one_text_of_a_zip_is_read_with_a_warning(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for other in ("mine/", "__MACOSX/._submission.csv", "mine/._captions.csv", "image.png"):
            archive.writestr(other, b"\0\5\x16\7")
        archive.writestr(name, "ID,Caption\na,x\n")
    found = read(tmp_path / "p.zip")
    assert dict(found.values) == {"a": "x"}
    assert found.warnings == [
        f"reads {name}; the organisers require a zip of submission.csv and nothing else"
    ]


@pytest.mark.parametrize("names", [["a.csv", "b.csv"], ["submission.csv", "more.txt"], ["image.png"], []])
def test_a_zip_of_no_or_several_texts_is_refused(names, tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "ID,Caption\na,x\n")
    with pytest.raises(UserError, match="at its root"):
        read(tmp_path / "p.zip")


def test_no_damage_ends_in_a_traceback(tmp_path):
    """300 files cut short or with flipped bytes: each is read, or refused with a sentence."""
    formats = (
        {"separator": "|", "header": False, "end": "\n"},
        {"separator": "\t", "header": True, "end": "\r\n"},
        {"separator": ",", "header": True, "end": "\n"},
    )
    seeds = [written(WITHOUT_PIPES, **one).encode() for one in formats]
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
    assert f"r.csv:4: no image in {images}: c" in str(error.value)
    assert "more than one image of an id" in str(error.value)
    with pytest.raises(UserError, match="no such folder"):
        scoring.rows(tmp_path / "p.csv", tmp_path / "r.csv", tmp_path / "none")
