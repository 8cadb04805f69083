"""How many images are decoded together."""

from bisect import bisect
from collections.abc import Iterator, Sequence

from harness.config.sections import AUTO, PredictConfig
from harness.machine import device

FIRST = 16
"""Images of the first batch of `auto`, and of every batch on a CPU."""
_ROWS = 512  # more rows than this do not read the weights any better
_SHARE = 0.8  # of the free memory; the rest is for fragments


def slices(
    count: int, config: PredictConfig, kind: device.Kind, breaks: Sequence[int] = ()
) -> Iterator[slice]:
    """The batches of `count` images; the next one is asked for when one is decoded.

    A batch ends at each of `breaks`, which are in order. `auto` measures the memory of the first batch on an
    accelerator, and then takes a power of two.
    """
    size, start, ends = config.batch_size, 0, [*breaks, count]
    if size == AUTO:
        size = FIRST
        if kind != "cpu" and count > size:
            memory = device.module(kind)
            memory.reset_peak_memory_stats()
            held = memory.memory_allocated()
            start = min(size, ends[0])
            yield slice(0, start)
            used = memory.max_memory_allocated() - held
            free = memory.mem_get_info()[0] + memory.memory_reserved() - memory.memory_allocated()
            size = fitting(used / start, free, config.rows)
    while start < count:
        first, start = start, min(start + size, ends[bisect(ends, start)])
        yield slice(first, start)


def fitting(image: float, free: float, rows: int) -> int:
    """The largest power of two of images of so many bytes that fit into `free` bytes; at least `FIRST`.

    `rows` are the captions of an image that grow at the same time.
    """
    size = FIRST
    while 2 * size * rows <= _ROWS and 2 * size * image <= _SHARE * free:
        size *= 2
    return size
