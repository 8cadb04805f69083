"""The file formats of the editions: their rules, and a file as rows with line numbers, however damaged."""

import csv
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness import store
from harness.data import files
from harness.editions import EDITIONS
from harness.errors import Problem, UserError

Task = Literal["caption", "concept"]
Fault = tuple[int | None, str, str]
"""A line, what is wrong there, how to mend it."""

MEMBER = "submission.csv"
INVALID = 3  # exit code
HEADERS = {"caption": "ID,Caption", "concept": "ID,CUIs"}
MEND = "Mend the file: python -m harness submission check --fix OUT"
_LARGEST = 1 << 28  # bytes; 100 times the largest submission, so that a zip can't fill the memory


@dataclass(frozen=True)
class Rules:
    """What a file of one edition and task must look like."""

    task: Task
    separator: Literal["|", ","]
    header: str | None
    max_cuis: int | None
    strict: bool
    """Whether the organisers' checker wants the order of the ids file."""


@dataclass(frozen=True)
class Row:
    """A row as it stands in the file; `broken` says why its fields can't be told apart."""

    line: int
    raw: str
    fields: tuple[str, ...]
    broken: str | None = None


def rules(edition: int, task: Task = "caption") -> Rules:
    """The file format of an edition. Raises `UserError` where there is none or it is not established."""
    if edition not in EDITIONS:
        known = ", ".join(map(str, EDITIONS))
        raise UserError([Problem(f"got edition {edition}; there are {known}", key="edition")])
    year = EDITIONS[edition]
    form = year.caption_format if task == "caption" else year.concept_format
    if form is None:
        raise UserError(
            [Problem(f"the submission format of {edition} is not established", key="edition")],
            hint="Its files had either pipes (then use edition 2023) or commas (then use edition 2025).",
        )
    if form == "pipe":
        return Rules(task, "|", None, year.max_cuis, year.strict_checker)
    return Rules(task, ",", HEADERS[task], year.max_cuis, year.strict_checker)


def content(path: Path, form: Rules) -> tuple[bytes | None, str]:
    """The bytes of the text file, out of its zip where it is in one; or None and why not."""
    try:
        if path.stat().st_size > _LARGEST:
            return None, f"is larger than {_LARGEST >> 20} MB"
        data = files.read(path, pipes=True)
    except OSError as error:
        return None, f"can't be read: {files.why(path, error)}"
    if not data.startswith(b"PK") and path.suffix != ".zip":
        return data, ""
    if form.separator == "|":
        return None, "is a zip; this edition takes the text file itself"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if names != [MEMBER]:
                return (
                    None,
                    f"the zip holds {_listed(names)}; it must hold {MEMBER} at its root and nothing else",
                )
            with archive.open(MEMBER) as member:
                data = member.read(_LARGEST + 1)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
        OverflowError,
    ) as error:
        return None, f"is not a zip that can be read: {error}"
    return (data, "") if len(data) <= _LARGEST else (None, f"{MEMBER} is larger than {_LARGEST >> 20} MB")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (" ..." if len(names) > 5 else "") if names else "nothing"


def decoded(data: bytes) -> tuple[str, list[Fault]]:
    """The text, bytes that are no UTF-8 kept as surrogates, and what is wrong with the encoding."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            return data.decode("utf-16"), [(1, "byte 0: is UTF-16, not UTF-8", "Save it as UTF-8.")]
        except UnicodeDecodeError:
            pass
    faults: list[Fault] = []
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    if start:
        faults.append((1, "byte 0: a byte order mark; it becomes part of the first field", MEND))
    try:
        return data[start:].decode(), faults
    except UnicodeDecodeError:
        pass
    offset = start
    for number, line in enumerate(data[start:].split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            what = f"byte {offset + error.start}: 0x{line[error.start]:02x} is not UTF-8"
            faults.append((number, what, "Save the file as UTF-8."))
        offset += len(line) + 1
    return data[start:].decode("utf-8", "surrogateescape"), faults


def rows_of(text: str, form: Rules, known: set[str]) -> Iterator[Row]:
    """The rows; one that a quoted line break spreads over several lines is one row."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not lines[-1]:
        lines.pop()
    at = 0
    while at < len(lines):
        end = at + 1
        if form.separator == "," and lines[at].count('"') % 2:
            end = _end_of_quote(lines, at, known)
        raw = "\n".join(lines[at:end])
        yield _row(at + 1, raw, form)
        at = end


def _end_of_quote(lines: Sequence[str], at: int, known: set[str]) -> int:
    """The line after the quote opened at `at` is closed; `at + 1` when the next row begins before."""
    for i in range(at + 1, min(at + 1000, len(lines))):
        if lines[i].partition(",")[0].strip(' "') in known:
            break
        if lines[i].count('"') % 2:
            return i + 1
    return at + 1


def _row(line: int, raw: str, form: Rules) -> Row:
    if form.separator == "|":
        return Row(line, raw, tuple(raw.split("|")))
    try:
        rows = list(csv.reader([raw], strict=True))
    except csv.Error as error:
        return Row(line, raw, (), f"can't be read as CSV: {error}")
    return Row(line, raw, tuple(rows[0]) if rows else ())


def is_header(row: Row) -> bool:
    return bool(row.fields) and row.fields[0].strip().lower() == "id"


def bare(key: str) -> str:
    return re.sub(r"\.(jpg|jpeg|png)$", "", key.strip())


def lines_of(values: Mapping[str, str], form: Rules) -> Iterator[str]:
    if form.header:
        yield form.header
    for key, value in values.items():
        if form.separator == "," and form.task == "caption":
            value = '"' + value.replace('"', '""') + '"'
        yield f"{key}{form.separator}{value}"


def store_text(path: Path, text: str, form: Rules) -> Path:
    data = text.encode("utf-8", "surrogateescape")
    return store.write(path, _zipped(data) if form.separator == "," and path.suffix == ".zip" else data)


def _zipped(data: bytes) -> bytes:
    """A zip that is the same on every machine: no time of day; stored, as zlibs differ."""
    member = zipfile.ZipInfo(MEMBER, (1980, 1, 1, 0, 0, 0))
    member.create_system = 3
    member.external_attr = 0o644 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(member, data)
    return buffer.getvalue()
