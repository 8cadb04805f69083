"""Data sets: editions, readers, checks, images, the made-up set, statistics."""

from harness.data.editions import EDITIONS, Edition

__all__ = ["EDITIONS", "Edition"]
