"""What the organisers' code does with a submission, written again from the known rules, without our code.

Each function returns the captions (or concept lists) that their evaluator would score, and raises `Refused`
if their loader, checker or evaluator would refuse the file. A file is bytes; ids are the ids of the split.
"""

import csv
import io
import re
from collections.abc import Sequence

MOST_CUIS = 100


class Refused(Exception):
    """The file is refused; the message says by what."""


def evaluate(data: bytes, ids: Sequence[str], edition: int, task: str) -> dict[str, str]:
    """What the organisers of an edition would score."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("encoding") from error
    if edition == 2026:
        _checker_of_2026(text, ids, task)
    try:
        rows = _rows(text, edition)
    except csv.Error as error:
        raise Refused(str(error)) from error
    if edition >= 2025:
        rows = rows[1:]  # the header, whatever it says
    found: dict[str, str] = {}
    for row in rows:
        if edition == 2023 and row and "ID" in row[0]:
            continue
        if len(row) < 2:
            raise Refused("fewer than 2 fields")
        if row[0] not in ids:
            raise Refused("unknown id")
        if row[0] in found:
            raise Refused("duplicate id")
        if task == "concept" and row[1].count(";") >= MOST_CUIS:
            raise Refused("more than 100 CUIs")
        found[row[0]] = row[1]
    if len(found) != len(ids):
        raise Refused("wrong count")
    return found


def _rows(text: str, edition: int) -> list[list[str]]:
    """Rows of a file that Python opened as text: CR and CRLF arrive as line feeds."""
    file = io.StringIO(text, newline=None)
    if edition >= 2025:
        return list(csv.reader(file))
    return list(csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE))


def _checker_of_2026(text: str, ids: Sequence[str], task: str) -> None:
    if text.startswith("\ufeff"):
        raise Refused("byte order mark")
    raw = text.splitlines()
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise Refused(str(error)) from error
    if not rows or rows[0] != ["ID", "Caption" if task == "caption" else "CUIs"]:
        raise Refused("header")
    if any(not line.strip() for line in raw) or [] in rows:
        raise Refused("blank line")
    for number, row in enumerate(rows[1:], 1):
        if len(row) != 2:
            raise Refused("columns")
        if row[0] != row[0].strip():
            raise Refused("white space around an id")
        if task == "concept":
            _concepts_of_2026(row[1])
        elif "," in row[1] and not (number < len(raw) and raw[number].endswith('"')):
            raise Refused("comma without quotes")
    if [row[0] for row in rows[1:]] != list(ids):
        raise Refused("ids or their order")


def _concepts_of_2026(value: str) -> None:
    if not value:
        return
    if value != value.strip() or value.endswith(";"):
        raise Refused("white space or a trailing semicolon")
    cuis = [cui.strip() for cui in value.split(";")]
    if any(not re.fullmatch(r"C\d+", cui) for cui in cuis):
        raise Refused("no CUI")
    if len(set(cuis)) < len(cuis):
        raise Refused("duplicate CUIs")
