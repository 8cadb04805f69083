"""Recognises files that are not a submission of the wanted format, by first bytes or separators."""

import re
import shlex
from collections import Counter
from pathlib import Path

from harness.data import coco
from harness.data.forms import Rules

EXPORT_HINT = "Export it as CSV (UTF-8, with commas), and give that file."
_BINARY = {
    b"\xff\xd8\xff": ("is a JPEG image", None),
    b"\x89PNG": ("is a PNG image", None),
    b"%PDF": ("is a PDF", None),
    b"\x1f\x8b": ("is compressed by gzip", "Unpack it, and give the text file."),
    b"\xd0\xcf\x11\xe0": ("is an Excel workbook", EXPORT_HINT),
}
_WIDE = {
    "UTF-32": re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff|[^\0]\0\0\0|\0\0\0[^\0]"),
    "UTF-16 without a byte order mark": re.compile(rb"[^\0]\0[^\0]\0|\0[^\0]\0[^\0]"),
}
"""How a text with two or four bytes per character begins; an id or a header begins with ASCII."""
_SEPARATORS = {"|": "pipes", "\t": "tabs", ",": "commas", ";": "semicolons"}


def not_text(data: bytes) -> tuple[str, str | None] | None:
    """The kind of a file that is not UTF-8 text, and what to do with it; None if it may be text."""
    for start, known in _BINARY.items():
        if data.startswith(start):
            return known
    for name, beginning in _WIDE.items():
        if beginning.match(data):
            return f"is {name}, not UTF-8", EXPORT_HINT
    return None


def other_format(text: str, form: Rules) -> str | None:
    """The format of a text if it is not `form`; None if its rows can be checked."""
    if coco.is_json(text):
        return f"is {coco.KIND}" if coco.is_results(text) else "is JSON, but not COCO results"
    found = separator(text)
    return None if found in (None, form.separator) else f"is separated by {_SEPARATORS[found]}"


def remedy(text: str, path: Path, form: Rules) -> str:
    """What to do about a text of another format."""
    if coco.is_json(text):
        return conversion(path, form) if coco.is_results(text) else coco.WANTED
    return EXPORT_HINT if separator(text) == ";" else conversion(path, form)


def separator_of(line: str) -> str | None:
    """The first pipe, tab, comma or semicolon of a line; an id before a pipe or tab may hold semicolons."""
    first = re.search(r"[|\t,;]", line)
    if first and first[0] == ";":
        first = re.search(r"[|\t]", line) or first
    return first and first[0]


def separator(text: str) -> str | None:
    """The separator of most lines; None if there is none."""
    firsts = Counter(filter(None, map(separator_of, re.split("[\r\n]", text))))
    return (
        firsts.most_common(1)[0][0] if firsts and 2 * firsts.most_common(1)[0][1] > firsts.total() else None
    )


def conversion(path: Path, form: Rules) -> str:
    """The command that writes the captions (or concepts) of a file in the format `form`."""
    of_task = " --task concept" if form.task == "concept" else ""
    command = f"harness submission make {shlex.quote(str(path))} --edition {form.edition} --ids IDS"
    return f"To write it in this format: {command}{of_task}"


def described(form: Rules) -> str:
    """The format in words: `ID|caption without a header`."""
    value = "caption" if form.task == "caption" else "C1;C2"
    return f"the header {form.header}" if form.header else f"ID{form.separator}{value} without a header"
