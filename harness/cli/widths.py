"""Tables that fit the terminal: no number is ever cut.

A table that is too wide keeps its most important columns. A block below for each row has the others. Where
nobody watches (a file, a pipe), a table is as wide as it needs, unless COLUMNS says otherwise.
"""

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_FOLD = 24
"""Names are folded over several lines below this width only if there is no other way."""
_BORDER = 3  # of a column: its padding and a line


class Column(NamedTuple):
    """A column; a narrow table has room for the lowest `keep` first. `text` may be folded."""

    name: str
    keep: int | None = None
    text: bool = False


class Row(NamedTuple):
    """The cells of a row; `section` draws a line above it."""

    cells: Sequence[str]
    style: str = ""
    section: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table; its first `labels` columns name a row. They are text, and always shown.

    A row that repeats the label of the row above it, in the same section, shows a blank with `grouped`.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    labels: int = 1
    grouped: bool = False

    def show(self, screen: Any) -> None:
        """Print the table, or what fits of it and a block of other cells for each row."""
        shown, widths = self._fitting(screen.width)
        screen.print(self.title, style="italic")
        if widths:
            screen.print(self._table(shown, widths))
        left = [i for i in range(self.labels, len(self.columns)) if i not in shown]
        if left:
            for line in self._blocks(left, screen.width):
                screen.print(line, soft_wrap=True)

    def _fitting(self, width: int) -> tuple[list[int], list[int]]:
        """The columns that fit, the most important first, and their widths; no widths if none fits."""
        labels = list(range(self.labels))
        filled = (i for i in range(self.labels, len(self.columns)) if any(row.cells[i] for row in self.rows))
        others = sorted(filled, key=self._importance)
        shown, widths = labels, []
        for i in others:
            if found := self._widths(sorted([*shown, i]), width):
                shown, widths = sorted([*shown, i]), found
        return shown, widths

    def _importance(self, i: int) -> float:
        keep = self.columns[i].keep
        return math.inf if keep is None else keep

    def _widths(self, chosen: Sequence[int], width: int) -> list[int]:
        """The widths of columns in a table of at most `width`; none if a number would be cut."""
        full = [self._longest(i, str.splitlines) for i in chosen]
        least = [self._least(i) for i in chosen]
        full = list(map(max, full, least))
        room = width - 1 - _BORDER * len(chosen)
        while sum(full) > room:
            slack = [one - small for one, small in zip(full, least, strict=True)]
            if not any(slack):
                return []
            full[max(range(len(full)), key=lambda i: (slack[i] > 0, full[i]))] -= 1
        return full

    def _least(self, i: int) -> int:
        title = max(map(len, self.columns[i].name.split()), default=0)
        if i < self.labels or self.columns[i].text:
            return max(title, min(_FOLD, self._longest(i, str.split)))
        return max(title, self._longest(i, str.splitlines))

    def _longest(self, i: int, parts: Any) -> int:
        from rich.cells import cell_len

        cells = [row.cells[i] for row in self.rows]
        title = [self.columns[i].name] if parts is str.splitlines and i < self.labels else []
        return max((cell_len(part) for cell in [*cells, *title] for part in parts(cell)), default=0)

    def _table(self, shown: Sequence[int], widths: Sequence[int]) -> Any:
        from rich.table import Table

        table = Table()
        for i, width in zip(shown, widths, strict=True):
            text = i < self.labels or self.columns[i].text
            table.add_column(
                self.columns[i].name, justify="left" if text else "right", width=width, overflow="fold"
            )
        above: Sequence[str] = ()
        for row in self.rows:
            if row.section:
                table.add_section()
                above = ()
            cells = [
                _folded(row.cells[i], width) if i < self.labels or self.columns[i].text else row.cells[i]
                for i, width in zip(shown, widths, strict=True)
            ]
            if self.grouped and above and above[0] == row.cells[0]:
                cells[0] = ""
            above = row.cells
            table.add_row(*cells, style=row.style)
        return table

    def _blocks(self, left: Sequence[int], width: int) -> Iterator[str]:
        """For each row its name, then the cells that the table lacks, in columns where they fit."""
        found = [
            (row, [(self.columns[i], " ".join(row.cells[i].split())) for i in left if row.cells[i]])
            for row in self.rows
        ]
        pairs = [f"{column.name} {cell}" for _, cells in found for column, cell in cells if not column.text]
        wide = max(map(len, pairs), default=0)
        for row, cells in found:
            if all(cell == "-" for _, cell in cells):
                continue
            name = "  ".join(filter(None, row.cells[: self.labels]))
            one_line = "  ".join([f"{name}:", *(f"{column.name} {cell}" for column, cell in cells)])
            if len(one_line) <= width:
                yield one_line
                continue
            yield from wrapped(name, width, "  ")
            numbers = [f"{column.name} {cell}".ljust(wide) for column, cell in cells if not column.text]
            across = max(1, width // (wide + 2))
            for at in range(0, len(numbers), across):
                yield from wrapped("  ".join(numbers[at : at + across]).strip(), width, "    ", "  ")
            for column, cell in cells:
                if column.text:
                    yield from wrapped(f"{column.name} {cell}", width, "    ", "  ")


def _folded(text: str, width: int) -> str:
    """The text in lines of at most `width` cells: broken at blanks, else after a sign that joins names."""
    from rich.cells import cell_len

    lines = []
    for line in text.splitlines():
        lines.append("")
        for word in re.findall(r"\S+\s*", line):
            parts = [word] if cell_len(word.rstrip()) <= width else re.findall(r".+?(?:[/_,=.-]|$)\s*", word)
            for part in parts:
                if lines[-1] and cell_len(lines[-1] + part.rstrip()) > width:
                    lines.append("")
                lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def wrapped(text: str, width: int, indent: str, first: str = "") -> list[str]:
    """The text in lines of at most `width`, broken at blanks; `first` and `indent` begin the lines."""
    lines = textwrap.wrap(
        text,
        max(width, 20),
        initial_indent=first,
        subsequent_indent=indent,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [first]
