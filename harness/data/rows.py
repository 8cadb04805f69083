"""The rows of a text file, by tabs or as CSV, each with the line it starts on."""

import csv
import io
from collections.abc import Iterator
from functools import cached_property

_LONGEST_FIELD = 2**31 - 1  # characters; the largest limit that the csv module takes on every platform


class Lines:
    """The raw lines of a CSV file, split at the first use."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        return list(io.StringIO(self.text, newline=""))

    def first_field(self, line: int) -> str:
        """The text before the first comma of a line that is not valid CSV."""
        return self.lines[line - 1].partition(",")[0].strip('"\r\n ')


def unquoted_rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row of an unquoted file.

    Only LF and CRLF end a line: captions may hold U+2028 and similar characters.
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        yield number, line.removesuffix("\r").split(separator)


def comma_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Rows of a CSV file, each with the line it starts on; a str instead of a list says what is wrong.

    After a quoting mistake, reading continues at the next line, so one stray quote costs one row. A field may
    have any length.
    """
    # all rows are read at once, since the csv module has one limit for the whole process
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
        rest = lines if at == 0 else (lines[i] for i in range(at, len(lines)))  # no copy for each mistake
        reader = csv.reader(rest, strict=True)
        start, base = at, at
        try:
            for fields in reader:
                yield start + 1, fields
                start = base + reader.line_num
            return
        except csv.Error as error:
            yield start + 1, f"not CSV: {error}"
            at = start + 1
