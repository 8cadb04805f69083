"""Makes outside text safe on a terminal: control characters and invisible ones are written as escapes.

Ids, captions, file names, settings and messages of libraries can come from anyone. `guard` filters everything
that goes to the terminal, so commands need not do it.
"""

import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO

STANDARD_OUTPUT = "standard output"
"""The `filename` of an error when writing there."""
_UNFOLDED = 10_000
_OBEYED = frozenset(["Cc", "Cf", "Cs", "Zl", "Zp"])
"""Unicode categories: controls, formats (bidirectional, zero width), lone surrogates, line ends."""
_INKLESS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and marks without a visible shape."""
_JOINERS = frozenset("\u200c\u200d")
_STYLING = re.compile(r"(\r|\x1b\[(?:[0-9;]*m|[0-9]*[AK]|\?25[hl]))")
"""Sequences that rich itself writes: colours, and the moves of a progress bar."""


def visible(text: str) -> str:
    r"""The text with escapes such as `\x1b` for characters that control a terminal or are invisible.

    Line feeds, tabs and spaces of any width stay, and so do joiners within Persian, Indic scripts and emoji.
    """
    return _written_out(text, _as_python)


def one_line(text: str) -> str:
    r"""The text as `visible` shows it, with `\n` for a line feed, so no outside value can fake a line."""
    return visible(text).replace("\n", r"\n")


def json_text(value: Any, **options: Any) -> str:
    """JSON with letters as they are, and JSON's own escapes for the characters that `visible` escapes."""
    plain = _encoding(sys.stdout).startswith("utf")
    return _written_out(json.dumps(value, indent=1, ensure_ascii=not plain, **options), _as_json)


def print_csv(text: str) -> None:
    """Print CSV: as `visible` shows it to a terminal, unchanged to a file or program."""
    stream = sys.stdout if is_terminal(sys.stdout) else getattr(sys.stdout, "faithful", sys.stdout)
    stream.write(text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is shown on a terminal, guarded or not."""
    return stream is not None and _styled(stream).isatty()


def console(stderr: bool = False) -> Any:
    """The rich console for every table; it shows text literally (no markup, no emoji codes), as `visible`.

    It is as wide as the terminal. In a file or a pipe no line is folded, unless COLUMNS gives a width.
    """
    from rich.console import Console

    class Shown(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(visible(text), **options)

    stream = sys.stderr if stderr else sys.stdout
    width = None if is_terminal(stream) else _columns()
    return Shown(file=_styled(stream), width=width, highlight=False, markup=False, emoji=False)


def _columns() -> int:
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isascii() and given.isdigit() and int(given) else _UNFOLDED


def guard() -> None:
    """Filter standard output and standard error of this process.

    Text is made visible, and characters that the encoding lacks become escapes. The command continues if the
    reader is gone (`| head`) or a stream is closed. On a full disk, standard output raises `OSError`; errors
    of standard error are ignored, since nobody could be told.
    """
    for number in range(3):
        _reserve(number)
    os.environ.setdefault("PYTHON_COLORS", "0")  # Python 3.13 colours tracebacks, which would become escapes
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if not isinstance(stream, _Gate):
            setattr(sys, name, _Gate(stream, required=name == "stdout"))


def _reserve(number: int) -> None:
    """Open a closed standard descriptor, or output would go into the next file that is opened."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)


class _Door:
    """Writes to a standard stream: cleans the text, and survives if the reader is gone."""

    def __init__(self, stream: TextIO, clean: Callable[[str], str], required: bool):
        self._stream, self._clean, self._required = stream, clean, required

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(self._clean(text)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            self._drop()
            if self._required and not isinstance(error, BrokenPipeError):
                raise OSError(error.errno, error.strerror, STANDARD_OUTPUT) from None

    def _drop(self) -> None:
        """Discard all further output, also at the interpreter's end."""
        try:
            number = self._stream.fileno()
        except (OSError, ValueError):
            return
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError("bytes would go past the gate")
        return getattr(self._stream, name)


class _Gate(_Door):
    """Replaces `sys.stdout` and `sys.stderr`; it is not a terminal for libraries, so they write no colours.

    rich writes its colours to `rich_proxied_file`. `faithful` passes everything unchanged.
    """

    def __init__(self, stream: TextIO, required: bool):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        # tqdm's bars on standard error begin with a carriage return
        super().__init__(stream, visible if required else _bar_or_text, required)
        self.rich_proxied_file = _Door(stream, _styled_text, required)
        self.faithful = _Door(stream, str, required)

    def isatty(self) -> bool:
        return False


def _styled(stream: Any) -> Any:
    return getattr(stream, "rich_proxied_file", stream)


def _styled_text(text: str) -> str:
    parts = _STYLING.split(text)
    return "".join(part if i % 2 else visible(part) for i, part in enumerate(parts))


def _bar_or_text(text: str) -> str:
    return "\r" + visible(text[1:]) if text.startswith("\r") else visible(text)


def _encoding(stream: Any) -> str:
    return (getattr(stream, "encoding", None) or "utf-8").lower()


def _written_out(text: str, spell: Callable[[str], str]) -> str:
    lines = text.split("\n")
    return "\n".join(line if _all_shows(line) else _spelled(line, spell) for line in lines)


def _all_shows(line: str) -> bool:
    return line.isprintable() and (line.isascii() or not _INKLESS.intersection(line))


def _spelled(line: str, spell: Callable[[str], str]) -> str:
    return "".join(char if _shows(line, i) else spell(char) for i, char in enumerate(line))


def _shows(line: str, i: int) -> bool:
    char = line[i]
    if char in _JOINERS:
        return 0 < i < len(line) - 1 and _joins(line[i - 1]) and _joins(line[i + 1])
    return char == "\t" or (unicodedata.category(char) not in _OBEYED and char not in _INKLESS)


def _joins(char: str) -> bool:
    """Whether a joiner next to this character changes its shape: not in Latin, Greek or Cyrillic."""
    return char >= "\u0590" and unicodedata.category(char)[0] in "LMS"


def _as_python(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _as_json(char: str) -> str:
    return json.dumps(char)[1:-1]
