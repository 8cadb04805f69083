"""Rows of a data set that have concepts and nothing else of interest."""

from pathlib import Path

from harness.data.listing import Example


def rows(*lists: str) -> list[Example]:
    """Examples with these concepts, each list as `C1 C2`."""
    return [Example(str(n), Path(f"{n}.jpg"), "x", tuple(cuis.split()), n) for n, cuis in enumerate(lists)]
