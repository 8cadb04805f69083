"""Data sets: readers, checks, images, the made-up set, statistics."""

from harness.data.checks import QUICK_IMAGES, REPAIR, check, examine, listed, load, unchecked
from harness.data.listing import Dataset, Example

__all__ = ["QUICK_IMAGES", "REPAIR", "Dataset", "Example", "check", "examine", "listed", "load", "unchecked"]
