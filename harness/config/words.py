"""Types of keys in words, for the reference and for messages about wrong values."""

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_WORDS = {str: "text", bool: "true or false", Path: "path", int: "whole number", float: "number", Any: "any"}
_KEY = "[key]"
"""Pydantic's mark of a wrong key of a mapping, at the end of its path."""
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen": "a list",
    "dict": "a mapping of names to values",
    "mapping": "a mapping of names to values",
    "model": "a mapping of keys to values",
    "none": "null",
}
"""What is allowed, by how the names of pydantic's mistakes begin, where the key's own type is not known."""
_BOUNDS = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "{min_length} or more entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "a text of {min_length} or more characters",
    "string_too_long": "a text of at most {max_length} characters",
}


def type_of(hint: Any) -> str:
    """A type with its allowed values, in words; values of YAML are in backticks."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return next((word for extra in parts[1:] if (word := _range(parts[0], extra))), type_of(parts[0]))
    if origin is Literal:
        return " or ".join(", ".join(f"`{value}`" for value in parts).rsplit(", ", 1))
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if part is type(None) else type_of(part) for part in parts)
    if origin in (tuple, list):
        count = "" if origin is list or parts[-1] is ... else f"{len(parts)} times "
        return f"list of {count}{type_of(parts[0])}"
    if origin is dict:
        return f"mapping of {type_of(parts[0])} to {type_of(parts[1])}"
    return _WORDS.get(hint, "section")


def _range(base: Any, extra: Any) -> str | None:
    """A type in words from its annotation: the words given there, or the length of a text."""
    if isinstance(extra, str):
        return extra
    longest = getattr(extra, "max_length", None)
    if isinstance(extra, FieldInfo):
        longest = next((rule.max_length for rule in extra.metadata if hasattr(rule, "max_length")), None)
    return f"{type_of(base)} of at most {longest} characters" if longest and base is str else None


def allowed(item: ErrorDetails, model: type[BaseModel] | None = None) -> str:
    """What a key may have whose value pydantic refuses, in words: its own type if `model` has the key."""
    kind = item["type"]
    if kind == "too_short" and item["ctx"]["min_length"] == 1:
        return "one entry or more"
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**item.get("ctx", {}))
    hint = _at(model, item["loc"]) if model else None
    words = type_of(hint).replace("`", "") if hint is not None else ""
    if words and "section" not in words and words != "any":
        return (
            f"a {words}"
            if words.startswith(("text", "path", "whole", "number", "list", "mapping", "name"))
            else words
        )
    if kind in ("literal_error", "enum"):
        return item["ctx"]["expected"].replace("'", "")
    if "section" in words and "list" in words and kind not in ("model_type", "dict_type"):
        return "a list"
    return next((known for name, known in _KINDS.items() if kind.startswith(name)), "another kind of value")


def _at(hint: Any, path: Sequence[int | str]) -> Any:
    """The type of the key at a path of pydantic; None if there is no such key."""
    for place, part in enumerate(path):
        if path[place + 1 : place + 2] == (_KEY,):
            return next((get_args(one)[0] for one in _branches(hint) if get_origin(one) is dict), None)
        hint = next((inner for one in _branches(hint) if (inner := _in(one, part)) is not None), None)
        if hint is None:
            return None
    return hint


def _branches(hint: Any) -> list[Any]:
    """The types that a type may stand for, without annotations."""
    if get_origin(hint) is Annotated:
        return _branches(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [one for part in get_args(hint) for one in _branches(part)]
    return [hint]


def _in(hint: Any, part: int | str) -> Any:
    origin, parts = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return get_type_hints(hint, include_extras=True).get(part) if part in hint.model_fields else None
    if origin in (tuple, list) and isinstance(part, int):
        return parts[0]
    return parts[1] if origin is dict else None
