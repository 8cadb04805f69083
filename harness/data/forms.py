"""The file formats of the editions, and rows with line numbers from any file, even a damaged one."""

import csv
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness import store
from harness.config.editions import EDITIONS
from harness.data import files
from harness.errors import Flaw, Problem, UserError

Task = Literal["caption", "concept"]

MEMBER = "submission.csv"
INVALID = 3  # exit code
HEADERS = {"caption": "ID,Caption", "concept": "ID,CUIs"}
REPAIR = "To repair it, add to this command: --fix OUT"
LONGEST = 131_072  # characters; the limit of a field in Python's csv module, which the organisers use
TOO_LONG = f"has a field of more than {LONGEST:,} characters, at which the organisers' reader stops"
_SHORTEN = "Shorten the caption."
CONCEPTS = re.compile(r"C\d+(\s*;\s*C\d+)*")
NOT_UTF_8 = "is not UTF-8"
IS_ZIP = "is a zip; this edition takes the text file itself"
_ALONE = f"it must hold {MEMBER} at its root and nothing else"
_LARGEST = 1 << 28  # bytes; 100 times the largest submission, so that a zip can't fill the memory


@dataclass(frozen=True)
class Rules:
    """What a file of one edition and task must look like."""

    task: Task
    separator: Literal["|", ","]
    header: str | None
    max_cuis: int | None
    strict: bool
    """Whether the organisers' checker requires the order of the ids file."""
    edition: int
    skips_ids: bool
    """Whether the organisers' loader ignores rows whose id holds "ID"."""


@dataclass(frozen=True)
class Row:
    """A row of the file; `broken` says why it can't be split into fields, and how to repair it."""

    line: int
    raw: str
    fields: tuple[str, ...]
    broken: tuple[str, str] | None = None


def plural(task: Task) -> str:
    """What a task predicts, in the plural."""
    return "captions" if task == "caption" else "lists of concepts"


def are_concepts(values: Iterable[str]) -> bool:
    """Whether all texts that are not empty, and at least one, are lists of CUIs."""
    written = [value for value in values if value]
    return bool(written) and all(map(CONCEPTS.fullmatch, written))


def rules(edition: int, task: Task = "caption") -> Rules:
    """The file format of an edition. Raises `UserError` for an unknown edition or format."""
    if edition not in EDITIONS:
        known = ", ".join(map(str, EDITIONS))
        raise UserError([Problem(f"got edition {edition}; there are {known}", key="edition")])
    year = EDITIONS[edition]
    form = year.caption_format if task == "caption" else year.concept_format
    if form is None:
        raise UserError(
            [Problem(f"the submission format of {edition} is not established", key="edition")],
            hint=f"{other_editions(task)}. submission check takes the same editions.",
        )
    separator, header = ("|", None) if form == "pipe" else (",", HEADERS[task])
    return Rules(task, separator, header, year.max_cuis, year.strict_checker, edition, year.skips_ids)


def other_editions(task: Task = "caption") -> str:
    """The commands that write a file if an edition's own format is not established."""
    of_task = " --task concept" if task == "concept" else ""
    return (
        "To write pipes or commas: harness submission make RUN|FILE --ids IDS "
        f"--edition 2023{of_task} (pipes, no header) or --edition 2025{of_task} (commas, header, zip)"
    )


def content(path: Path, zipped: bool) -> tuple[bytes | None, str]:
    """The bytes of the text file, read from its zip if `zipped` allows one; or None and the reason."""
    try:
        if path.stat().st_size > _LARGEST:
            return None, f"is larger than {_LARGEST >> 20} MB"
        data = files.read(path, pipes=True)
    except OSError as error:
        return None, f"can't be read: {files.why(path, error)}"
    if not data.startswith(b"PK") and path.suffix != ".zip":
        return data, ""
    if not zipped:
        return None, IS_ZIP
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if names != [MEMBER]:
                return None, f"the zip holds {_listed(names)}; {_ALONE}"
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


def decoded(data: bytes) -> tuple[str, list[Flaw]]:
    """The text, with bytes that are not UTF-8 kept as surrogates, and what is wrong with the encoding."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            return data.decode("utf-16"), [Flaw(1, "is UTF-16, not UTF-8", "Save it as UTF-8.")]
        except UnicodeDecodeError:
            pass
    flaws: list[Flaw] = []
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    if start:
        flaws.append(Flaw(1, "starts with a byte order mark, which becomes part of the first field", REPAIR))
    try:
        return data[start:].decode(), flaws
    except UnicodeDecodeError:
        pass
    offset = start
    for number, line in enumerate(data[start:].split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            subject = f"byte {offset + error.start}: 0x{line[error.start]:02x}"
            flaws.append(Flaw(number, NOT_UTF_8, "Save the file as UTF-8.", subject))
        offset += len(line) + 1
    return data[start:].decode("utf-8", "surrogateescape"), flaws


def rows_of(text: str, form: Rules, known: set[str]) -> Iterator[Row]:
    """The rows; a row with quoted line breaks spans several lines.

    LF, CRLF and CR each end a line, as in Python's csv module and text files.
    """
    lines = list(io.StringIO(text, newline=""))
    if form.separator == "," and (rows := _whole(lines, known)) is not None:
        yield from rows
        return
    at = 0
    while at < len(lines):
        end = at + 1
        if form.separator == "," and lines[at].count('"') % 2:
            end = _end_of_quote(lines, at, known)
        yield _row(at + 1, _without_end("".join(lines[at:end])), form)
        at = end


def _whole(lines: Sequence[str], known: set[str]) -> list[Row] | None:
    """The rows as the csv module reads them; None if it can't, or if a stray quote swallows rows."""
    reader = csv.reader(lines, strict=True)
    rows, at = [], 0
    try:
        for fields in reader:
            rows.append(Row(at + 1, _without_end("".join(lines[at : reader.line_num])), tuple(fields)))
            at = reader.line_num
    except csv.Error:
        return None
    return rows if known <= {row.fields[0] for row in rows if row.fields} else None


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _end_of_quote(lines: Sequence[str], at: int, known: set[str]) -> int:
    """The line after the end of the quote opened at `at`; `at + 1` if the next row begins before that."""
    for i in range(at + 1, min(at + 1000, len(lines))):
        if lines[i].partition(",")[0].strip(' "') in known:
            break
        if lines[i].count('"') % 2:
            return i + 1
    return at + 1


def _row(line: int, raw: str, form: Rules) -> Row:
    if form.separator == "|":
        fields = tuple(raw.split("|"))
        return Row(line, raw, fields, (TOO_LONG, _SHORTEN) if max(map(len, fields)) > LONGEST else None)
    try:
        rows = list(csv.reader([raw], strict=True))
    except csv.Error as error:
        return Row(line, raw, (), _unreadable(str(error)))
    return Row(line, raw, tuple(rows[0]) if rows else ())


def _unreadable(error: str) -> tuple[str, str]:
    """What an error of the strict csv module means, and how to repair the row."""
    if "field limit" in error:
        return TOO_LONG, _SHORTEN
    quote = 'Quote the whole caption: ID,"caption", with "" for a quote inside.'
    if "end of data" in error:
        return "has a quote that is never closed: readers of CSV take the next rows for its caption", quote
    if "expected after" in error:
        return "has text after a closing quote: readers of CSV drop the quotes", quote
    return f"is not CSV ({error})", quote


def is_header(row: Row) -> bool:
    first = row.fields[0] if row.fields else row.raw.partition(",")[0].strip('"')
    return first.strip().lower() == "id"


def bare(key: str) -> str:
    """The id in the file name of an image."""
    return re.sub(r"\.(jpe?g|png|tiff?|bmp|gif|webp|dcm)$", "", key.strip(), flags=re.IGNORECASE)


def lines_of(values: Mapping[str, str], form: Rules) -> Iterator[str]:
    if form.header:
        yield form.header
    for key, value in values.items():
        if form.separator == "," and form.task == "caption":
            value = '"' + value.replace('"', '""') + '"'
        yield f"{key}{form.separator}{value}"


def store_text(path: Path, text: str, form: Rules) -> Path:
    data = text.encode("utf-8", "surrogateescape")
    return store.write(path, zipped(data) if form.separator == "," and path.suffix == ".zip" else data)


def zipped(data: bytes) -> bytes:
    """A zip with the same bytes on every machine: a fixed date, and no compression since zlibs differ."""
    member = zipfile.ZipInfo(MEMBER, (1980, 1, 1, 0, 0, 0))
    member.create_system = 3
    member.external_attr = 0o644 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(member, data)
    return buffer.getvalue()
