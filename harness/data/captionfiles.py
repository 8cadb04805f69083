"""Reads captions, concepts and ids from files; finds out by itself which official format a file has."""

import codecs
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from harness.data import coco, filekinds, files
from harness.data.forms import LONGEST, MEMBER, Task, are_concepts, content, decoded
from harness.data.rows import comma_rows, unquoted_rows
from harness.errors import Flaw, Problem, UserError, grouped, places

_IDS_HINT = "Give the organisers' list of ids, a label file of the split, or a file with one id a line."
_FILE_HINT = "Give a submission, a label file, or the folder of a run: runs/<experiment>/<variant>-s<seed>."
_FORMATS = {
    ("|", False): "pipe-separated without header (2022, 2023)",
    ("|", True): "pipe-separated with header",
    ("\t", True): "tab-separated with header (labels of 2022, 2023)",
    ("\t", False): "tab-separated without header",
    (",", True): "comma-separated with header (since 2024)",
    (",", False): "comma-separated without header",
}
_NAMES = {"|": "pipe", "\t": "tab", ",": "comma"}
_TEXTS = (".csv", ".tsv", ".txt", ".json")
_LARGEST = 1 << 28  # bytes of a member, so that a zip can't fill the memory


@dataclass(frozen=True)
class CaptionFile:
    """Captions (or `C1;C2`) by id, in the order of their file.

    `separator` and `kind` say how the file was read. `lines` is the line of each id. `cut` are the ids whose
    caption ended at a second pipe. `header` says whether there was one. JSON has neither separator nor lines.
    `further` are the other captions of an id that may have several (`read_candidates`). `images` are the ids
    by the numbers that COCO annotations give their images.
    """

    path: Path
    separator: str
    kind: str
    values: Mapping[str, str]
    lines: Mapping[str, int]
    cut: Sequence[str] = ()
    warnings: Sequence[str] = ()
    header: bool = True
    further: Mapping[str, Sequence[str]] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)

    @property
    def candidates(self) -> dict[str, list[str]]:
        """All captions of each id, in the order of the file."""
        return {key: [value, *self.further.get(key, ())] for key, value in self.values.items()}

    def described(self, values: str = "captions") -> str:
        """How the file was read, in one line of text."""
        count = len(self.values) + sum(map(len, self.further.values()))
        if count == 1:
            values = values.replace("captions", "caption").replace("lists", "list")
        images = f" of {len(self.values):,} images" if self.further else ""
        return f"{self.path.name}: {count:,} {values}{images}, {self.kind}"


def read(path: Path) -> CaptionFile:
    """Captions of a submission of any edition (text, or its zip), of a label file, or of a run's own file.

    The first separator decides the format: `|` and tab mean no quoting, `,` means quoting. In a pipe file a
    caption ends at a second pipe, and rows whose id is `ID` are ignored, as the organisers' loader of 2023
    does. In other files a header after the first row is a mistake. Blank lines and a byte order mark are
    ignored; line breaks inside quotes stay. COCO results (JSON) keep their image ids: see `with_ids`.
    A zip may hold one text of any name. Raises `UserError` with every row that can't be read.
    """
    return _read(path, most=1)


def read_candidates(path: Path) -> CaptionFile:
    """As `read`, but an id may have several captions."""
    return _read(path, most=None)


def _read(path: Path, most: int | None) -> CaptionFile:
    text, flaws, warnings = _text_of(path)
    if coco.is_json(text) or path.suffix.lower() == ".json":
        if flaws:
            raise UserError(grouped(path, flaws))
        found, images = coco.read(text, path, most)
        first = {key: given[0] for key, given in found.items()}
        further = {key: given[1:] for key, given in found.items() if given[1:]}
        return CaptionFile(path, "", coco.KIND, first, {}, (), warnings, further=further, images=images)
    return _read_table(path, text, flaws, warnings, most)


def with_ids(file: CaptionFile, ids: Iterable[str], images: Mapping[str, str] | None = None) -> CaptionFile:
    """A file of COCO results with its image ids replaced by matching `ids`; other files are unchanged.

    An image id that ends in `.jpg` or is a number matches the only id that it can mean; `images` are those of
    COCO annotations with these `ids`. A warning reports matches by number. Raises `UserError` if it can mean
    several ids.
    """
    if file.separator:
        return file
    names, how = coco.named(file.values, ids, file.path, images)
    values, further = (
        {names.get(key, key): given for key, given in every.items()} for every in (file.values, file.further)
    )
    warnings = [*file.warnings, *([how] if how else [])]
    return replace(file, values=values, further=further, warnings=warnings)


def _read_table(
    path: Path, text: str, flaws: list[Flaw], warnings: list[str], most: int | None
) -> CaptionFile:
    separator = _separator(text, path)
    if separator == "|":
        text = _lines_at_cr(text)
    rows = comma_rows(text) if separator == "," else unquoted_rows(text, separator)
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    further: dict[str, list[str]] = {}
    cut, blank, again = [], [], []
    first, header = True, False
    for line, fields in rows:
        if not isinstance(fields, str) and len(fields) < 2 and not "".join(fields).strip():
            blank.append(Flaw(None, "blank", subject=f"line {line}"))
            continue
        if not isinstance(fields, str) and _is_header(fields, first, separator):
            header = header or first
            again += [] if first else [Flaw(None, "again", subject=f"line {line}")]
        elif (flaw := _flaw(line, fields, separator, lines if most == 1 else {})) is not None:
            flaws.append(flaw)
        elif fields[0] in values:
            further.setdefault(fields[0], []).append(fields[1])
            cut += [fields[0]] if len(fields) > 2 else []
        else:
            values[fields[0]], lines[fields[0]] = fields[1], line
            cut += [fields[0]] if len(fields) > 2 else []
        first = False
    if not values and not flaws:
        flaws = [Flaw(None, "has a header and nothing else" if header else "is empty", _FILE_HINT)]
    if flaws:
        raise UserError(grouped(path, flaws))
    if blank:
        warnings.append(f"blank lines are passed over; a submission must not have any{places(blank)}")
    if again:
        warnings.append(f"rows with the id ID are passed over, as in the organisers' loader{places(again)}")
    kind = _FORMATS[separator, header]
    return CaptionFile(path, separator, kind, values, lines, cut, warnings, header, further)


def _lines_at_cr(text: str) -> str:
    """The text with a line feed for each CR, as the organisers read it, if every line is then a row.

    Otherwise a CR stays in its caption, and `read_otherwise` reports it.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return lines if all("|" in line for line in lines.split("\n") if line.strip()) else text


def read_otherwise(file: CaptionFile) -> Iterator[str]:
    """Warnings where the organisers' loader would read a submission differently than `read` does."""
    if not file.separator:  # JSON is not a submission
        return
    keys = list(file.values)
    if file.separator == "," and not file.header and keys:
        yield f"has no header: the organisers' loader takes its first row, {keys[0][:80]}, for one"
    if found := [key for key, text in file.values.items() if "\r" in text]:
        there = "reads a line feed there" if file.separator == "," else "ends the row there"
        yield f"{few(found)} with a carriage return inside: the organisers' loader {there}"
    if found := [key for key, text in file.values.items() if len(text) > LONGEST]:
        yield f"{few(found)} of more than {LONGEST:,} characters: the organisers' loader refuses the file"
    if file.separator == "\t" and (found := [key for key, text in file.values.items() if text[:1] == '"']):
        yield f"{few(found)} beginning with a quote: here it stays, a reader of CSV would drop it"


def few(keys: Sequence[str]) -> str:
    """The number of captions and the first ids: `7 captions (a, b, c, d, e and 2 more)`."""
    more = f" and {len(keys) - 5:,} more" if len(keys) > 5 else ""
    noun = "caption" if len(keys) == 1 else "captions"
    return f"{len(keys):,} {noun} ({', '.join(key[:80] for key in keys[:5])}{more})"


def _is_header(fields: Sequence[str], first: bool, separator: str) -> bool:
    """Whether a row is a header: only the first row can be, or in a pipe file any row the loader ignores."""
    return _names_ids(fields[0]) and (first or passes_for_header(fields[0], separator))


def _names_ids(key: str) -> bool:
    return key.strip(' "').lower() == "id"


def passes_for_header(key: str, separator: str) -> bool:
    """Whether the organisers' loader of 2023 ignores this row of a pipe file: its id holds "ID"."""
    return separator == "|" and "ID" in key


def _flaw(line: int, fields: list[str] | str, separator: str, before: Mapping[str, int]) -> Flaw | None:
    """Why a row is not an id and a caption; None if it is."""
    if isinstance(fields, str):
        return Flaw(line, fields, 'Quote the whole caption: ID,"caption", with "" for a quote inside.')
    if len(fields) < 2:
        return Flaw(line, f"has no {_NAMES[separator]}", "Write an id and its caption on each line.")
    if len(fields) > 2 and separator != "|":
        hint = "Quote captions that hold a comma; join concepts by ;" if separator == "," else None
        return Flaw(line, "has more columns than 2", hint, f"{len(fields)} columns")
    key = fields[0]
    if _names_ids(key):
        return Flaw(line, "a header that is not the first row", "Leave it out.")
    if key.split() != [key] and not passes_for_header(key, separator):
        return Flaw(line, "an id that is empty or holds white space", subject=repr(key[:80]))
    if key in before:
        return Flaw(line, "a repeated id", "Give each id once.", f"{key}, as on line {before[key]}")
    return None


def _text_of(path: Path) -> tuple[str, list[Flaw], list[str]]:
    """The text of a file or its zip, what is wrong with its encoding, and warnings."""
    if path.is_dir():
        raise UserError([Problem("is a folder, not a file", path, hint=_FILE_HINT)])
    data, fault = content(path, zipped=True)
    warnings = []
    name = _only_text(path) if data is None and path.is_file() else None
    if name and (data := _member(path, name)) is not None:
        warnings = [f"reads {name}; the organisers require a zip of {MEMBER} and nothing else"]
    if data is None:
        is_workbook = path.is_file() and b"xl/workbook.xml" in path.read_bytes()
        problem = ("is an Excel workbook", filekinds.EXPORT_HINT) if is_workbook else (fault, _FILE_HINT)
        raise UserError([Problem(problem[0], path, hint=problem[1])])
    _refuse_no_text(data, path, _FILE_HINT)
    has_mark = data.startswith(codecs.BOM_UTF8)
    text, flaws = decoded(data)
    warnings += ["starts with a byte order mark; a submission must not"] if has_mark else []
    # CR ends lines only if nothing else does
    return text if "\n" in text else text.replace("\r", "\n"), flaws[has_mark:], warnings


def _refuse_no_text(data: bytes, path: Path, hint: str) -> None:
    """Raise `UserError` for images, archives, and for text in another encoding that could pass for UTF-8."""
    if found := filekinds.not_text(data):
        raise UserError([Problem(found[0], path, hint=found[1] or hint)])


def _only_text(path: Path) -> str | None:
    """The only text in a zip, whatever its name and folder; files that macOS adds do not count."""
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
    """A file from a zip; None if it is damaged, encrypted or too large."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as member:
            data = member.read(_LARGEST + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError):
        return None
    return data if len(data) <= _LARGEST else None


def _separator(text: str, path: Path) -> str:
    lines = (line[0] for line in re.finditer(r"[^\r\n]+", text))
    found = next(filter(None, map(filekinds.separator_of, lines)), None)
    if found == ";":
        raise UserError([Problem("is separated by semicolons", path, 1, hint=filekinds.EXPORT_HINT)])
    if found is None:
        what = "holds neither pipes, tabs nor commas" if text.strip() else "is empty"
        raise UserError([Problem(what, path, hint=_FILE_HINT)])
    return found


def holds_concepts(found: CaptionFile) -> list[Problem]:
    """The mistake of a file of concepts where captions are expected."""
    if not are_concepts(found.values.values()):
        return []
    hint = "To read them as concepts, `score`, `compare` and `submission` have the option --task concept."
    return [Problem("holds concepts, not captions", found.path, hint=hint)]


def as_predictions(found: CaptionFile, task: Task = "caption") -> dict[str, str] | dict[str, list[str]]:
    """The captions of a file, or lists of CUIs, by id, for a submission.

    Raises `UserError` with every caption that was cut at a pipe, or if concepts stand for the captions.
    """
    what, hint = "a second pipe would cut this", "Replace it, or give the captions as CSV."
    if flaws := [Flaw(found.lines[key], what, hint, key) for key in found.cut]:
        raise UserError(grouped(found.path, flaws))
    if task == "caption":
        if problems := holds_concepts(found):
            raise UserError(problems)
        return dict(found.values)
    lists = {key: map(str.strip, value.split(";")) for key, value in found.values.items()}
    return {key: [cui for cui in cuis if cui] for key, cuis in lists.items()}


def read_predictions(
    path: Path, task: Task = "caption", ids: Iterable[str] = ()
) -> dict[str, str] | dict[str, list[str]]:
    """Captions, or lists of CUIs, by id, from any file that `read` can read; `ids` are for COCO results.

    Raises `UserError` with every row that can't be read and every caption that was cut at a pipe.
    """
    return as_predictions(with_ids(read(path), ids), task)


def read_ids(path: Path) -> list[str]:
    """The ids of a split in the order of the file: one per line, or the first column of a label file.

    A label file may have any layout: tab-separated without quoting or CSV, with or without a header. Raises
    `UserError` with every line that has no id or a repeated one.
    """
    text = _text(path, _IDS_HINT)
    if coco.is_json(text):
        raise UserError([Problem("is JSON, not a list of ids", path, hint=_IDS_HINT)])
    lines = list(_first_column(text, path))
    if lines and lines[0][1].strip().lower() == "id":
        lines = lines[1:]
    flaws = [
        Flaw(line, "an id that is empty or holds white space", _IDS_HINT, repr(key[:80]))
        for line, key in lines
        if key.split() != [key]
    ]
    first: dict[str, int] = {}
    for line, key in lines:
        if first.setdefault(key, line) != line:
            what = f"{key[:80]}, already on line {first[key]}"
            flaws.append(Flaw(line, "a repeated id", "Give each id once.", what))
    if not lines:
        flaws.append(Flaw(None, "holds no ids", _IDS_HINT))
    if flaws:
        raise UserError(grouped(path, flaws))
    return list(first)


def _text(path: Path, hint: str) -> str:
    try:
        data = files.read(path, pipes=True)
        _refuse_no_text(data, path, hint)
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
            raise UserError([Problem(fields, path, line, hint=_IDS_HINT)])
        if "".join(fields).strip():
            yield line, fields[0]
