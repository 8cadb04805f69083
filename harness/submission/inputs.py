"""What people hand in: captions, concepts and ids in any official format, told apart by looking; runs."""

import codecs
import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from harness.data.readers import comma_rows, unquoted_rows
from harness.errors import Problem, UserError
from harness.submission.form import MEMBER, Rules, Task, content, decoded

_IDS_HINT = "Give the organisers' list of ids, a label file of the split, or a file with one id a line."
_FILE_HINT = "Give a submission, a label file, or the folder of a run: runs/<experiment>/<variant>-s<seed>."
_EXPORT_HINT = "Export it as CSV (UTF-8), and give that file."
_FORMATS = {
    ("|", False): "pipe-separated without header (2022, 2023)",
    ("|", True): "pipe-separated with header",
    ("\t", True): "tab-separated with header (labels of 2022, 2023)",
    ("\t", False): "tab-separated without header",
    (",", True): "comma-separated with header (2024 to 2026)",
    (",", False): "comma-separated without header",
}
_NAMES = {"|": "pipe", "\t": "tab", ",": "comma"}
_BINARY = {
    b"\xff\xd8\xff": ("is a JPEG image", _FILE_HINT),
    b"\x89PNG": ("is a PNG image", _FILE_HINT),
    b"%PDF": ("is a PDF", _FILE_HINT),
    b"\x1f\x8b": ("is compressed by gzip", "Unpack it, and give the text file."),
    b"\xd0\xcf\x11\xe0": ("is an Excel workbook", _EXPORT_HINT),
}
_WIDE = {
    "UTF-32": re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff|[^\0]\0\0\0|\0\0\0[^\0]"),
    "UTF-16 without a byte order mark": re.compile(rb"[^\0]\0[^\0]\0|\0[^\0]\0[^\0]"),
}
"""How a text of two or four bytes a character begins: the first two are ASCII, of an id or a header."""
_TEXTS = (".csv", ".tsv", ".txt")
_LARGEST = 1 << 28  # bytes of a member, so that a zip can't fill the memory
_NAMED = 3


@dataclass(frozen=True)
class CaptionFile:
    """Captions (or `C1;C2`) by id, in the order of their file.

    `separator` and `kind` are what the file was taken for, `lines` where each id stands, `cut` the ids whose
    caption ended at a second pipe, `warnings` what else to know.
    """

    path: Path
    separator: str
    kind: str
    values: Mapping[str, str]
    lines: Mapping[str, int]
    cut: Sequence[str] = ()
    warnings: Sequence[str] = ()

    def described(self, values: str = "captions") -> str:
        """What the file was taken for, in a line."""
        return f"{self.path.name}: {len(self.values):,} {values}, {self.kind}"


class Flaw(NamedTuple):
    """One of possibly many rows with the same thing wrong; `subject` is what there, e.g. an id."""

    line: int | None
    what: str
    hint: str | None = None
    subject: str = ""


def grouped(path: Path, flaws: Iterable[Flaw]) -> list[Problem]:
    """One problem for each thing that is wrong, at its first line, naming a few of the rows that have it."""
    kinds: dict[tuple[str, str | None], list[Flaw]] = {}
    for flaw in flaws:
        kinds.setdefault((flaw.what, flaw.hint), []).append(flaw)
    return [
        Problem(f"{what}{_named(same)}", path, same[0].line, hint=hint)
        for (what, hint), same in kinds.items()
    ]


def _named(flaws: Sequence[Flaw]) -> str:
    if len(flaws) == 1:
        return f": {flaws[0].subject}" if flaws[0].subject else ""
    more = f" and {len(flaws) - _NAMED:,} more" if len(flaws) > _NAMED else ""
    return f": {', '.join(_place(flaw) for flaw in flaws[:_NAMED])}{more}"


def _place(flaw: Flaw) -> str:
    line = f"line {flaw.line}" if flaw.line else ""
    return f"{flaw.subject} ({line})" if flaw.subject and line else flaw.subject or line


def read(path: Path) -> CaptionFile:
    """Captions of a submission of any edition (text, or its zip), of a label file, or of a run's own file.

    The first separator of the file says which: `|` and tab come without quoting, `,` with. In a pipe file a
    caption ends at a second pipe and rows whose id is `ID` are passed over, as in the organisers' loader of
    2023; elsewhere a header after the first row is a mistake. Blank lines and a byte order mark are passed
    over, line breaks inside quotes stay. A zip may hold one text of any name.
    Raises `UserError` with every row that can't be read.
    """
    text, flaws, warnings = _text_of(path)
    separator = _separator(text, path)
    rows = comma_rows(text) if separator == "," else unquoted_rows(text, separator)
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    cut, blank, again = [], [], []
    first, header = True, False
    for line, fields in rows:
        if not isinstance(fields, str) and len(fields) < 2 and not "".join(fields).strip():
            blank.append(Flaw(None, "blank", subject=f"line {line}"))
            continue
        if not isinstance(fields, str) and _is_header(fields, first, separator):
            header = header or first
            again += [] if first else [Flaw(None, "again", subject=f"line {line}")]
        elif (flaw := _flaw(line, fields, separator, lines)) is not None:
            flaws.append(flaw)
        else:
            values[fields[0]], lines[fields[0]] = fields[1], line
            cut += [fields[0]] if len(fields) > 2 else []
        first = False
    if not values and not flaws:
        flaws = [Flaw(None, "has a header and nothing else" if header else "is empty", _FILE_HINT)]
    if flaws:
        raise UserError(grouped(path, flaws))
    if blank:
        warnings.append(f"blank lines are passed over; a submission must not have any{_named(blank)}")
    if again:
        warnings.append(f"rows with the id ID are passed over, as in the organisers' loader{_named(again)}")
    return CaptionFile(path, separator, _FORMATS[separator, header], values, lines, cut, warnings)


def _is_header(fields: Sequence[str], first: bool, separator: str) -> bool:
    """Whether to pass over a row as a header: the first row, in a pipe file what the loader ignores too."""
    return _names_ids(fields[0]) and (first or passes_for_header(fields[0], separator))


def _names_ids(key: str) -> bool:
    return key.strip(' "').lower() == "id"


def passes_for_header(key: str, separator: str) -> bool:
    """Whether the organisers' loader of 2023 ignores such a row of a pipe file: any whose id holds "ID"."""
    return separator == "|" and "ID" in key


def _flaw(line: int, fields: list[str] | str, separator: str, before: Mapping[str, int]) -> Flaw | None:
    """What keeps a row from being an id and a caption."""
    if isinstance(fields, str):
        return Flaw(line, fields, 'Quote the whole caption: ID,"caption", with "" for a quote inside.')
    if len(fields) < 2:
        return Flaw(line, f"has no {_NAMES[separator]}", "Write an id and its caption on each line.")
    if len(fields) > 2 and separator != "|":
        hint = "Quote captions that hold a comma." if separator == "," else None
        return Flaw(line, f"has {len(fields)} columns, not 2", hint)
    key = fields[0]
    if _names_ids(key):
        return Flaw(line, "a header that is not the first row", "Leave it out.")
    if key.split() != [key] and not passes_for_header(key, separator):
        return Flaw(line, "an id that is empty or holds white space", subject=repr(key[:80]))
    if key in before:
        return Flaw(
            line, "an id that was there before", "Give each id once.", f"{key}, as on line {before[key]}"
        )
    return None


def _text_of(path: Path) -> tuple[str, list[Flaw], list[str]]:
    """The text of a file or its zip, what is wrong with its encoding, and what is merely odd about it."""
    if path.is_dir():
        raise UserError([Problem("is a folder, not a file", path, hint=_FILE_HINT)])
    data, fault = content(path, Rules("caption", ",", None, None, False))
    warnings = []
    if data is None and (name := _only_text(path)) and (data := _member(path, name)) is not None:
        warnings = [f"reads {name}; the organisers want a zip of {MEMBER} and nothing else"]
    if data is None:
        is_workbook = path.is_file() and b"xl/workbook.xml" in path.read_bytes()
        problem = ("is an Excel workbook", _EXPORT_HINT) if is_workbook else (fault, _FILE_HINT)
        raise UserError([Problem(problem[0], path, hint=problem[1])])
    for start, (what, hint) in _BINARY.items():
        if data.startswith(start):
            raise UserError([Problem(what, path, hint=hint)])
    _refuse_wide(data, path, _EXPORT_HINT)
    has_mark = data.startswith(codecs.BOM_UTF8)
    text, faults = decoded(data)
    flaws = [Flaw(*fault) for fault in faults[has_mark:]]
    if len(flaws) > _NAMED:
        rest = len(flaws) - _NAMED
        flaws[_NAMED:] = [Flaw(flaws[_NAMED].line, f"this and {rest - 1:,} more lines are not UTF-8")]
    warnings += ["starts with a byte order mark; a submission must not"] if has_mark else []
    # CR alone ends lines where nothing else does
    return text if "\n" in text else text.replace("\r", "\n"), flaws, warnings


def _refuse_wide(data: bytes, path: Path, hint: str) -> None:
    """Raise `UserError` for a text that is not UTF-8 and would pass for one with odd characters."""
    for name, beginning in _WIDE.items():
        if beginning.match(data):
            raise UserError([Problem(f"is {name}, not UTF-8", path, 1, hint=hint)])


def _only_text(path: Path) -> str | None:
    """The one text in a zip, whatever its name and place; what macOS adds by itself does not count."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    places = {name: PurePosixPath(name) for name in names}
    texts = [
        name
        for name, place in places.items()
        if place.suffix.lower() in _TEXTS and "__MACOSX" not in place.parts and place.name[0] != "."
    ]
    return texts[0] if len(texts) == 1 and names.count(texts[0]) == 1 else None


def _member(path: Path, name: str) -> bytes | None:
    """A file out of a zip, or None where it is damaged, locked or too large."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as member:
            data = member.read(_LARGEST + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError):
        return None
    return data if len(data) <= _LARGEST else None


def _separator(text: str, path: Path) -> str:
    found = re.search(r"[|\t,]", text)
    if re.match(r'"?id"?;', text, re.IGNORECASE):
        raise UserError([Problem("is separated by semicolons", path, 1, hint="Save it with commas.")])
    if found is None:
        what = "holds neither pipes, tabs nor commas" if text.strip() else "is empty"
        raise UserError([Problem(what, path, hint=_FILE_HINT)])
    return found[0]


def read_predictions(path: Path, task: Task = "caption") -> dict[str, str] | dict[str, list[str]]:
    """Captions, or lists of CUIs, by id, from a file as `read` takes it, to make a submission from.

    Raises `UserError` with every row that can't be read, captions cut at a pipe included.
    """
    found = read(path)
    what, hint = "a second pipe would cut this", "Replace it, or give the captions as CSV."
    if flaws := [Flaw(found.lines[key], what, hint, key) for key in found.cut]:
        raise UserError(grouped(path, flaws))
    if task == "caption":
        return dict(found.values)
    return {key: [cui for cui in value.split(";") if cui] for key, value in found.values.items()}


def read_ids(path: Path) -> list[str]:
    """The ids of a split in the order of the file: one a line, or the first column of a label file.

    Label files are those of any layout, tab-separated without quoting or CSV, with or without a header.
    Raises `UserError` with every line that holds no id, or an id that was there before.
    """
    lines = list(_first_column(_text(path, _IDS_HINT), path))
    if lines and lines[0][1].strip().lower() == "id":
        lines = lines[1:]
    problems = [
        Problem(f"got {key!r}; an id has no white space and is not empty", path, line, hint=_IDS_HINT)
        for line, key in lines
        if key.split() != [key]
    ]
    times = Counter(key for _, key in lines)
    seen: set[str] = set()
    for line, key in lines:
        if times[key] > 1 and key in seen:
            problems.append(Problem(f"{key} is there already", path, line, hint="Give each id once."))
        seen.add(key)
    if not lines:
        problems.append(Problem("holds no ids", path, hint=_IDS_HINT))
    if problems:
        raise UserError(problems)
    return [key for _, key in lines]


def _text(path: Path, hint: str) -> str:
    try:
        data = path.read_bytes()
        _refuse_wide(data, path, hint)
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except OSError as error:
        raise UserError([Problem(f"can't be read: {error.strerror}", path, hint=hint)]) from None
    except UnicodeDecodeError as error:
        raise UserError([Problem(f"not UTF-8 at byte {error.start}", path, hint=hint)]) from None


def _first_column(text: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line number and first field of each row that is not blank."""
    first = text.partition("\n")[0]
    is_csv = "," in first and "\t" not in first
    for line, fields in comma_rows(text) if is_csv else unquoted_rows(text, "\t"):
        if isinstance(fields, str):
            raise UserError([Problem(fields, path, line)])
        if "".join(fields).strip():
            yield line, fields[0]
