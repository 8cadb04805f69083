"""Reads YAML of experiments and studies: small files of plain values, every mistake with its line.

A file may come from anywhere. Size, depth and the expansion of aliases are limited before values are built,
so every bad file is refused quickly.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.errors import Problem, UserError

MOST_BYTES, MOST_DEPTH, MOST_VALUES, MOST_DIGITS = 256_000, 50, 10_000, 30
"""Limits of a file, far above any real experiment; MOST_VALUES counts values with aliases expanded."""
_TAG = "tag:yaml.org,2002:"
_WRITABLE = {None, "!", *(_TAG + kind for kind in ("str", "map", "seq"))}
_NOT_BASE_10 = re.compile(r"[-+]?(0[0-7_]+|.*:.*)")
_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}


@dataclass(frozen=True)
class Place:
    """Where a key of the experiment was written."""

    file: str
    line: int | None = None


KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """Raises an error with its position at the first thing beyond the limits."""

    depth = values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.depth, self.values = self.depth + 1, self.values + 1
        if self.depth > MOST_DEPTH:
            _refuse(f"nested more than {MOST_DEPTH} levels deep", event)
        if self.values > MOST_VALUES:
            _refuse(f"more than {MOST_VALUES:,} values", event)
        tag = getattr(event, "tag", None)
        if tag not in _WRITABLE and tag.startswith(_TAG) and "/" not in tag:
            _refuse(f"the tag !!{tag.removeprefix(_TAG)} is not used here; write the value alone", event)
        node = super().compose_node(parent, index)
        if node is not None and node.tag == _TAG + "int" and len(node.value) > MOST_DIGITS:
            _refuse(f"a number of {len(node.value):,} digits", event)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # e.g. 2024-99-99, which looks like a date, or 0x_
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


def _refuse(what: str, event: yaml.Event) -> None:
    raise yaml.composer.ComposerError(None, None, what, event.start_mark)


def read_text(file: Path) -> str:
    """The text of a YAML file. Raises `UserError` if it is not a file, not UTF-8 or too large."""
    if what := no_file(file):
        raise UserError([Problem(what, file)])
    with file.open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError([Problem(f"larger than {MOST_BYTES // 1000} kB; no experiment is that large", file)])
    for mark, name in _ENCODINGS.items():
        if content.startswith(mark):
            raise UserError([Problem(f"is {name}; UTF-8 is allowed", file, 1, hint="Save it as UTF-8.")])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError([Problem(f"not UTF-8 at byte {error.start}", file, line)]) from None


def no_file(file: Path) -> str | None:
    """Why a path is not a regular file; None if it is one."""
    try:
        if file.is_file():
            return None
        if file.is_dir():
            return "a folder, not a file"
        return "not a regular file" if file.exists() else "no such file"
    except (OSError, ValueError) as error:  # a name that is too long or has a NUL
        return f"no such file: {getattr(error, 'strerror', None) or error}"


def parse(file: Path, problems: list[Problem]) -> tuple[yaml.Node | None, Any]:
    """The YAML of a file, as nodes with lines and as values.

    Mistakes in single keys and values are added to `problems`. Raises `UserError` if the file gives no values
    at all.
    """
    return parse_text(read_text(file), file, problems)


def parse_text(text: str, file: Path | str, problems: list[Problem]) -> tuple[yaml.Node | None, Any]:
    """As `parse`, for a text from `file`."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _expanded(node, {}, file)
        problems += _mistakes(node, (), file, set())
        return node, loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        what = f"not YAML: unacceptable character #x{error.character:04x}"
        raise UserError([Problem(what, file, line)]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise UserError([Problem(f"not YAML: {error.problem}", file, line)]) from None


def _expanded(node: yaml.Node, sizes: dict[int, int | None], file: Path | str) -> int:
    """How many values a node has with its aliases expanded; `sizes` has None for the nodes above it."""
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise UserError([Problem("an alias refers to a value that contains it", file, _line(node))])
        return size
    sizes[id(node)] = None
    size = 1 + sum(_expanded(inner, sizes, file) for inner in _inner(node))
    if size > MOST_VALUES:
        what = f"its aliases expand to more than {MOST_VALUES:,} values"
        raise UserError([Problem(what, file, _line(node))])
    sizes[id(node)] = size
    return size


def _inner(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _mistakes(node: yaml.Node, path: KeyPath, file: Path | str, seen: set[int]) -> Iterator[Problem]:
    """Keys that are repeated or are not text, and values that YAML reads as something else."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        if what := _scalar_mistake(node):
            yield Problem(what, file, _line(node), ".".join(path) or None)
        return
    written = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        here = (*path, _name(key))
        if what := _key_mistake(key):
            yield Problem(what, file, _line(key), ".".join(path) or None)
        elif key.value in written:
            yield Problem("written twice", file, _line(key), ".".join(here))
        written.add(_name(key))
        yield from _mistakes(value, here, file, seen)
    for value in node.value if isinstance(node, yaml.SequenceNode) else ():
        yield from _mistakes(value, path, file, seen)


def _name(key: yaml.Node) -> str:
    return key.value if isinstance(key, yaml.ScalarNode) else "?"


def _key_mistake(key: yaml.Node) -> str | None:
    if not isinstance(key, yaml.ScalarNode):
        return "a key is text; got a list or mapping"
    if key.tag not in (_TAG + "str", _TAG + "merge"):
        return f"a key is text; got {key.value[:40]}, which YAML takes for something else. Put it in quotes"
    if any(_unprintable(sign) for sign in key.value):
        return f"a key is text without control characters; got {key.value[:40]!r}"
    return None


def _scalar_mistake(node: yaml.ScalarNode) -> str | None:
    if node.tag in (_TAG + "int", _TAG + "float") and _NOT_BASE_10.fullmatch(node.value):
        return f"got {node.value}, which YAML reads in base 8 or 60; write it without leading 0 and colon"
    if any(_unprintable(sign) and sign not in "\n\t" for sign in node.value):
        return f"got {node.value[:40]!r}, with a control character"
    return None


def _unprintable(sign: str) -> bool:
    """Whether a character is a control character or half of a surrogate pair."""
    return unicodedata.category(sign) in ("Cc", "Cs")


def places_of(node: yaml.Node, path: KeyPath, file: Path) -> Iterator[tuple[KeyPath, Place]]:
    """Where each key below `path` was written, and each entry of a list by its number.

    Call it after the values of `node` were built, since `<<` is resolved only then.
    """
    if isinstance(node, yaml.MappingNode):
        inner = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(str(number), value, value) for number, value in enumerate(node.value)]
    else:
        return
    for name, written, value in inner:
        yield (*path, name), Place(str(file), _line(written))
        yield from places_of(value, (*path, name), file)
