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
from harness.models import checkpoints
from harness.models.checkpoints import Checkpoint
from harness.models.remarks import quieten
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
    """A result for each row of `lengths` tokens; it does not depend on the other rows.

    `compute` gets rows and the width to pad them to, and returns a result for each; see `batches`. On CPUs
    batches run in parallel with one thread each: threads within one batch would wait for each other after
    every matrix product. Batches wider than `WIDE` run one at a time to save memory.
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
                pool.shutdown(wait=False, cancel_futures=True)  # an interrupted command waits for none
    else:  # in this thread, since torch-npu would use device 0 in another one
        done = [compute(*batch) for batch in todo]
    found: list[Any] = [None] * len(lengths)
    for (rows, _), results in zip(todo, done, strict=True):
        for row, result in zip(rows, results, strict=True):
            found[row] = result
    return found


def batches(lengths: Sequence[int], limit: int | None, budget: int) -> Iterator[tuple[list[int], int]]:
    """Rows in batches, and the width of each batch in tokens, the widest first.

    Kernels round differently for batches of another shape. So the width depends on a row's own length only:
    the next multiple of `WIDTH_STEP`, at most `limit`. All batches of one width have the same number of rows:
    the most that fit `budget` tokens. The last batch is filled up by repeating its last row.
    """
    by_width: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_width.setdefault(padded(length, limit), []).append(row)
    for width in sorted(by_width, reverse=True):
        yield from ((rows, width) for rows in filled(by_width[width], max(1, budget // width)))


def padded(length: int, limit: int | None) -> int:
    """The width to which a text of this many tokens is padded."""
    width = -(-length // WIDTH_STEP) * WIDTH_STEP
    return max(length, min(width, limit or width))


def filled(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """The items in batches of exactly `size`; the last one is filled up by repeating its last item."""
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch + batch[-1:] * (size - len(batch))


def row_by_row(layer: Callable[[Any], Any], batch: Any) -> Any:
    """A small layer on each row (1, d) of a batch (n, d): in a batch, rounding depends on a row's place."""
    import torch

    return torch.cat([layer(row) for row in batch.split(1)])


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """Use one thread per product, so that sums do not depend on the thread count; yields that count."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def at_hand(name: str, key: str) -> Checkpoint:
    """The checkpoint `name`, given by `key` of the config; raises `Absent` if it can't be loaded."""
    found = checkpoints.find(name)
    if wrong := lacking(name, key):
        raise Absent("; ".join(problem.what for problem in wrong))
    return found


def lacking(name: str, key: str) -> list[Problem]:
    """Why the checkpoint `name`, given by `key` of the config, can't be loaded; empty if it can."""
    found = checkpoints.find(name)
    return checkpoints.flaws(found, key) if found else [checkpoints.missing(name, key)]


def contents(name: str, cache: Path | None) -> list[list[str]] | None:
    """Names and hashes of the files of a checkpoint; None if it is not on this machine."""
    found = checkpoints.find(name)
    return checkpoints.contents(found.folder, cache) if found else None


@contextlib.contextmanager
def loading(place: Path) -> Iterator[None]:
    """Turns any error of a library about damaged or foreign files into `Absent`, in one line."""
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
    """Keeps the last model of a loader in memory until its weights change on disk; see `loading`.

    The loader's first argument is the path of the weights. `identify` returns what identifies their contents.
    The loader's `cache_clear` forgets the model.
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
    """A transformers model in evaluation mode, with all its weights from a folder.

    Raises `Absent` if weights are missing, since they would be random; names that match `unused` may be.
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
