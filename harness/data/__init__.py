"""Data sets: readers, checks, images, the made-up set, statistics."""

from harness.data.checks import MEND, QUICK_IMAGES, check, examine, load, unchecked
from harness.data.readers import Dataset, Example

__all__ = ["MEND", "QUICK_IMAGES", "Dataset", "Example", "check", "examine", "load", "unchecked"]
