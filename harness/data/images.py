"""Pixels: decoded as radiology needs it, resized as LAVIS evaluates, and each image only once."""

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from harness.data.readers import Example
from harness.errors import Problem, UserError
from harness.store import fingerprint

Progress = Callable[[int, int], None]
In, Out = TypeVar("In"), TypeVar("Out")
_CACHE_FORMAT = 1  # raise it when decode or resize give other pixels


def decode(source: Path | bytes) -> Image.Image:
    """The RGB image in a file or its bytes.

    16-bit, 32-bit and float grey images are windowed to 8 bits from their least to their greatest value
    (PIL's own conversion saturates them to white). Transparency is laid over black. EXIF orientation is left
    alone. Raises one of `DAMAGE` where the file is not a whole image.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        image.load()
        if image.mode == "F" or image.mode.startswith("I"):
            return _window(np.asarray(image, dtype=np.float64)).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
            return Image.alpha_composite(black, rgba).convert("RGB")
        return image.convert("RGB")


DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What PIL raises on truncated, foreign and absurd files."""


def _window(grey: np.ndarray) -> Image.Image:
    finite = np.isfinite(grey)
    if not finite.any():
        raise ValueError("holds no finite grey value")
    low, high = grey[finite].min(), grey[finite].max()
    scaled = (np.where(finite, grey, low) - low) / max(high - low, np.finfo(float).tiny)
    return Image.fromarray(np.round(scaled * 255).astype(np.uint8))


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Squash an RGB image to a square with PIL's bicubic filter, as in LAVIS: uint8 (size, size, 3)."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def open_pixels(
    examples: Sequence[Example],
    size: int,
    cache: Path | None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """The resized images of `examples`, by an index -> uint8 (H, W, 3) or an array of them -> (N, H, W, 3).

    With `cache` (a folder) they are decoded once, in parallel, into the memory-mapped
    `pixels-<fingerprint>.npy`; a second process that wants it waits for the first. Without, each is decoded
    whenever it is asked for. Raises `UserError` where an image is damaged or the disk too full.
    """
    paths = [example.image for example in examples]
    if cache is None or not paths:
        return Decoded(paths, size)
    from filelock import FileLock

    file = cache / f"pixels-{_name(paths, size)}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                _build(file, paths, size, workers, progress)
    return np.load(file, mmap_mode="r")


class Decoded:
    """Images that are decoded and resized whenever they are asked for."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths = paths
        self.shape = (len(paths), size, size, 3)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> np.ndarray:
        if np.ndim(index) == 0:
            return _pixels(self.paths[index], self.shape[1])
        pixels = [_pixels(self.paths[i], self.shape[1]) for i in index]
        return np.stack(pixels) if pixels else np.empty((0, *self.shape[1:]), np.uint8)


def _pixels(path: Path, size: int) -> np.ndarray:
    try:
        return resize(decode(path), size)
    except DAMAGE as error:
        hint = "All of them: python -m harness data check"
        raise UserError([Problem(f"not a whole image: {error}", path, hint=hint)]) from None


def _name(paths: Iterable[Path], size: int) -> str:
    """Names the cache file by what decides its pixels, without opening an image."""
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {size}".encode())
    for path in paths:
        status = path.stat()
        digest.update(f"\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return fingerprint(digest.hexdigest())


def _build(
    file: Path, paths: Sequence[Path], size: int, workers: int | None, progress: Progress | None
) -> None:
    shape = (len(paths), size, size, 3)
    need, free = int(np.prod(shape)), shutil.disk_usage(file.parent).free
    if need > free:  # a full disk would kill the process in the middle of a memory-mapped write
        raise UserError(
            [
                Problem(
                    f"the decoded images need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                    file.parent,
                    key="data.cache",
                    hint="Free some, or decode anew in every epoch: --set data.cache=false",
                )
            ]
        )
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        squeezed = each(lambda path: _pixels(path, size), paths, workers, progress)
        for row, image in zip(pixels, squeezed, strict=True):
            row[:] = image
        pixels.flush()
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def each(
    function: Callable[[In], Out],
    items: Sequence[In],
    workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Out]:
    """`function` of every item, in order, by threads: PIL lets go of the interpreter while it decodes."""
    with ThreadPoolExecutor(workers or _cores()) as pool:
        try:
            for done, result in enumerate(pool.map(function, items), 1):
                if progress:
                    progress(done, len(items))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
