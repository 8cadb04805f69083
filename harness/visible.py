"""Text from outside on a terminal: characters that control the terminal or can't be seen are escaped.

Ids, captions, file names, settings and messages of libraries come from anybody. `guard` puts one gate before
the terminal, so that no command has to think of it.
"""

import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO

STANDARD_OUTPUT = "standard output"
"""The `filename` of an error of writing there."""
_OBEYED = frozenset(["Cc", "Cf", "Cs", "Zl", "Zp"])
"""Categories of Unicode: controls, formats (bidirectional ones, zero width), lone surrogates, line ends."""
_INKLESS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and marks that show nothing."""
_JOINERS = frozenset("\u200c\u200d")
_STYLING = re.compile(r"(\r|\x1b\[(?:[0-9;]*m|[0-9]*[AK]|\?25[hl]))")
"""What rich itself writes: colours, and the moves of a progress bar."""


def visible(text: str) -> str:
    r"""The text with `\x1b`, `\u202e` and so on for every character that acts on a terminal or can't be seen.

    Line feeds, tabs and blanks of any width stay, and so do the joiners within Persian, Indic scripts and
    emoji.
    """
    return _written_out(text, _as_python)


def one_line(text: str) -> str:
    r"""The text as `visible` shows it, with `\n` for a line feed: no value from outside forges a line."""
    return visible(text).replace("\n", r"\n")


def json_text(value: Any, **options: Any) -> str:
    """JSON for people and programs: letters as they are, `visible`'s characters as JSON's own escapes."""
    plain = _encoding(sys.stdout).startswith("utf")
    return _written_out(json.dumps(value, indent=1, ensure_ascii=not plain, **options), _as_json)


def print_csv(text: str) -> None:
    """Print CSV: to a terminal as `visible` shows it, to a file or a program as it is."""
    stream = sys.stdout if is_terminal(sys.stdout) else getattr(sys.stdout, "faithful", sys.stdout)
    stream.write(text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is shown on a terminal, guarded or not."""
    return stream is not None and _styled(stream).isatty()


def console(stderr: bool = False) -> Any:
    """The rich console of every table: takes text literally (no markup, no emoji codes) and visibly."""
    from rich.console import Console

    class Shown(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(visible(text), **options)

    stream = sys.stderr if stderr else sys.stdout
    width = None if is_terminal(stream) else 160
    return Shown(file=_styled(stream), width=width, highlight=False, markup=False, emoji=False)


def guard() -> None:
    """Put the gate before standard output and standard error of this process.

    Text that is written there is made visible, and characters that the encoding lacks are written out. A
    reader that is gone (`| head`) or a closed stream does not end the command. A full disk behind standard
    output raises `OSError`; behind standard error nobody can be told.
    """
    for number in range(3):
        _reserve(number)
    os.environ.setdefault("PYTHON_COLORS", "0")  # from 3.13 on tracebacks are coloured, which we'd write out
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if not isinstance(stream, _Gate):
            setattr(sys, name, _Gate(stream, required=name == "stdout"))


def _reserve(number: int) -> None:
    """Open a standard descriptor that is closed. Otherwise the next open file would receive output."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)


class _Door:
    """A guarded standard stream: escapes what is written, and continues if its reader is gone."""

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
        """Discard all further output, also at the exit of Python."""
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
    """What `sys.stdout` and `sys.stderr` are; libraries take it for no terminal, and write no colours.

    `rich_proxied_file` is where rich looks for the stream behind, which takes its colours; `faithful` takes
    everything.
    """

    def __init__(self, stream: TextIO, required: bool):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        # tqdm's bars, on standard error, begin with a carriage return
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
    """Whether a joiner beside this character changes how it looks: not so in Latin, Greek or Cyrillic."""
    return char >= "\u0590" and unicodedata.category(char)[0] in "LMS"


def _as_python(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _as_json(char: str) -> str:
    return json.dumps(char)[1:-1]
