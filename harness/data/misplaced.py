"""Recognises a data set that is whole but not as it is asked for: another layout, folder or form of ids.

One problem then stands for all that follow from it.
"""

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data.folders import IMAGE_SUFFIXES, Images
from harness.errors import Problem

if TYPE_CHECKING:
    from harness.data.listing import Listing, Table

_ASK = "Give the command run: --set {key}={value}   (data check and data stats: {option})"


def misplaced(root: Path, layout: str) -> Problem | None:
    """The problem of a folder without any label file of a layout, if another layout or folder has them."""
    if _fits(root, layout):
        return None
    if other := _layout_of(root):
        shown = ", ".join(_files(root, other)[:2])
        what = f"these look like {other}, not {layout}: found {shown}"
        hint = _ASK.format(key="data.layout", value=other, option=f"--layout {other}")
        return Problem(what, root, key="data.layout", hint=hint)
    below = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for folder in below:
        if other := layout if _fits(folder, layout) else _layout_of(folder):
            same = "" if other == layout else f" in the layout {other}"
            what = f"the data set lies one folder deeper{same}: found {', '.join(_files(folder, other)[:2])}"
            hint = _ASK.format(
                key="data.root", value=shlex.quote(str(folder)), option=shlex.quote(str(folder))
            )
            return Problem(what, root, key="data.root", hint=hint)
    return None


def _layout_of(root: Path) -> str | None:
    """The layout whose label files a folder has; rocov2 is known by its manual concepts."""
    from harness.data.readers import LAYOUTS

    manual = [name for name, how in LAYOUTS.items() if how.manual]
    found = [name for name in LAYOUTS if _fits(root, name)]
    by_manual = [
        name
        for name in manual
        if name in found and any(root.glob(f"*{LAYOUTS[name].manual.format(split='valid')}"))
    ]
    return next(iter([*by_manual, *found]), None)


def _fits(root: Path, layout: str) -> bool:
    return bool(_files(root, layout))


def _files(root: Path, layout: str) -> list[str]:
    """The label files of a layout in a folder, of the splits that have labels."""
    from harness.data.readers import LAYOUTS

    forms = (LAYOUTS[layout].captions, LAYOUTS[layout].concepts)
    suffixes = [form.format(split=split) for split in ("train", "valid") for form in forms]
    names = [path.name for suffix in suffixes for path in sorted(root.glob(f"*{suffix}"))]
    return [name for name in names if not name.startswith(".")]


def plain_ids(rows: "Table", file: Path | None, images: Images, listing: "Listing") -> "Table":
    """The rows with ids as the images have them, if most ids have a folder or an ending besides.

    Such a file is one problem, and nothing follows from it.
    """
    plain = {id: _plain(id) for id in rows}
    found = images.files
    wrong = {id for id, bare in plain.items() if bare != id and id not in found and bare in found}
    if 2 * len(wrong) <= len(rows):
        return rows
    first = next(id for id in rows if id in wrong)
    what = f"{len(wrong):,} of {len(rows):,} ids are not names of images, such as {first!r}"
    hint = f"Write {plain[first]!r}: an id has neither the folder nor the ending of its image."
    listing.fatal.append(Problem(what, file, rows[first][0], hint=hint))
    return {plain[id] if id in wrong else id: row for id, row in rows.items()}


def _plain(id: str) -> str:
    return _stem(re.split(r"[\\/]", id)[-1])


def _stem(id: str) -> str:
    stem, ending = os.path.splitext(id)
    return stem if ending.lower() in IMAGE_SUFFIXES else id
