"""COCO results, the usual JSON output of captioning code: `[{"image_id": 16, "caption": "..."}, ...]`."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from harness.data.forms import bare
from harness.errors import Flaw, Problem, UserError, grouped

KIND = "COCO results (JSON)"
WANTED = 'COCO results are a list: [{"image_id": 16, "caption": "..."}, ...]'


def is_json(text: str) -> bool:
    """Whether a text is JSON and not a table: no id begins with such brackets."""
    return re.match(r"\s*(\[\s*[\]{\[\"]|\{\s*[}\"])", text) is not None


def is_results(text: str) -> bool:
    """Whether JSON holds captions that can be read."""
    try:
        return bool(read(text, Path(), most=1))
    except UserError:
        return False


def read(text: str, path: Path, most: int | None) -> tuple[dict[str, list[str]], Mapping[str, str]]:
    """Captions by image id, at most `most` of each; and file names by image id, empty for results.

    Ids that are numbers in the file become text. COCO annotations (`{"images": [...], "annotations": [...]}`)
    are read too, with the file names of the images as ids. Raises `UserError` for other JSON, and with every
    entry that can't be read.
    """
    entries, names = _entries(text, path)
    found: dict[str, list[str]] = {}
    places: dict[str, int] = {}
    flaws = []
    for number, entry in enumerate(entries, 1):
        place = f"entry {number}"
        key = _key(entry, names)
        caption = entry.get("caption") if isinstance(entry, dict) else None
        if key is None:
            what = "has no image_id that is a whole number below 10^18 or a text without white space"
            flaws.append(Flaw(None, what, WANTED, place))
        elif not isinstance(caption, str):
            flaws.append(Flaw(None, "has no caption that is a text", WANTED, f"{place}, {key[:80]}"))
        elif len(found.get(key, ())) == most:
            subject = f"{key[:80]}, entries {places[key]} and {number}"
            flaws.append(Flaw(None, "a repeated image_id", "Give each image once.", subject))
        else:
            found.setdefault(key, []).append(re.sub("[\ud800-\udfff]", "\ufffd", caption))
            places[key] = number
    if flaws:
        raise UserError(grouped(path, flaws))
    if not found:
        raise UserError([Problem("is JSON without entries", path, hint=WANTED)])
    return found, names


def _entries(text: str, path: Path) -> tuple[Sequence[Any], Mapping[str, str]]:
    """The entries, and file names by image id if the file lists them."""
    try:
        found = json.loads(text, parse_int=_whole, object_pairs_hook=partial(_once, path))
    except ValueError as error:
        line = getattr(error, "lineno", None)
        raise UserError([Problem(f"is damaged JSON: {error}", path, line, hint=WANTED)]) from None
    except RecursionError:
        raise UserError([Problem("is JSON nested too deep", path, hint=WANTED)]) from None
    names: dict[str, str] = {}
    if isinstance(found, dict) and isinstance(found.get("annotations"), list):
        images = found.get("images") if isinstance(found.get("images"), list) else []
        listed = [one for one in images if isinstance(one, dict) and isinstance(one.get("file_name"), str)]
        for key, name in ((str(one.get("id")), one["file_name"]) for one in listed):
            if names.setdefault(key, name) != name:
                what = f"has two images of the id {key[:80]}: {names[key][:80]} and {name[:80]}"
                raise UserError([Problem(what, path, hint="Give each image once.")])
        found = found["annotations"]
    if not isinstance(found, list):
        keys = ", ".join(map(repr, list(found)[:3])) if isinstance(found, dict) else repr(found)[:40]
        raise UserError([Problem(f"is JSON, but not COCO results: got {keys[:200]}", path, hint=WANTED)])
    return found, names


def _whole(digits: str) -> float:
    """A whole number; infinity if it is too long for any image id, and perhaps for Python's `int`."""
    return int(digits) if len(digits) < 20 else math.inf


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; raises `UserError` if an entry has two values of one key."""
    found = dict(pairs)
    if len(found) < len(pairs) and {"image_id", "caption"} & found.keys():
        key = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        what = f"has two values of {key[:80]!r} in the entry of {str(found.get('image_id'))[:80]}"
        raise UserError([Problem(what, path, hint=f"Give each value once. {WANTED}")])
    return found


def _key(entry: Any, names: Mapping[str, str]) -> str | None:
    """The image id of an entry as text; None if it has none."""
    value = entry.get("image_id") if isinstance(entry, dict) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    key = names.get(str(value), str(value)) if isinstance(value, str) or abs(value) < 10**18 else ""
    return key if key.split() == [key] and not re.search("[\ud800-\udfff]", key) else None


def named(
    keys: Collection[str], ids: Iterable[str], path: Path, images: Mapping[str, str] | None = None
) -> tuple[dict[str, str], str | None]:
    """The id of each key that has one, and a note about keys that were matched by number.

    A key is an id, or the path of an image whose name is an id, or a number that exactly one id ends with.
    If a key is an id of the `images` of COCO annotations, such ids are meant, as in COCO's own code.
    Raises `UserError` if several ids end with the number, or if several keys are the same id.
    """
    known = dict.fromkeys(ids)
    by_number: dict[str, list[str]] = {}
    for one in known:
        by_number.setdefault(_number(bare(one)), []).append(one)
    listed = images if images and not images.keys().isdisjoint(keys) else {}
    found: dict[str, str] = {}
    numbered, flaws = [], []
    taken: dict[str, str] = {}
    for key in keys:
        match, how = _meant(key, known, by_number, listed)
        if len(match) > 1:
            what = "an image_id that several ids end with"
            subject = f"{key}: {', '.join(match[:3])}"
            flaws.append(Flaw(None, what, "Write the whole id as image_id.", subject))
        elif match and match[0] in taken:
            subject = f"{taken[match[0]]} and {key} are {match[0]}"
            flaws.append(Flaw(None, "image_ids that are the same id", "Give each image once.", subject))
        elif match:
            found[key] = match[0]
            taken[match[0]] = key
            numbered += [key] if how == "number" else []
    if flaws:
        raise UserError(grouped(path, flaws))
    note = f"{len(numbered):,} image_ids matched by number" if numbered else None
    return found, note and f"{note}: {numbered[0]} is {found[numbered[0]]}"


def _meant(
    key: str, known: Collection[str], by_number: Mapping[str, list[str]], listed: Mapping[str, str]
) -> tuple[list[str], Literal["name", "number"]]:
    """The ids that a key of COCO results can mean, and what they share with it."""
    if listed.get(key) in known:
        return [listed[key]], "number"
    name = bare(key.replace("\\", "/").rpartition("/")[2])
    for one in (key, name):
        if one in known:
            return [one], "name"
    if listed or not re.fullmatch("[0-9]+", name):
        return [], "name"
    return by_number.get(_number(name), []), "number"


def _number(key: str) -> str:
    """The digits at the end of a key, without leading zeros; empty if there are none."""
    digits = re.search("[0-9]*$", key)[0]
    return digits and (digits.lstrip("0") or "0")
