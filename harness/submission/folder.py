"""Replaces files of a folder together or not at all."""

import contextlib
import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import psutil

from harness import store

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def replace(folder: Path, files: Mapping[str, bytes | str], earlier: Collection[str]) -> None:
    """Replace the files named `earlier` in a folder by `files`; other files stay.

    The files are written to a hidden folder next to it, and the two folders change places in one step. A
    process that is killed leaves either the old or the new files. Raises `OSError` if nothing can be written.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(folder))
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        _clear(folder)
        stage.mkdir()
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in earlier:
                _copy(path, stage / path.name)
        for name, content in files.items():
            store.write(stage / name, content)
        _swap(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Delete the temporary folders of killed processes."""
    for stray in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        process = stray.name.split(".")[-2]
        if not process.isdecimal() or int(process) == os.getpid() or not psutil.pid_exists(int(process)):
            shutil.rmtree(stray, ignore_errors=True)


def _copy(path: Path, to: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, to, symlinks=True)
    else:
        shutil.copy2(path, to, follow_symlinks=False)


def _swap(new: Path, old: Path) -> None:
    with contextlib.suppress(OSError):
        new.rename(old)  # works if `old` does not exist or is empty
        return
    if _exchanged(new, old):
        return
    # this file system can't exchange folders: for a moment only the old one exists, under this name
    aside = old.with_name(f".{old.name}.{os.getpid()}.old")
    old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside)


def _exchanged(one: Path, two: Path) -> bool:
    """Exchange two folders in one step; whether that worked. Linux can do it on most file systems."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(two), _EXCHANGE) == 0
