"""What the metrics with a neural model share: finding and loading it, and batches that change no score."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from harness.errors import Problem
from harness.machine.device import out_of_memory
from harness.metrics.base import Absent
from harness.metrics.expected import quieten
from harness.models import checkpoints
from harness.models.checkpoints import Checkpoint
from harness.store import fingerprint

WIDTH_STEP = 8
CPU_BUDGET, DEVICE_BUDGET = 512, 8192
"""Tokens in a batch."""
WIDE = 1024
"""Tokens of a text whose attention takes memory by the gigabyte."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def by_length(
    compute: Callable[[list[int], int], Sequence[Result]],
    lengths: Sequence[int],
    limit: int | None,
    device: str,
    budget: int | None = None,
) -> list[Result]:
    """A result for each row of `lengths` tokens, which does not depend on the other rows.

    `compute` gets rows and the width to pad them to, and gives a result for each; see `batches`. On CPUs
    batches are computed side by side by one thread each: threads within one batch would wait for each other
    after every matrix product. Those wider than `WIDE` are computed one at a time, for the sake of memory.
    """
    todo = list(batches(lengths, limit, budget or (CPU_BUDGET if device == "cpu" else DEVICE_BUDGET)))
    if device == "cpu":
        with one_thread() as threads:
            wide = sum(width > WIDE for _, width in todo)  # the first ones
            pool = ThreadPoolExecutor(threads)
            try:
                done = [compute(*batch) for batch in todo[:wide]]
                done += pool.map(lambda batch: compute(*batch), todo[wide:])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # an interrupted command waits for no batch
    else:  # and in this thread: in another, torch-npu takes device 0
        done = [compute(*batch) for batch in todo]
    found: list[Any] = [None] * len(lengths)
    for (rows, _), results in zip(todo, done, strict=True):
        for row, result in zip(rows, results, strict=True):
            found[row] = result
    return found


def batches(lengths: Sequence[int], limit: int | None, budget: int) -> Iterator[tuple[list[int], int]]:
    """Rows in batches and the width of each batch in tokens, the widest first.

    Kernels round otherwise for batches of another shape. So the width follows from a row's own length: the
    next multiple of `WIDTH_STEP`, at most `limit`. All batches of one width have as many rows as fit
    `budget` tokens; the last one is filled up by repeating its last row.
    """
    by_width: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        width = -(-length // WIDTH_STEP) * WIDTH_STEP
        by_width.setdefault(max(length, min(width, limit or width)), []).append(row)
    for width in sorted(by_width, reverse=True):
        yield from ((rows, width) for rows in filled(by_width[width], max(1, budget // width)))


def filled(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """The items in batches of exactly `size`; the last one is filled up by repeating its last item."""
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch + batch[-1:] * (size - len(batch))


def row_by_row(layer: Callable[[Any], Any], batch: Any) -> Any:
    """A small layer on each row (1, d) of a batch (n, d): its product rounds by the place in the batch."""
    import torch

    return torch.cat([layer(row) for row in batch.split(1)])


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """One thread a product, so that sums do not depend on how many there are; gives that number."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def at_hand(name: str, key: str) -> Checkpoint:
    """The checkpoint that the config names by `key`; raises `Absent` where it can't be loaded."""
    found = checkpoints.find(name)
    if wrong := lacking(name, key):
        raise Absent("; ".join(problem.what for problem in wrong))
    return found


def lacking(name: str, key: str) -> list[Problem]:
    """What keeps the checkpoint that the config names by `key` from being loaded."""
    found = checkpoints.find(name)
    return checkpoints.flaws(found, key) if found else [checkpoints.missing(name, key)]


def contents(name: str, cache: Path | None) -> list[list[str]] | None:
    """Names and hashes of the files of a checkpoint; None where it is not at hand."""
    found = checkpoints.find(name)
    return checkpoints.contents(found.folder, cache) if found else None


@contextlib.contextmanager
def loading(place: Path) -> Iterator[None]:
    """Turns whatever a library makes of damaged or foreign files into `Absent`, in one line."""
    quieten()
    try:
        yield
    except (Absent, MemoryError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        what = " ".join(str(error).split())[:300]
        raise Absent(f"{place} can't be loaded: {type(error).__name__}: {what}") from error


def last_kept(identify: Callable[[Path], Any]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Keeps the last model that a loader made, until other weights lie at its place; see `loading`.

    The loader's first argument is the place of the weights, and `identify` gives what tells their contents
    apart. `cache_clear` of the loader forgets the model.
    """

    def keeping(load: Callable[..., Result]) -> Callable[..., Result]:
        @functools.lru_cache(maxsize=1)
        def made(_: str, place: Path, *how: Any) -> Result:
            with loading(place):
                return load(place, *how)

        @functools.wraps(load)
        def kept(place: Path, *how: Any) -> Result:
            return made(fingerprint(identify(place)), place, *how)

        kept.cache_clear = made.cache_clear
        return kept

    return keeping


def files_of(folder: Path) -> list[list[str]]:
    """Names and hashes of the files of a checkpoint in a folder."""
    return checkpoints.contents(folder, None)


def loaded(model: Any, folder: Path, unused: str = "$^", **options: Any) -> Any:
    """A model of transformers with all its weights from a folder, in evaluation.

    Raises `Absent` where weights are lacking, which would be random, but for names that match `unused`.
    """
    made, info = model.from_pretrained(folder, output_loading_info=True, **options)
    lacking = sorted(name for name in info["missing_keys"] if not re.search(unused, name))
    if lacking:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise Absent(f"{folder} lacks {len(lacking)} weights of a {type(made).__name__}: {shown}")
    return made.eval()


def dtype(precision: str) -> Any:
    """The torch type of `score.precision`."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
