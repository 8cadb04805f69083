"""Folders of images: which file is the image of which id, and why an id has none."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from harness.data.files import other_than_file, why

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
ODD_SUFFIXES = (
    *(".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".jpe", ".jfif", ".heic", ".ppm", ".pgm"),
    *(".dcm", ".dicom", ".nii", ".nii.gz"),
)
"""Suffixes of image formats that data sets do not have; as images of a data set they are not read."""
KEEP_ONE = "Keep one image of each id."
_NAMED = 3


class File(NamedTuple):
    """An image as its folder lists it; `name` is its path below the data set's root."""

    path: Path
    name: str
    size: int
    mtime_ns: int


@dataclass
class Images:
    """The contents of the folders of one split; `folder` is the first one that holds images."""

    folder: Path
    files: dict[str, File] = field(default_factory=dict)
    """The image of each id that has exactly one."""
    rivals: dict[str, list[str]] = field(default_factory=dict)
    """The names of all images of each id that has several; two names of one file are one image."""
    odd: dict[str, str] = field(default_factory=dict)
    """By id: why something with the name of an image is not a file."""
    others: list[str] = field(default_factory=list)
    """The names of all other files."""

    @property
    def ids(self) -> list[str]:
        """The ids of all images, readable or not, in order."""
        foreign = {bare for name in self.others if (bare := _without_foreign(name))}
        return sorted({*self.files, *self.rivals, *self.odd, *foreign})

    def __contains__(self, id: str) -> bool:
        return id in self.files or id in self.rivals or id in self.odd or id in self._near

    def instead(self, id: str) -> str | None:
        """What the folders have instead of the image of an id, in words; None if nothing."""
        if id in self.odd:
            return self.odd[id]
        if _is_image(id) and (stem := os.path.splitext(id)[0]) in self.files:
            return f"found {self.files[stem].path.name}: leave the ending out of the id"
        near = self._near.get(id) or self._near.get(_folded(id))
        if near is None:
            return None
        if _without_foreign(near):
            return f"found {near}, which is not read: convert it to PNG or JPEG"
        return f"found {near!a}: rename it"

    @cached_property
    def _near(self) -> dict[str, str]:
        """Names of files that may be a missing image, by the id that they may be meant for."""
        near: dict[str, str] = {}
        for name in self.others:
            near |= {
                name[:at]: name for at in range(1, len(name)) if name[at] == "." and name[:at] not in near
            }
        for id in [*self.files, *self.odd]:
            near.setdefault(_folded(id), self.files[id].path.name if id in self.files else id)
        return near

    def ambiguous(self, ids: Iterable[str]) -> str | None:
        """Which of these ids have more than one image, in words."""
        found = [id for id in ids if id in self.rivals]
        if not found:
            return None
        named = "; ".join(f"{id}: {', '.join(self.rivals[id])}" for id in found[:_NAMED])
        more = f"; and {len(found) - _NAMED:,} more ids" if len(found) > _NAMED else ""
        return f"more than one image of an id: {named}{more}"


def of_split(root: Path, split: str) -> Images | None:
    """The images of a split in all folders that may belong to it; None if there are none."""
    return scan([folder for folder in folders(root, split) if folder.is_dir()], root)


def folders(root: Path, split: str) -> list[Path]:
    """Folders in which users may have unpacked a split's images, nested archives included."""
    outer = dict.fromkeys([root / split, *sorted(root.glob(f"*{split}_images")), root / "images" / split])
    inner = [base / name for base in outer for name in (split, f"{split}_images", "images")]
    return [*outer, *inner]


def deeper(root: Path, split: str) -> tuple[Path, int] | None:
    """The first folder with images below those of a split, and their number; None if there is none."""
    for place in folders(root, split):
        if not place.is_dir():
            continue
        for folder in sorted(path for path in place.rglob("*") if path.is_dir()):
            if count := sum(_is_image(entry.name) for entry in _entries(folder)):
                return folder, count
    return None


def scan(places: Sequence[Path], root: Path) -> Images | None:
    """The images in these folders, with names relative to `root`; None if there are none."""
    images, entries = None, [(place, list(_entries(place))) for place in places]
    for place, found in entries:
        if images is None and any(_is_image(entry.name) for entry in found):
            images = Images(place)
    if images is None:
        return None
    candidates: dict[str, list[str]] = {}
    composed: dict[str, set[str]] = {}
    for place, found in entries:
        below = os.path.relpath(place, root)
        below = "" if below == "." else f"{below}/"
        for entry in found:
            if not _is_image(entry.name):
                images.others.append(entry.name)
                continue
            id = os.path.splitext(entry.name)[0]
            _add(images, id, entry, place, f"{below}{entry.name}", candidates)
            if not id.isascii():
                composed.setdefault(unicodedata.normalize("NFC", id), set()).add(id)
    for same in composed.values():  # names that look the same and differ in their bytes
        if len(same) > 1:
            names = [name for id in sorted(same) for name in candidates[id]]
            candidates |= dict.fromkeys(same, names)
    for id, names in candidates.items():
        if len(names) > 1:
            images.rivals[id] = [ascii(name)[1:-1] if not name.isascii() else name for name in sorted(names)]
            images.files.pop(id, None)
            images.odd.pop(id, None)
    return images


def foreign(root: Path, split: str) -> str | None:
    """The images of a split in formats that are not read, in words; None if there are none."""
    places = [folder for folder in folders(root, split) if folder.is_dir()]
    names = [entry.name for place in places for entry in _entries(place)]
    count = Counter(os.path.splitext(name)[1].lower() for name in names if _without_foreign(name))
    if not count:
        return None
    kinds = ", ".join(f"{n:,} of {suffix}" for suffix, n in count.most_common())
    return f"found {kinds}, which are not read: convert them to PNG or JPEG"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder in the order of names, without hidden files, which macOS archives add."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _without_foreign(name: str) -> str | None:
    """The id in the name of an image whose format is not read; None for other names."""
    suffix = next((suffix for suffix in ODD_SUFFIXES if name.lower().endswith(suffix)), None)
    return name[: -len(suffix)] if suffix else None


def _folded(id: str) -> str:
    return unicodedata.normalize("NFC", id).strip().casefold()


def _add(
    images: Images,
    id: str,
    entry: os.DirEntry[str],
    place: Path,
    name: str,
    candidates: dict[str, list[str]],
) -> None:
    """Add one image; a second name of the same file changes nothing."""
    path = place / entry.name
    try:
        status = entry.stat()
    except OSError as error:
        reason: str | None = f"{entry.name}: {why(path, error)}"
    else:
        what = other_than_file(status.st_mode)
        reason = f"{entry.name} is {what}, not a file" if what else None
    if reason is None and id in images.files and os.path.samefile(path, images.files[id].path):
        return
    candidates.setdefault(id, []).append(name)
    if reason:
        images.odd.setdefault(id, reason)
    else:
        images.files.setdefault(id, File(path, name, status.st_size, status.st_mtime_ns))
