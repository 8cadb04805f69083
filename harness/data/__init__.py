"""Data sets: readers, checks, images, the made-up set, statistics."""

from harness.data.checks import QUICK_IMAGES, check, load, unchecked
from harness.data.readers import Dataset, Example

__all__ = ["QUICK_IMAGES", "Dataset", "Example", "check", "load", "unchecked"]
