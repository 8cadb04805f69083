"""Submission files: any captions give an accepted file; damage is reported or repaired."""

import contextlib
import csv
import io
import json
import random
import re
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fuzzing import cases

from harness.data.forms import REPAIR
from harness.errors import UserError
from harness.submission import as_written, check, fix, make, read, write_captions, write_concepts

IDS = [f"ImageCLEFmedical_Caption_2023_test_{n:06d}" for n in range(1, 6)]
CAPTIONS = dict(
    zip(IDS, ["A CT, axial", 'the "sail" sign', "", "plain", "µ × ≥ “quoted” 中 \U0001f9ec"], strict=True)
)
CONCEPTS = dict(
    zip(IDS, [["C0040405", "C0817096"], ["C1"], ["C2", "C1306645", "C3"], ["C0024485"], ["C9"]], strict=True)
)
EDITIONS = [2022, 2023, 2025, 2026]
HEADERS = ("ID,Caption", "ID,CUIs")
ANYTHING = st.text(st.characters()) | st.text(alphabet='|,"\n\r\u2028\x85\x00\ud800\ufeff; a', max_size=12)


def the_checker_of_2026(text: str, ids: list[str]) -> list[str]:
    """Another reading of facts.md's rules on the 2026 checker: Python's csv over the raw lines."""
    problems = []
    raw = text.splitlines()
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if rows[0] != ["ID", "Caption"] or raw[0] != "ID,Caption":
        problems.append("header")
    for number, row in enumerate(rows[1:], 1):
        if len(row) != 2:
            problems.append(f"columns {number}")
        elif "," in row[1] and not raw[number].endswith('"'):
            problems.append(f"unquoted comma {number}")
    if [row[0] for row in rows[1:] if row] != ids:
        problems.append("ids")
    return problems


def the_loader_of_2023(text: str) -> dict[str, str]:
    """Another reading of facts.md's rules on the 2023 loader: second field of an unquoted pipe file."""
    rows = csv.reader(io.StringIO(text), delimiter="|", quoting=csv.QUOTE_NONE)
    return {row[0]: row[1] for row in rows if "ID" not in row[0]}


@pytest.mark.parametrize("edition", EDITIONS)
@settings(max_examples=75, deadline=None)
@given(texts=st.lists(ANYTHING, min_size=3, max_size=3))
def test_any_caption_is_accepted_and_reads_back(edition, texts, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / f"any-{edition}"
    ids = IDS[:3]
    captions = dict(zip(ids, texts, strict=True))
    upload = make(captions, ids, edition, directory, {"run": "x"})
    assert check(upload, ids, edition) == []
    expected = {key: as_written(text, edition) for key, text in captions.items()}
    assert read(upload) == expected
    if edition == 2023:
        assert the_loader_of_2023(upload.read_text(encoding="utf-8")) == expected
    if edition == 2026:
        text = (upload.parent / "submission.csv").read_bytes().decode()
        assert the_checker_of_2026(text, ids) == []
    for key, text in captions.items():
        if not any("\ud800" <= c <= "\udfff" for c in text):
            collapsed = " ".join(text.split())
            assert expected[key] == (collapsed.replace("|", "/") if edition < 2025 else collapsed)


CUIS = st.lists(st.from_regex("C[0-9]{1,7}", fullmatch=True), max_size=110)


@pytest.mark.parametrize("edition", EDITIONS)
@settings(max_examples=60, deadline=None)
@given(values=st.lists(CUIS | st.lists(ANYTHING.filter(bool), max_size=2), min_size=2, max_size=2))
def test_any_concepts_are_accepted_and_read_back_or_refused(edition, values, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / f"any-concepts-{edition}"
    ids = IDS[:2]
    concepts = dict(zip(ids, values, strict=True))
    good = all(re.fullmatch(r"C\d+", cui) for cuis in values for cui in cuis)
    few = all(len(set(cuis)) <= 100 for cuis in values)
    if good and few:
        upload = make(concepts, ids, edition, directory, {}, task="concept")
        assert check(upload, ids, edition, "concept") == []
        assert {key: value.split(";") if value else [] for key, value in read(upload).items()} == {
            key: sorted(set(cuis), key=cuis.index) for key, cuis in concepts.items()
        }
    else:
        with pytest.raises(UserError) as error:
            make(concepts, ids, edition, directory / "refused", {}, task="concept")
        assert error.value.exit_code == 3
        assert not list(directory.glob("refused/**/*.csv"))


def test_bytes_of_each_format(tmp_path):
    pipe = write_captions(tmp_path / "c.csv", {"a": 'x | "y"\n z', "b": ""}, ["b", "a"], 2023)
    assert pipe.read_bytes() == b'b|\na|x / "y" z\n'
    comma = write_captions(tmp_path / "submission.csv", {"a": 'x, "y"', "b": ""}, ["b", "a"], 2026)
    assert comma.read_bytes() == b'ID,Caption\nb,""\na,"x, ""y"""\n'
    concepts = {"a": ["C0040405", "C0817096", "C0040405"], "b": ["C0040405"]}
    assert write_concepts(tmp_path / "p", concepts, ["b", "a"], 2022).read_bytes() == (
        b"b|C0040405\na|C0040405;C0817096\n"
    )
    assert write_concepts(tmp_path / "s.csv", concepts, ["a", "b"], 2025).read_bytes() == (
        b"ID,CUIs\na,C0040405;C0817096\nb,C0040405\n"
    )


def test_manifest_and_zip_are_deterministic(tmp_path):
    first = make(CAPTIONS, IDS, 2026, tmp_path / "a", {"run": "r", "commit": "c"}, split="test")
    second = make(CAPTIONS, IDS, 2026, tmp_path / "b", {"run": "r", "commit": "c"}, split="test")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == ["submission.csv"]
        assert archive.testzip() is None
    manifest = json.loads((first.parent / "manifest.json").read_text())
    assert manifest["run"] == "r"
    assert manifest["n"] == len(IDS)
    assert manifest == json.loads((second.parent / "manifest.json").read_text())
    concepts = make({key: ["C1"] for key in IDS}, IDS, 2026, tmp_path / "a", {}, task="concept")
    assert concepts.parent != first.parent
    assert read(concepts) == dict.fromkeys(IDS, "C1")


def test_nothing_is_made_up_and_nothing_dropped(tmp_path):
    with pytest.raises(UserError) as error:
        make({IDS[0]: "x", "other": "y"}, [*IDS, IDS[0]], 2023, tmp_path, {})
    assert error.value.exit_code == 3
    for part in ("4 ids", IDS[4], "other", "twice"):
        assert part in str(error.value)
    assert not list(tmp_path.rglob("*.csv"))
    with pytest.raises(UserError, match="not established"):
        write_captions(tmp_path / "x", CAPTIONS, IDS, 2024)
    with pytest.raises(UserError, match='holds "ID"'):
        write_captions(tmp_path / "x", {"VALID_1": "x"}, ["VALID_1"], 2023)
    many = {"a": [f"C{n}" for n in range(101)], "b": ["X1"]}
    with pytest.raises(UserError) as error:
        write_concepts(tmp_path / "x", many, ["a", "b"], 2023)
    assert "101 CUIs" in str(error.value)
    assert "'X1'" in str(error.value)


COMMA = {
    "bom": (b"\xef\xbb\xbfID,Caption\na,x\nb,y\n", [1], "byte order mark"),
    "utf-16": ("ID,Caption\na,x\nb,y\n".encode("utf-16"), [1], "UTF-16"),
    "header": (b"id,caption\na,x\nb,y\n", [1], "ID,Caption"),
    "no header": (b"a,x\nb,y\n", [1], "ID,Caption"),
    "header with space": (b"ID, Caption\na,x\nb,y\n", [1], "ID,Caption"),
    "blank": (b"ID,Caption\na,x\n\nb,y\n", [3], "blank"),
    "blank last": (b"ID,Caption\na,x\nb,y\n\n", [4], "blank"),
    "comma": (b"ID,Caption\na,x, z\nb,y\n", [2], "3 columns"),
    "one column": (b"ID,Caption\na\nb,y\n", [2], "no ','"),
    "space around id": (b"ID,Caption\na ,x\nb,y\n", [2], "white space"),
    "unknown": (b"ID,Caption\na,x\nb,y\nc,z\n", [4], "not among"),
    "ending": (b"ID,Caption\na.jpg,x\nb,y\n", [2], "ending of an image"),
    "twice": (b"ID,Caption\na,x\nb,y\na,x\n", [4], "line 2"),
    "missing": (b"ID,Caption\na,x\n", [None], "missing"),
    "order": (b"ID,Caption\nb,y\na,x\n", [2], "order"),
    "newline": (b'ID,Caption\na,"x\nz"\nb,y\n', [2], "U+000A"),
    "separator": ('ID,Caption\na,"x\u2028z"\nb,y\n'.encode(), [2], "U+2028"),
    "open quote": (b'ID,Caption\na,"x\nb,y\n', [2], "never closed"),
    "after quote": (b'ID,Caption\na,"x, y" \nb,y\n', [2], "after a closing quote"),
    "lone CR last": (b"ID,Caption\na,x\nb,y\n\r", [4], "blank"),
    "latin-1": (b"ID,Caption\na,x\nb,\xb5m\n", [3], "byte 17: 0xb5"),
    "empty": (b"", [1, None], "missing"),
}


@pytest.mark.parametrize("case", COMMA)
def test_each_problem_of_2026_has_its_line(case, tmp_path):
    data, lines, words = COMMA[case]
    path = tmp_path / "submission.csv"
    path.write_bytes(data)
    problems = check(path, ["a", "b"], 2026)
    assert [problem.line for problem in problems] == lines, problems
    assert words in " ".join(problem.what for problem in problems)
    assert all(problem.hint and problem.file == path for problem in problems)
    if case not in ("unknown", "missing", "latin-1", "one column", "empty"):
        done = fix(path, tmp_path / "out.zip", ["a", "b"], 2026)
        assert done
        assert check(tmp_path / "out.zip", ["a", "b"], 2026) == []
        before = data.decode("utf-16" if case == "utf-16" else "utf-8-sig")
        words_before = re.split(r'[\s",]+', before)
        for key, caption in read(tmp_path / "out.zip").items():
            assert set(caption.replace(",", " ").split()) <= set(words_before), key


def test_a_first_row_in_place_of_a_header_is_said_once(tmp_path):
    path = tmp_path / "submission.csv"
    for data, found in (
        (b'a,"x" y\nb,z\n', ["the first line is not ID,Caption", "has text after a closing quote"]),
        (b'"I"D,Caption\na,x\nb,z\n', ["has text after a closing quote"]),
    ):
        path.write_bytes(data)
        whats = [problem.what.partition(":")[0] for problem in check(path, ["a", "b"], 2026)]
        assert whats == found


def test_what_the_2026_checker_accepts_is_accepted(tmp_path):
    path = tmp_path / "submission.csv"
    for data in (
        b"ID,Caption\na,\nb,y\n",
        b"ID,Caption\r\na,x\r\nb,y\r\n",
        b'ID,Caption\n"a","x"\n"b","y, z"\n',
        b"ID,Caption\na,x\nb,y",
        b'"ID","Caption"\na,x\nb,y\n',
        b"ID,Caption\ra,x\rb,y\r",
        b"ID,Caption\r\na,x\rb,y\n",
    ):
        path.write_bytes(data)
        assert check(path, ["a", "b"], 2026) == []
    path.write_bytes(b"ID,Caption\nb,y\na,x\n")
    assert check(path, ["a", "b"], 2025) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"a|", None),
        (b"a|x|y", "cuts"),
        (b"a,x", "no '|'"),
        (b"a| C1", "' C1'"),
        (b"a|C1;", "''"),
        (b"a|C1;C1", "twice"),
        (b"a|D1", "'D1'"),
        (b"a|" + b";".join(b"C%d" % n for n in range(101)), "101 CUIs"),
    ],
)
def test_concepts_of_2023(row, words, tmp_path):
    path = tmp_path / "concepts"
    path.write_bytes(row + b"\nb|C2\n")
    problems = check(path, ["b", "a"], 2023, "concept")
    assert [problem.line for problem in problems][:1] == ([] if words is None else [1])
    assert words is None or words in problems[0].what


@pytest.mark.parametrize("edition", [2023, 2025, 2026])
@pytest.mark.parametrize("value", ["C1;", ";", "C1;;C2", ";;", " "])
def test_an_empty_place_in_a_list_is_one_cause_and_mended_as_advised(value, edition, tmp_path):
    comma = edition > 2023
    rows = [*(["ID,CUIs"] if comma else []), f"a{'|,'[comma]}{value}"]
    path, out = tmp_path / "concepts", tmp_path / "out"
    path.write_text("\n".join(rows) + "\n")
    (problem,) = check(path, ["a"], edition, "concept")
    assert problem.hint == REPAIR
    fix(path, out, ["a"], edition, "concept")
    assert check(out, ["a"], edition, "concept") == []


def test_fix_lists_what_it_did_and_leaves_what_it_cannot_mend(tmp_path):
    path, out = tmp_path / "in", tmp_path / "out"
    path.write_bytes(b'\xef\xbb\xbfID|caption\nb | y  |z\n\na|\xb5m "x"\nc|1\nc|2\nzz|?')
    done = "\n".join(fix(path, out, ["a", "b", "c", "d"], 2023))
    assert out.read_bytes() == b'a|\xb5m "x"\nb|y /z\nc|1\nc|2\nzz|?\n'
    for words in ("byte order mark", "header", "order", "blank", "pipes", "newline", "line 2"):
        assert words in done
    left = [str(problem) for problem in check(out, ["a", "b", "c", "d"], 2023)]
    assert len(left) == 4
    assert "(d): missing" in left[-1]
    clean = write_captions(tmp_path / "clean.csv", CAPTIONS, IDS, 2026)
    assert fix(clean, tmp_path / "again.csv", IDS, 2026) == []
    assert (tmp_path / "again.csv").read_bytes() == clean.read_bytes()


@pytest.mark.parametrize(
    ("edition", "rows"),
    [(2023, "a\nb|x\n"), (2026, 'ID,Caption\na\nb,"x"\n'), (2026, 'ID,Caption\n"a"\nb,"x"\n')],
)
def test_fix_says_that_a_row_had_no_caption(tmp_path, edition, rows):
    path, out = tmp_path / "in.csv", tmp_path / "out.csv"
    path.write_text(rows)
    said = [
        done for done in fix(path, out, ["a", "b"], edition) if "no second column, so it is empty now" in done
    ]
    assert len(said) == 1
    assert check(out, ["a", "b"], edition) == []


def test_zips_that_are_none(tmp_path):
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/submission.csv", "ID,Caption\n")
        archive.writestr("notes.txt", "")
    assert "folder/submission.csv" in check(path, IDS, 2025)[0].what
    assert "text file itself" in check(path, IDS, 2023)[0].what
    path.write_bytes(b"PK\x03\x04 and nothing")
    assert "not a zip" in check(path, IDS, 2025)[0].what
    assert "can't be read" in check(tmp_path / "none", IDS, 2025)[0].what
    with pytest.raises(UserError):
        fix(path, tmp_path / "out", IDS, 2025)
    with pytest.raises(UserError, match="this edition takes a text file"):
        fix(path, tmp_path / "out.zip", IDS, 2023)


def _mutated(data: bytes, rng: random.Random) -> bytes:
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    lines = data.split(b"\n")
    marks = [b'"', b"|", b",", b";", b"\n", b"\r", b"\0", b" ", b"\xe2\x80\xa8", bytes([rng.randrange(256)])]
    key = rng.choice(IDS).encode()
    return rng.choice(
        [
            data[:at] + data[end:],
            data[:at] + rng.choice(marks) + data[at + 1 :],
            data[:at] + rng.choice(marks) + data[at:],
            data[:end] + data[at:],
            b"\n".join(rng.sample(lines, len(lines))),
            b"\n".join(lines + rng.sample(lines, 1)),
            rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n"]) + data,
            data.replace(b"\n", b"\r\n"),
            data.replace(key, rng.choice([key + b".jpg", key + b" ", b'"' + key + b'"', b"\t" + key])),
            data.decode("utf-8", "replace").encode("utf-16"),
        ]
    )


@pytest.mark.parametrize("task", ["caption", "concept"])
@pytest.mark.parametrize("edition", EDITIONS)
def test_malformed_files_are_mended_or_refused_and_no_word_is_new_or_lost(edition, task, tmp_path):
    rng = random.Random(f"{edition} {task}")
    upload = make(CAPTIONS if task == "caption" else CONCEPTS, IDS, edition, tmp_path, {}, task=task)
    sources = {path.suffix: path.read_bytes() for path in upload.parent.iterdir() if path.suffix != ".json"}
    fates = dict.fromkeys(("accepted", "repaired", "left", "unreadable"), 0)
    count = cases(100)
    while sum(fates.values()) < count:
        suffix = rng.choice(sorted(sources))
        data = sources[suffix]
        for _ in range(rng.randint(1, 3)):
            data = _mutated(data, rng)
        if data != sources[suffix]:
            fates[_fate(data, tmp_path / f"m{suffix}", tmp_path / "out.csv", edition, task)] += 1
    assert fates["repaired"] > count / 10, fates
    assert fates["left"] > count / 6, fates


def _fate(data: bytes, path: Path, out: Path, edition: int, task: str) -> str:
    """What became of a damaged file: never does it crash, and its repaired copy says the same words."""
    path.write_bytes(data)
    problems = check(path, IDS, edition, task)
    assert all(problem.what and problem.hint and problem.file == path for problem in problems)
    try:
        done = fix(path, out, IDS, edition, task)
    except UserError:
        assert problems
        return "unreadable"
    before, after = _content(path), out.read_bytes()
    assert bool(done) == (before != after), (before, done)
    _says_the_same(_text(before), after.decode("utf-8", "surrogateescape"))
    if check(out, IDS, edition, task):
        assert problems
        return "left"
    assert fix(out, out, IDS, edition, task) == [], "there is nothing more to repair"
    if problems:
        return "repaired"
    sign = r"\s*;\s*" if task == "concept" else ";"
    assert read(out) == {key: re.sub(sign, ";", " ".join(v.split())) for key, v in read(path).items()}
    return "accepted"


def _content(path: Path) -> bytes:
    if path.suffix != ".zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read("submission.csv")


def _text(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode("utf-16")
    return data.decode("utf-8", "surrogateescape")


def _says_the_same(before: str, after: str) -> None:
    """Each row of one file is some row, or rows that a line break tore apart, of the other: same words.

    Of quotes, separators and white space only the place counts, of a row's CUIs the first of each.
    """
    old, new = (re.split("\r\n?|\n", text) for text in (before, after))
    torn = {""} | {_words("\n".join(old[i:j])) for i in range(len(old)) for j in range(i + 1, len(old) + 1)}
    for row in new:
        assert _words(row) in torn or row in HEADERS, (row, before)
    for row in old:
        kept = any(f" {_words(row)} " in f" {_words(other)} " for other in [*new, after])
        assert kept or _words(row).lower().split()[0] == "id", (row, after)


def _words(row: str) -> str:
    words = re.sub(r"\ufeff|\.jpg(?=[\s\"|,]|$)", "", row)
    words = re.sub(r'["|,/;]', " ", words).split()
    return " ".join(w for n, w in enumerate(words) if not (re.fullmatch(r"C\d+", w) and w in words[:n]))
