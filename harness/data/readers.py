"""Reads examples and their problems from label files and image folders, in every layout.

Only label files are opened; images are just listed. Sources: the files of ImageCLEFmedical Caption 2023-2026
and of ROCOv2.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from harness.data import files, folders
from harness.data.filekinds import not_text
from harness.data.folders import IMAGE_SUFFIXES
from harness.data.listing import SPLITS, Example, Finding, Listing, Table
from harness.data.misplaced import misplaced, plain_ids
from harness.data.rows import Lines, comma_rows, unquoted_rows
from harness.errors import Problem

_TWICE = "duplicate id"
_BLANK_IN_ID = "white space in an id"
_NO_LABELS = {
    b"PK": ("is an Excel workbook or a zip archive, not text",),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), ("is UTF-16, not UTF-8",)),
}
"""What a file is by its first bytes, if it may be a submission (see `filekinds`) but no file of labels."""
CUI, CUI_FORM = re.compile(r"C\d{7}"), "C and seven digits are allowed"
CUIS_JOINED = "CUIs are joined by ; without blanks"
_JOINED_OTHERWISE = re.compile(r"\s*C\d{7}([\s,|/]+C\d{7})*\s*")


@dataclass(frozen=True)
class Layout:
    """How a family of data sets names and writes its label files; real names end with these.

    `manual` is a file like that of `concepts`, which a data set may lack; None if no data set has one.
    """

    separator: Literal["tab", "comma"]
    captions: str
    concepts: str
    caption_header: tuple[str, str]
    concept_header: tuple[str, str]
    manual: str | None = None


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
    "rocov2": replace(_COMMA, manual="{split}_concepts_manual.csv"),
}


def fault_of_cuis(wrong: Sequence[str]) -> str:
    """What is allowed instead of CUIs of another form."""
    return CUIS_JOINED if any(map(_JOINED_OTHERWISE.fullmatch, wrong)) else CUI_FORM


def read(root: Path, layout: str) -> Listing:
    """List the data set in `root`; the listing has all problems, and nothing is raised."""
    listing = Listing()
    how = LAYOUTS[layout]
    if cause := _empty(root) or misplaced(root, layout):
        listing.fatal.append(cause)  # of all that would be missing
        return listing
    listing.concept_names = _concept_names(root, listing)
    for split in SPLITS:
        _read_split(root, split, how, listing)
    return listing


def _read_split(root: Path, split: str, how: Layout, listing: Listing) -> None:
    required = split != "test"
    captions_file = _find(root, how.captions.format(split=split), f"{split} captions", required, listing)
    concepts_file = _concept_file(root, how.concepts.format(split=split), f"{split} concepts", listing)
    captions = _table(captions_file, how.separator, how.caption_header, split, listing)
    concepts = _table(concepts_file, how.separator, how.concept_header, split, listing)
    images = folders.of_split(root, split)
    if images:
        captions = plain_ids(captions, captions_file, images, listing)
        concepts = plain_ids(concepts, concepts_file, images, listing)
    if captions and concepts:  # an unreadable file is already reported
        _unmatched(split, captions_file, captions, concepts_file, concepts, listing)
    source = captions_file
    if not required and captions_file is None:
        source = _find(root, "test_ids.csv", "test ids", False, listing)
        captions = _ids(source, split, listing) if source else {}
        captions = plain_ids(captions, source, images, listing) if images else captions
    if images is None:
        if required or captions:
            listing.fatal.append(_no_images(root, split))
        elif source is None and (unread := folders.foreign(root, split)):
            listing.fatal.append(Problem(f"no {split} images: {unread}", root))
        return
    if not captions and source is None and not required:
        captions = dict.fromkeys(images.ids, (None, None))
    # outside training, an unreadable row is used if an image confirms its id
    rows = {
        id: row
        for id, row in captions.items()
        if id not in listing.doubtful[split] or (split != "train" and id in images)
    }
    if captions and not rows:
        listing.fatal.append(Problem(f"no row of {split} can be read", source))
    if rivals := images.ambiguous(rows):
        listing.fatal.append(Problem(rivals, images.folder, hint=folders.KEEP_ONE))
    listing.sources[split] = source
    listing.concepts[split] = (concepts_file, {id: line for id, (line, _) in concepts.items()})
    listing.files |= {(split, id): images.files[id] for id in rows if id in images.files}
    for id in rows:
        if id not in images.files and id not in images.rivals:
            instead = f"; {found}" if (found := images.instead(id)) else ""
            listing.lacking[split, id] = f"no image {images.folder / id}.jpg{instead}"
    listing.splits[split] = [
        Example(
            id,
            images.files[id].path if id in images.files else images.folder / f"{id}.jpg",
            caption,
            tuple(concepts[id][1].split(";")) if concepts.get(id, (0, None))[1] else (),
            line,
        )
        for id, (line, caption) in rows.items()
    ]
    if how.manual:
        _read_manual(root, split, how, listing)


def _read_manual(root: Path, split: str, how: Layout, listing: Listing) -> None:
    """List the manually validated concepts of a split, if it has such a file.

    A wrong row there is left out alone; the image keeps its caption and its other concepts.
    """
    file = _find(root, how.manual.format(split=split), f"{split} manual concepts", False, listing)
    if file is None:
        return
    own = Listing()
    table = _table(file, how.separator, how.concept_header, split, own)
    listing.fatal += own.fatal
    problems = [(finding.problem, finding.cause) for finding in own.findings]
    known = listing.doubtful[split].union(example.id for example in listing.splits[split])
    found = {}
    for id, (line, value) in table.items():
        cuis = tuple(value.split(";")) if value else ()
        if id not in known:
            cause = f"is not an id of {split}"
            problems.append((Problem(f"{id} {cause}", file, line), cause))
        elif wrong := [cui for cui in cuis if not CUI.fullmatch(cui)]:
            cause = fault_of_cuis(wrong)
            what = f"got the CUI {', '.join(map(repr, wrong))}; {cause}"
            problems.append((Problem(what, file, line), cause))
        elif value is not None:
            found[id] = cuis
    listing.findings += [Finding(problem, None, cause) for problem, cause in problems]
    listing.manual[split] = found


def _find(root: Path, suffix: str, what: str, required: bool, listing: Listing) -> Path | None:
    found = sorted(path for path in root.glob(f"*{suffix}") if not path.name.startswith("."))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        listing.fatal.append(Problem(f"more than one file of {what}: {names}", root, hint="Keep one."))
    elif required:
        listing.fatal.append(Problem(f"no file of {what}: looked for *{suffix}", root, hint=_there(root)))
    return None


def _concept_file(root: Path, suffix: str, what: str, listing: Listing) -> Path | None:
    found = _find(root, suffix, what, False, listing)
    if found is None and not what.startswith("test"):  # the labels of test may be withheld
        listing.absent[what] = f"*{suffix}"
    return found


def _empty(root: Path) -> Problem | None:
    if any(not path.name.startswith(".") for path in root.iterdir()):
        return None
    return Problem("the folder is empty", root, hint="docs/own-data.md shows the files of a data set.")


def _there(root: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"There: {shown}"


def _table(path: Path | None, separator: str, header: tuple[str, str], split: str, listing: Listing) -> Table:
    """The rows of a file of two columns; the first of two rows with one id is kept."""
    rows: Table = {}
    text = _text(path, listing) if path else None
    if text is None:
        return rows
    if not text.strip():
        listing.fatal.append(Problem("is empty", path))
        return rows
    lines = unquoted_rows(text, "\t") if separator == "tab" else comma_rows(text)
    raw = Lines(text)
    mark = "<tab>" if separator == "tab" else ","
    _, first = next(lines, (1, []))
    if not isinstance(first, list) or [name.lower() for name in first] != [name.lower() for name in header]:
        got = first if isinstance(first, str) else mark.join(first)
        what = f"got the header {got[:80]!r}; {mark.join(header)} is allowed here"
        layouts = "See data.layout: imageclef2023 is written with tabs, the others with commas."
        lacks = isinstance(first, list) and len(first) == len(header) and first[0].lower() != "id"
        hint = (
            f"If the file has no header, put {mark.join(header)} above its first line." if lacks else layouts
        )
        listing.fatal.append(Problem(what, path, 1, hint=hint))
        return rows
    for line, fields in lines:
        id = fields[0] if isinstance(fields, list) and fields else ""
        if isinstance(fields, list) and len(fields) == 2 and id not in rows and id.split() == [id]:
            rows[id] = (line, fields[1])
            continue
        what, cause = _row_fault(fields, rows)
        id = (raw.first_field(line) if isinstance(fields, str) else id).strip()
        whole = isinstance(fields, list) and len(fields) == 2
        if id in rows:  # the first row stays valid
            id = "" if cause in (_TWICE, _BLANK_IN_ID) else id
        elif id.split() == [id]:
            rows[id] = (line, fields[1] if whole else None)
            listing.doubtful[split].add(id)
        listing.findings.append(Finding(Problem(what, path, line), (split, id) if id else None, cause))
    if not rows:
        listing.fatal.append(Problem("has a header and no row that can be read", path))
    return rows


def _row_fault(fields: list[str] | str, rows: Table) -> tuple[str, str]:
    """Why a row is not an id and a value, and the cause that other rows may share."""
    if isinstance(fields, str):
        return fields, fields
    if len(fields) != 2:
        what = (
            f"got {len(fields)} field{'s' * (len(fields) != 1)}; 2 are allowed"
            if any(fields)
            else "blank line"
        )
        return what, what
    if not fields[0].strip():
        return "empty id", "empty id"
    if fields[0] in rows:
        first = rows[fields[0]][0]
        return f"{_TWICE} {fields[0]}, first on line {first}; this later row is wrong", _TWICE
    return f"the id {fields[0]!r} holds white space", _BLANK_IN_ID


def _text(path: Path, listing: Listing) -> str | None:
    try:
        content = files.read(path)
    except OSError as error:
        listing.fatal.append(Problem(f"can't be read: {error.strerror}", path))
        return None
    if what := _NO_LABELS.get(content[:2]) or not_text(content):
        listing.fatal.append(Problem(what[0], path, hint="Export or save it as text in UTF-8."))
        return None
    try:
        text = content.decode("utf-8-sig")
        return text if "\n" in text else text.replace("\r", "\n")  # CR ends lines only if nothing else does
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = "Save it as UTF-8, for example by: iconv -f LATIN1 -t UTF-8"
        listing.fatal.append(Problem(f"not UTF-8 at byte {error.start}", path, line, hint=hint))
        return None


def _unmatched(
    split: str, captions_file: Path, captions: Table, concepts_file: Path, concepts: Table, listing: Listing
) -> None:
    """Rows of captions without concepts, and of concepts without a caption."""
    known = {finding.row for finding in listing.findings}
    for rows, file, others, other in (
        (captions, captions_file, concepts, concepts_file),
        (concepts, concepts_file, captions, captions_file),
    ):
        for id, (line, _) in rows.items():
            if id not in others and (split, id) not in known:
                cause = f"has no row in {other.name}"
                listing.findings.append(Finding(Problem(f"{id} {cause}", file, line), (split, id), cause))


def _ids(path: Path, split: str, listing: Listing) -> Table:
    """The ids of a file with one id on each line, as rows without a value."""
    rows: Table = {}
    for line, fields in unquoted_rows(_text(path, listing) or "", "\t"):
        id = fields[0].strip()
        if line == 1 and id.upper() == "ID":
            continue
        if id in rows:
            what, cause = _row_fault([id, ""], rows)
            id = ""
        elif len(fields) > 1 or id.split() != [id]:
            what = cause = "one id is allowed on each line"
            if id.split() == [id]:
                rows[id] = (line, None)
                listing.doubtful[split].add(id)
        else:
            rows[id] = (line, None)
            continue
        listing.findings.append(Finding(Problem(what, path, line), (split, id) if id else None, cause))
    if not rows:
        hint = "Write one id on each line, and end the lines by LF or CRLF."
        listing.fatal.append(Problem("holds no id that can be read", path, hint=hint))
    return rows


def _concept_names(root: Path, listing: Listing) -> dict[str, str]:
    """The name of each CUI, from a tab file without header (2023) or a comma file with one (2024, ROCOv2)."""
    path = _concept_file(root, "cui_mapping.csv", "concept names", listing)
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
            listing.findings.append(Finding(Problem(what, path, line), None, what))
    if not names:
        hint = "Without names, take the file away: captions need none."
        listing.fatal.append(Problem("has no names of concepts", path, hint=hint))
    return names


def _no_images(root: Path, split: str) -> Problem:
    if deeper := folders.deeper(root, split):
        place, count = deeper
        above = folders.folders(root, split)[0]
        what = f"no {split} images in {above.name}/, but {count:,} in {place.relative_to(root)}/"
        return Problem(
            what, root, hint=f"Move them up: mv {shlex.quote(str(place))}/* {shlex.quote(str(above))}/"
        )
    looked = ", ".join(f"{folder.relative_to(root)}/" for folder in folders.folders(root, split)[:3])
    what = f"no {split} images: looked for {', '.join(IMAGE_SUFFIXES)} in {looked} and one folder deeper"
    unread = folders.foreign(root, split)
    return Problem(f"{what}; {unread}" if unread else what, root, hint=_there(root))
