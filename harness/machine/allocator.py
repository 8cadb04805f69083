"""Whether freed memory goes back to the system at once, where glibc allocates it."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

LARGE = 200_000_000
"""Bytes of weights from which a training on a CPU returns freed memory; a smaller one would take longer."""
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_BLOCK = 1 << 20
_MOST = 32 << 20  # where glibc's own threshold rises to, as blocks of this size are freed


def returns(weights: float) -> bool:
    """Whether a training with this many bytes of weights returns freed memory on this machine's CPU."""
    return weights >= LARGE and platform.libc_ver()[0] == "glibc"


@contextlib.contextmanager
def returning(weights: float) -> Iterator[None]:
    """Return each freed block of 1 MB or more to the system, if `returns`; else change nothing.

    Without it glibc keeps freed blocks for later ones, and loses between them up to half of the memory.
    """
    if not returns(weights):
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _BLOCK)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _MOST)
