"""Reads files from users, or says why not; a FIFO, device or link does not make it wait."""

import errno
import os
import stat
from pathlib import Path

LARGEST = 1 << 30  # bytes, several times the largest known label file or image
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read(path: Path, pipes: bool = False) -> bytes:
    """The bytes of a regular file or, with `pipes`, of a FIFO that has a writer.

    Raises `OSError` for everything else and above 1 GiB; its `strerror` is a message for the user.
    """
    try:
        _refuse(path, path.stat().st_mode, pipes)  # before opening, since opening a device can have effects
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            _refuse(path, mode, pipes)
            first = _first_of_pipe(path, file.fileno()) if stat.S_ISFIFO(mode) else b""
            data = first + file.read(LARGEST + 1)
    except OSError as error:
        raise OSError(error.errno, why(path, error), str(path)) from None
    if len(data) > LARGEST:
        raise OSError(errno.EFBIG, f"it is larger than {LARGEST >> 20} MB", str(path))
    return data


def other_than_file(mode: int) -> str | None:
    """What a path with this `st_mode` is, in words; None for a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a special file")


def why(path: Path | str, error: OSError) -> str:
    """Why a path can't be read, in words."""
    if error.errno == errno.ELOOP:
        return "it is a link that leads back to itself"
    if error.errno == errno.ENOENT and os.path.islink(path):
        return "it is a link to nothing"
    return error.strerror or str(error)


def _refuse(path: Path, mode: int, pipes: bool) -> None:
    what = other_than_file(mode)
    if what and not (pipes and stat.S_ISFIFO(mode)):
        raise OSError(errno.EINVAL, f"it is {what}, not a file", str(path))


def _first_of_pipe(path: Path, handle: int) -> bytes:
    """The first bytes of a FIFO that was opened without waiting; later reads wait for more."""
    try:
        first = os.read(handle, 1 << 16)
    except BlockingIOError:  # the writer has written nothing yet
        first = None
    if first == b"":
        raise OSError(errno.EINVAL, "it is a FIFO, and nothing writes to it", str(path))
    os.set_blocking(handle, True)
    return first or b""
