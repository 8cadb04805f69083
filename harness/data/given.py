"""Images that a user names, as files and folders: their ids, and for each one what can be read."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.data import dicom
from harness.data.files import read
from harness.data.folders import IMAGE_SUFFIXES, ODD_SUFFIXES
from harness.data.images import DAMAGE, Progress, damage, decode, each, treatment
from harness.errors import Problem, UserError

_KINDS = "PNG, JPEG, TIFF, GIF, BMP, WebP, JPEG 2000 and DICOM"
_SUFFIXES = (*IMAGE_SUFFIXES, *ODD_SUFFIXES)


@dataclass(frozen=True)
class Given:
    """One image: `file` as the user named it, and `image`, a file with the same picture that PIL reads.

    `note` says what was done to a picture that is more than a plain image.
    """

    id: str
    file: Path
    image: Path
    note: str = ""


@dataclass(frozen=True)
class Found:
    """The readable images, the problems of the others, and remarks on what was left out or renamed."""

    images: list[Given]
    problems: list[Problem]
    remarks: list[str]


def look(paths: Sequence[Path], converted: Path, progress: Progress | None = None) -> Found:
    """The images in these files and folders; folders are searched with all their folders.

    Each image is decoded once. DICOM files become PNG files in the folder `converted`. An id is the name of a
    file without its suffix; if two images share one, all ids are paths below the folder that holds all
    images. Raises `UserError` if a path does not exist, or if no image can be read.
    """
    if missing := [Problem("no such file or folder", path) for path in paths if not path.exists()]:
        raise UserError(missing)
    files, others = _listed(paths)
    remarks = []
    if others:
        shown = ", ".join(path.name for path in others[:3]) + (", ..." if len(others) > 3 else "")
        remarks.append(f"no images, so left out ({len(others):,}): {shown}")
    ids = [file.stem for file in files]
    if twice := [id for id, count in Counter(ids).items() if count > 1]:
        top = Path(os.path.commonpath([file.absolute().parent for file in files]))
        ids = [file.absolute().relative_to(top).as_posix() for file in files]
        remarks.append(f"ids are paths, because several images have the same name, such as {twice[0]}")

    def one(numbered: tuple[int, str, Path]) -> Given | Problem:
        number, id, file = numbered
        return _looked(Given(id, file, file), converted / f"{number}.png")

    numbered = [(number, id, file) for number, (id, file) in enumerate(zip(ids, files, strict=True))]
    looked = list(each(one, numbered, progress=progress))
    images = [item for item in looked if isinstance(item, Given)]
    problems = [item for item in looked if isinstance(item, Problem)]
    if not images:
        where = ", ".join(map(str, paths))
        nothing = [Problem(f"no image in {where}; {_KINDS} are read")]
        raise UserError(problems or nothing)
    return Found(images, problems, remarks)


def _listed(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The images among files and in folders, and the other files in folders; each file once."""
    files: dict[Path, Path] = {}
    others = []
    for path in paths:
        if not path.is_dir():
            files.setdefault(path.resolve(), path)
            continue
        for file in _below(path):
            if file.name.lower().endswith(_SUFFIXES) or dicom.is_dicom(file):
                files.setdefault(file.resolve(), file)
            else:
                others.append(file)
    return list(files.values()), others


def _below(folder: Path) -> Iterator[Path]:
    """The files in a folder and its folders, in the order of names, without hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _looked(given: Given, converted: Path) -> Given | Problem:
    """The image if it can be read, else what is wrong with it."""
    try:
        if dicom.is_dicom(given.file):
            return replace(given, image=converted, note=dicom.convert(given.file, converted))
    except dicom.Unreadable as error:
        return Problem(str(error), given.file)
    try:
        content = read(given.file)
        decode(content)
        note = ", ".join(treatment(content))
    except DAMAGE as error:
        return Problem(damage(error), given.file)
    return replace(given, note=note)
