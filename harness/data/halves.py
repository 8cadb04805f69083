"""The two halves of a split: what is tuned on one half is reported on the other.

The half of an image depends on its id only, so all runs, studies and machines agree on it.
"""

from hashlib import sha256

TUNE, HELD = "tune", "held"
HALVES = (TUNE, HELD)
"""The half on which settings are chosen, and the half that is held back to report."""


def half(image: str) -> str:
    """The half of the image with this id, `tune` or `held`; each gets about half of all images."""
    return HALVES[sha256(image.encode("utf-8", "surrogatepass")).digest()[0] % 2]
