"""Label files and image folders -> examples, and what is wrong with them; how each layout is written.

Nothing is opened here but label files: images are only listed. Sources: the files of ImageCLEFmedical Caption
2023-2026 and of ROCOv2.
"""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from harness.errors import Problem

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
SPLITS = ("train", "valid", "test")
_LONGEST_FIELD = 2**31 - 1  # characters; the csv module takes no more on every platform
Row = tuple[str, str]
"""(split, id) of one example."""


@dataclass(frozen=True)
class Example:
    """One image and what its label files say about it; `line` is its line in the captions (or ids) file."""

    id: str
    image: Path
    caption: str | None
    cuis: tuple[str, ...]
    line: int | None


@dataclass(frozen=True)
class Dataset:
    """A checked data set; `splits` has the keys train, valid and test, and test may lack captions.

    `fingerprints` name the contents of each split's labels and images, whatever their place and date.
    """

    root: Path
    layout: str
    splits: Mapping[str, tuple[Example, ...]]
    concept_names: Mapping[str, str]
    fingerprints: Mapping[str, str]
    left_out: tuple[Problem, ...]


@dataclass(frozen=True)
class Finding:
    """A problem that leaving out `row` mends (None: the row was not read at all)."""

    problem: Problem
    row: Row | None


class File(NamedTuple):
    """An image as its folder lists it; `name` is its path below the data set's root."""

    path: Path
    name: str
    size: int
    mtime_ns: int


@dataclass
class Listing:
    """What the label files and folders of a data set say, right or wrong."""

    splits: dict[str, list[Example]] = field(default_factory=dict)
    sources: dict[str, Path | None] = field(default_factory=dict)
    """Per split, the file that `Example.line` counts in; None where the ids are those of the images."""
    files: dict[Row, File] = field(default_factory=dict)
    """The images that are there."""
    concept_names: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    fatal: list[Problem] = field(default_factory=list)
    """Problems that no left-out row mends."""


@dataclass(frozen=True)
class Layout:
    """How a family of data sets names and writes its label files; names are suffixes of the real ones."""

    separator: Literal["tab", "comma"]
    captions: str
    concepts: str
    caption_header: tuple[str, str]
    concept_header: tuple[str, str]


_COMMA = Layout("comma", "{split}_captions.csv", "{split}_concepts.csv", ("ID", "Caption"), ("ID", "CUIs"))
LAYOUTS: Mapping[str, Layout] = {
    "imageclef2023": Layout(
        "tab",
        "caption_prediction_{split}_labels.csv",
        "concept_detection_{split}_labels.csv",
        ("ID", "caption"),
        ("ID", "cuis"),
    ),
    "imageclef2024": _COMMA,
    "rocov2": _COMMA,
}


def read(root: Path, layout: str) -> Listing:
    """List the data set in `root`; whatever is wrong with it is in the listing, nothing is raised."""
    listing = Listing()
    how = LAYOUTS[layout]
    listing.concept_names = _concept_names(root, listing)
    for split in SPLITS:
        _read_split(root, split, how, listing)
    return listing


def _read_split(root: Path, split: str, how: Layout, listing: Listing) -> None:
    required = split != "test"
    captions_file = _find(root, how.captions.format(split=split), f"{split} captions", required, listing)
    concepts_file = _find(root, how.concepts.format(split=split), f"{split} concepts", required, listing)
    captions = _table(captions_file, how.separator, how.caption_header, split, listing)
    concepts = _table(concepts_file, how.separator, how.concept_header, split, listing)
    if captions_file and concepts_file:
        _unmatched(split, captions_file, captions, concepts_file, concepts, listing)
    source, lines = captions_file, {id: line for id, (line, _) in captions.items()}
    if not required and captions_file is None:
        source = _find(root, "test_ids.csv", "test ids", False, listing)
        lines = _ids(source, listing) if source else {}
    folder, files = _images(root, split)
    if folder is None and (required or lines):
        listing.fatal.append(_no_images(root, split))
        return
    if not lines and source is None:
        lines = dict.fromkeys(sorted(files)) if not required else {}
    listing.sources[split] = source
    listing.files |= {(split, id): files[id] for id in lines if id in files}
    listing.splits[split] = [
        Example(
            id,
            files[id].path if id in files else folder / f"{id}.jpg",
            captions[id][1] if id in captions else None,
            tuple(concepts[id][1].split(";")) if concepts.get(id, (0, ""))[1] else (),
            line,
        )
        for id, line in lines.items()
    ]


def _find(root: Path, suffix: str, what: str, required: bool, listing: Listing) -> Path | None:
    found = sorted(path for path in root.glob(f"*{suffix}") if path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        listing.fatal.append(Problem(f"more than one file of {what}: {names}", root, hint="Keep one."))
    elif required:
        listing.fatal.append(Problem(f"no file of {what}: looked for *{suffix}", root, hint=_there(root)))
    return None


def _there(root: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"There: {shown}" if names else "The folder is empty."


def _table(
    path: Path | None, separator: str, header: tuple[str, str], split: str, listing: Listing
) -> dict[str, tuple[int, str]]:
    """Two columns as id -> (line, value); the first of two rows with one id is kept."""
    rows: dict[str, tuple[int, str]] = {}
    text = _text(path, listing) if path else None
    if text is None:
        return rows
    lines = unquoted_rows(text, "\t") if separator == "tab" else comma_rows(text)
    mark = "<tab>" if separator == "tab" else ","
    _, first = next(lines, (1, []))
    if not isinstance(first, list) or [name.lower() for name in first] != [name.lower() for name in header]:
        got = first if isinstance(first, str) else mark.join(first)
        listing.fatal.append(
            Problem(
                f"got the header {got[:80]!r}; {mark.join(header)} is allowed here",
                path,
                1,
                hint="See data.layout: imageclef2023 is written with tabs, the others with commas.",
            )
        )
        return rows
    for line, fields in lines:
        id = fields[0] if isinstance(fields, list) and fields else ""
        if isinstance(fields, str):
            what = fields
        elif len(fields) != 2:
            what = f"got {len(fields)} fields; 2 are allowed" if any(fields) else "blank line"
        elif not id.strip():
            what = "empty id"
        elif id in rows:
            what = f"duplicate id {id}, first on line {rows[id][0]}; this later row is the bad one"
            id = ""  # so that the first row stays
        else:
            rows[id] = (line, fields[1])
            continue
        listing.findings.append(Finding(Problem(what, path, line), (split, id) if id.strip() else None))
    return rows


def _text(path: Path, listing: Listing) -> str | None:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        listing.fatal.append(Problem(f"not UTF-8 at byte {error.start}", path, line))
        return None


def unquoted_rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row of an unquoted file.

    Only LF and CRLF end a line: captions may hold U+2028 and its kin.
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        yield number, line.removesuffix("\r").split(separator)


def comma_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Rows of a CSV file, each with the line it starts on; a str instead of a list says what is wrong.

    After a quoting mistake reading goes on at the next line, so that one stray quote costs one row. A field
    may be as long as it likes.
    """
    # read to the end first: the csv module has one limit for the whole process
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        rows = list(_comma_rows(text))
    finally:
        csv.field_size_limit(before)
    yield from rows


def _comma_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    lines = list(io.StringIO(text, newline=""))
    at = 0
    while at < len(lines):
        reader = csv.reader(lines[at:] if at else lines, strict=True)
        start, base = at, at
        try:
            for fields in reader:
                yield start + 1, fields
                start = base + reader.line_num
            return
        except csv.Error as error:
            yield start + 1, f"not CSV: {error}"
            at = start + 1


def _unmatched(
    split: str,
    captions_file: Path,
    captions: Mapping[str, tuple[int, str]],
    concepts_file: Path,
    concepts: Mapping[str, tuple[int, str]],
    listing: Listing,
) -> None:
    known = {finding.row for finding in listing.findings}
    for id, (line, _) in captions.items():
        if id not in concepts and (split, id) not in known:
            what = f"{id} has no row in {concepts_file.name}"
            listing.findings.append(Finding(Problem(what, captions_file, line), (split, id)))
    for id, (line, _) in concepts.items():
        if id not in captions and (split, id) not in known:
            what = f"{id} has no row in {captions_file.name}"
            listing.findings.append(Finding(Problem(what, concepts_file, line), (split, id)))


def _ids(path: Path, listing: Listing) -> dict[str, int]:
    lines: dict[str, int] = {}
    for line, fields in unquoted_rows(_text(path, listing) or "", "\t"):
        id = fields[0].strip()
        if line == 1 and id.upper() == "ID":
            continue
        if not id or len(fields) > 1:
            listing.findings.append(Finding(Problem("one id is allowed on each line", path, line), None))
        elif id in lines:
            what = f"duplicate id {id}, first on line {lines[id]}; this later row is the bad one"
            listing.findings.append(Finding(Problem(what, path, line), None))
        else:
            lines[id] = line
    return lines


def _concept_names(root: Path, listing: Listing) -> dict[str, str]:
    """CUI -> name, from a tab file without header (2023) or a comma file with one (2024, ROCOv2)."""
    path = _find(root, "cui_mapping.csv", "concept names", True, listing)
    text = _text(path, listing) if path else None
    if text is None:
        return {}
    names: dict[str, str] = {}
    rows = unquoted_rows(text, "\t") if "\t" in text.partition("\n")[0] else comma_rows(text)
    for line, fields in rows:
        if isinstance(fields, list) and len(fields) == 2:
            if line > 1 or fields[0].upper() != "CUI":
                names[fields[0]] = fields[1]
        else:
            what = fields if isinstance(fields, str) else f"got {len(fields)} fields; 2 are allowed"
            listing.findings.append(Finding(Problem(what, path, line), None))
    return names


def _folders(root: Path, split: str) -> list[Path]:
    """Where people unpack a split's images, archives in archives included."""
    outer = [root / split, *sorted(root.glob(f"*{split}_images")), root / "images" / split]
    inner = [base / name for base in outer for name in (split, f"{split}_images", "images")]
    return [*outer, *inner]


def _images(root: Path, split: str) -> tuple[Path | None, dict[str, File]]:
    """The first folder of the split that holds images, and those images by id."""
    for folder in _folders(root, split):
        files = _list(folder, root) if folder.is_dir() else {}
        if files:
            return folder, files
    return None, {}


def _list(folder: Path, root: Path) -> dict[str, File]:
    files = {}
    below = folder.relative_to(root).as_posix()
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() not in IMAGE_SUFFIXES:
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:  # a link to nothing: reported as a missing image
                continue
            files[stem] = File(
                folder / entry.name, f"{below}/{entry.name}", status.st_size, status.st_mtime_ns
            )
    return files


def _no_images(root: Path, split: str) -> Problem:
    looked = ", ".join(f"{folder.relative_to(root)}/" for folder in _folders(root, split)[:3])
    return Problem(
        f"no {split} images: looked for {', '.join(IMAGE_SUFFIXES)} in {looked} and one folder deeper",
        root,
        hint=_there(root),
    )
