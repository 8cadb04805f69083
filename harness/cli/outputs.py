"""Whether the files and folders that a command is to write can be written, found before its work."""

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import Problem, UserError

_HINT = "Give the name of a new file."


def check(outputs: Mapping[str, Path | None], read: Sequence[Path]) -> None:
    """Raise `UserError` with the `problems` of these outputs."""
    if found := problems(outputs, read):
        raise UserError(found)


def check_folder(folder: Path, key: str, renamed: bool = False) -> None:
    """Raise `UserError` if a new folder can't be made, or if no file can be written into an existing one.

    `renamed`: the command writes beside the folder and then renames what it wrote.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(folder.stat().st_mode):
                return  # commands have their own words for a file in its place
        _try(folder if renamed else folder / "file")
    except OSError as error:
        what = f"can't be written: {error.strerror}: {folder}"
        raise UserError([Problem(what, key=key, hint="Give the name of a new folder.")]) from None


def problems(outputs: Mapping[str, Path | None], read: Sequence[Path]) -> list[Problem]:
    """What is wrong with the files to write, by option; none of them may be one of those to `read`."""
    found, first = [], {}
    for key, path in outputs.items():
        if path is None:
            continue
        other = first.setdefault(path.resolve(), key)
        what = f"is the same file as {other}: {path}" if other != key else _unwritable(path, read)
        found += [Problem(what, key=key, hint=_HINT)] if what else []
    return found


def _unwritable(path: Path, read: Sequence[Path]) -> str | None:
    try:
        if path.is_dir():
            return f"is a folder: {path}"
        if path.exists() and any(file.exists() and path.samefile(file) for file in read):
            return f"would overwrite an input: {path}"
        if path.exists() and not path.is_file():
            return f"is not a regular file: {path}"
        _try(path)
    except OSError as error:
        return f"can't be written: {error.strerror}: {path}"
    return None


def _try(path: Path) -> None:
    new = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    # the file is written under this name first, and this name is longer
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    finally:
        with contextlib.suppress(OSError):  # some may not exist
            for folder in new:  # a command that fails later leaves no folders
                folder.rmdir()
