"""Damaged submission files, against the organisers' rules in organisers.py.

If the organisers refuse or misread a file, ours refuses it. If only ours refuses it, the reason is one of the
few that are stricter on purpose. Every reason is true. `HARNESS_FUZZ_CASES=2000` tries more.
"""

import contextlib
import csv
import io
import random
import re
from collections import Counter

import pytest
from support.fuzzing import cases, within
from support.organisers import Refused, evaluate

from harness.data.captionfiles import read_predictions
from harness.errors import UserError
from harness.submission import as_written, check, fix, make, read

EDITIONS = [2022, 2023, 2025, 2026]
IDS = ["scan_000001", "scan_000002", "b7", "x-9"]
WORDS = ["CT", "axial", "the", "5 cm", "a,b", '"sail"', "x|y", "µ", "中", "", " ", "a;b", "ID"]
CUIS = ["C0040405", "C1", "C0817096", "C٣", "D1", "", " C2", "C3 ", "C1"]
MARKS = [
    *'"|,;\t\n\r\0 ',
    "\r\n",
    "\n\r",
    "\u2028",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1d",
    "\ufeff",
    '""',
    '"\n"',
    "é",
]
STRICTER = {
    "all": "byte order mark|holds a separator or a quote",
    2022: "more than one pipe|a header|CUI",
    2023: 'more than one pipe|a header|CUI|holds "ID"|not among the ids',
    2025: "first line is not|more columns|closing quote|never closed|carriage return|CUI|separated by|JSON",
    2026: "closing quote|never closed|line break",
}
"""Reasons for which ours may refuse what the organisers take."""


def content(rng: random.Random, edition: int, task: str) -> str:
    """A file that may be right: of any quoting, with any ends of lines."""
    quoted, end = rng.choice(["all", "needed"]), rng.choice(["\n", "\n", "\r\n", "\r"])
    text = io.StringIO()
    if edition >= 2025:
        how = csv.QUOTE_ALL if quoted == "all" else csv.QUOTE_MINIMAL
        rows = csv.writer(text, quoting=how, lineterminator=end)
        rows.writerow(["ID", "Caption" if task == "caption" else "CUIs"])
        rows.writerows([key, value(rng, task)] for key in IDS)
    else:
        text.write("".join(f"{key}|{value(rng, task).replace('|', '/')}{end}" for key in IDS))
    return text.getvalue()


def value(rng: random.Random, task: str) -> str:
    if task == "caption":
        return " ".join(rng.choices(WORDS, k=rng.randint(0, 4)))
    if rng.random() < 0.7:
        return rng.choice([";", " ; "] if rng.random() < 0.2 else [";"]).join(
            rng.sample(["C0040405", "C1", "C0817096", "C9"], k=rng.randint(0, 3))
        )
    if rng.random() < 0.1:
        return ";".join(f"C{n}" for n in range(rng.choice([99, 100, 101])))
    return ";".join(rng.choices(CUIS, k=rng.randint(0, 4)))


def damaged(text: str, rng: random.Random) -> str:
    lines = re.split("(?<=\n)", text)
    at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    key = rng.choice(IDS)
    others = [f"{key}.jpg", f" {key}", f"{key} ", f'"{key}"', f"ID{key}", "ID", "id", key.upper(), IDS[0]]
    long = "1" * rng.choice([131_071, 131_072])
    return rng.choice(
        [
            text[:at] + text[end:],
            text[:at] + rng.choice(MARKS) + text[at:],
            text[:at] + rng.choice(MARKS) + text[at + 1 :],
            text + rng.choice(MARKS),
            rng.choice(MARKS) + text,
            text.rstrip("\r\n"),
            "".join(rng.sample(lines, len(lines))),
            "".join([*lines, rng.choice(lines)]),
            "".join(lines[1:]),
            "".join(line for line in lines if rng.random() < 0.8),
            text.replace(key, rng.choice(others)),
            text.replace("ID,", rng.choice(['"ID",', "id,", "ID, ", "Id;", "ID|"])),
            text.replace("Caption", rng.choice(['"Caption"', "caption", " Caption", "CUIs"])),
            text.replace("\n", rng.choice(["\r\n", "\r", "\n\n", "\r\r\n"])),
            text.replace(",", rng.choice("|;\t"), rng.choice([1, -1])),
            text.replace("|", rng.choice(",;\t"), rng.choice([1, -1])),
            text.replace(";", rng.choice([" ;", "; ", ";;", ";\u00a0"])),
            re.sub("axial|C1", rng.choice("xC") + long, text, count=1),
        ]
    )


def encoded(text: str, rng: random.Random) -> bytes:
    data = text.encode()
    chance = rng.random()
    if chance < 0.02:
        return b"\xef\xbb\xbf" + data
    if chance < 0.04:
        return text.encode(rng.choice(["utf-16", "utf-16-le", "utf-32"]))
    if chance < 0.06:
        at = rng.randrange(len(data) + 1)
        return data[:at] + bytes([rng.randrange(128, 256)]) + data[at:]
    return data


@pytest.mark.parametrize("task", ["caption", "concept"])
@pytest.mark.parametrize("edition", EDITIONS)
def test_ours_refuses_what_the_organisers_refuse_and_little_else(edition, task, tmp_path):
    rng = random.Random(f"submissions {edition} {task}")
    path, out = tmp_path / "file.csv", tmp_path / "out.csv"
    fates: Counter[str] = Counter()
    for number in range(cases(240) // 8):  # for each edition and task
        text = content(rng, edition, task)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            text = damaged(text, rng)
        data = encoded(text, rng)
        path.write_bytes(data)
        with within(20, (number, edition, task, data[:500])):
            fates[fate(path, data, edition, task)] += 1
            _mended(path, out, edition, task)
    assert fates["both take it"] > 0.03 * fates.total(), fates
    assert fates["both refuse it"] > 0.2 * fates.total(), fates


def fate(path, data: bytes, edition: int, task: str) -> str:
    problems = check(path, IDS, edition, task)
    said = [problem.what for problem in problems]
    assert all(problem.hint for problem in problems)
    assert len(said) == len(set(said)) <= 12, "one message for one cause"
    assert sum(map(len, said)) < 5000
    for what in said:
        assert not re.search(r"line (\d+), line \1\b", what), what
        assert true(what, data, edition, task), (what, data[:1000])
    theirs = scored_by_them(data, edition, task)
    if theirs is None:
        assert problems, data[:1000]
        return "both refuse it"
    if not problems:
        assert same(read(path), theirs, task), data[:1000]
        return "both take it"
    allowed = f"{STRICTER['all']}|{STRICTER[edition]}"
    # a quote that ours refuses may take other rows in
    meant = any("quote" in what for what in said) or all(re.search(allowed, what) for what in said)
    assert meant, (said, data[:1000])
    return "ours alone refuses it"


def scored_by_them(data: bytes, edition: int, task: str) -> dict[str, str] | None:
    try:
        return evaluate(data, IDS, edition, task)
    except Refused:
        return None


def same(ours: dict[str, str], theirs: dict[str, str], task: str) -> bool:
    if task == "concept":
        ours, theirs = ({k: re.sub(r"\s*;\s*", ";", v) for k, v in x.items()} for x in (ours, theirs))
    return ours == theirs


def true(what: str, data: bytes, edition: int, task: str) -> bool:
    """Whether a reason holds of the bytes, seen in another way; those not listed have tests of their own."""
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", "replace")
    lines = re.split("\r\n?|\n", text.removeprefix("\ufeff"))
    sign = "," if edition >= 2025 else "|"
    facts = {
        "starts with a byte order mark": data.startswith(b"\xef\xbb\xbf"),
        "not UTF-8": not _is_utf_8(data) or b"\0" in data,
        "a blank line": any(not line.strip() for line in lines),
        "first line is not": _first_row(text) != ["ID", "Caption" if task == "caption" else "CUIs"],
        "more than one pipe": any(line.count("|") > 1 for line in lines),
        "more columns": any(line.count(",") > 1 for line in lines),
        "131,072": len(text) > 131_072,
        "closing quote|never closed": '"' in text,
        "line break inside": '"' in text or re.search("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", text),
        "carriage return": "\r" in text and '"' in text,
        "a CUI twice": re.search(r"\b(C\d+)\b.*\b\1\b", text),
        "more than 100 CUIs": any(line.count(";") >= 100 for line in lines),
        "missing": re.search('["\ufeff]', text)
        or any(not any(line.startswith(key + sign) for line in lines) for key in IDS),
    }
    return all(holds for words, holds in facts.items() if re.search(words, what))


def _first_row(text: str) -> list[str] | None:
    with contextlib.suppress(csv.Error):
        return next(csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline="")), None)
    return None


def _is_utf_8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _mended(path, out, edition: int, task: str) -> None:
    """What --fix calls right is right for the organisers; what make writes from the file is, too."""
    with contextlib.suppress(UserError):
        fix(path, out, IDS, edition, task)
        if not check(out, IDS, edition, task):
            assert scored_by_them(out.read_bytes(), edition, task) is not None
    try:
        found = read_predictions(path, task, IDS)
        upload = make(found, IDS, edition, out.parent / "made", {}, task=task)
    except UserError:
        return
    data = (upload.parent / "submission.csv" if edition >= 2025 else upload).read_bytes()
    if task == "caption":
        wanted = {key: as_written(text, edition) for key, text in found.items()}
    else:
        wanted = {key: ";".join(dict.fromkeys(cuis)) for key, cuis in found.items()}
    assert scored_by_them(data, edition, task) == wanted
