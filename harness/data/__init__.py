"""Data sets: editions, readers, checks, images, the made-up set, statistics."""

from harness.data.checks import QUICK_IMAGES, check, load, unchecked
from harness.data.editions import EDITIONS, Edition
from harness.data.readers import Dataset, Example

__all__ = ["EDITIONS", "QUICK_IMAGES", "Dataset", "Edition", "Example", "check", "load", "unchecked"]
