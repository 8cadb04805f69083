"""Data sets: editions, readers, checks, images, the made-up set, statistics."""

from harness.data.checks import check, load
from harness.data.editions import EDITIONS, Edition
from harness.data.readers import Dataset, Example

__all__ = ["EDITIONS", "Dataset", "Edition", "Example", "check", "load"]
