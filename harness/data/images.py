"""Pixels: decodes images for radiology, resizes them as LAVIS does in evaluation, each image only once."""

import contextlib
import errno
import hashlib
import io
import logging
import os
import re
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from harness.data.files import read
from harness.data.listing import Example
from harness.errors import Problem, UserError
from harness.machine.device import cores
from harness.store import fingerprint, free, gb

Progress = Callable[[int, int], None]
In, Out = TypeVar("In"), TypeVar("Out")
_CACHE_FORMAT = 1  # raise it when the pixels from decode or resize change
_AHEAD = 4  # items per thread


# PIL warns of odd but whole files; `damage` reports those that are too large
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM")
"""Formats that are read, whatever the suffix. For some others PIL runs programs, e.g. Ghostscript for EPS."""


def decode(source: Path | bytes) -> Image.Image:
    """The RGB image in a file or its bytes.

    16-bit, 32-bit and float grey images are windowed to 8 bits from their smallest to their largest value;
    PIL's own conversion would saturate them to white. Transparent pixels are blended with black. EXIF
    orientation is ignored. Raises one of `DAMAGE` if the file is not a whole image; see `damage`.
    """
    with open_image(source) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            grey = window(np.asarray(image, dtype=np.float64))
            return Image.fromarray(np.round(grey * 255).astype(np.uint8)).convert("RGB")
        if _has_alpha(image):
            rgba = image.convert("RGBA")
            black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
            return Image.alpha_composite(black, rgba).convert("RGB")
        return image.convert("RGB")


def open_image(source: Path | bytes) -> Image.Image:
    """The whole image in a file or its bytes, as PIL reads it; raises only the types in `DAMAGE`."""
    content = source if isinstance(source, bytes) else read(source)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        image.load()
    except DAMAGE:
        raise
    except Exception as error:  # on strange files PIL's readers raise any kind of error
        raise ValueError(str(error) or type(error).__name__) from error
    return image


def treatment(content: bytes) -> list[str]:
    """What `decode` does to a file that is more than one plain picture, in words.

    Raises `ValueError` if the file ends before its last picture.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            done = [f"the first of {count} frames"] if (count := getattr(image, "n_frames", 1)) > 1 else []
            image.seek(0)
            if image.mode == "F" or image.mode.startswith("I"):
                return [*done, "grey values of more than 8 bits: from smallest to largest value"]
            if _has_alpha(image) and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                return [*done, "transparent pixels on black"]
            return done
    except Exception as error:  # on strange files PIL's readers raise any kind of error
        raise ValueError(str(error) or type(error).__name__) from error


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""The errors for paths that are not files, and PIL's errors for truncated, foreign and absurd files."""


def damage(error: Exception) -> str:
    """The message for one of `DAMAGE`."""
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        got = f"{int(pixels[0]) / 1e6:.0f}" if pixels else "more"
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6  # above this PIL refuses
        return f"too large: {got} megapixels; {limit:.0f} are allowed. Make it smaller"
    if isinstance(error, OSError) and error.errno is not None:
        return f"can't be read: {error.strerror}"
    return f"not a whole image: {str(error).partition(' <')[0]}"


def window(grey: np.ndarray) -> np.ndarray:
    """Grey values as 0 to 1, from the smallest to the largest finite one; others become 0.

    Raises `ValueError` if none is finite.
    """
    finite = np.isfinite(grey)
    if not finite.any():
        raise ValueError("holds no finite grey value")
    low, high = grey[finite].min(), grey[finite].max()
    return (np.where(finite, grey, low) - low) / max(high - low, np.finfo(float).tiny)


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
    """The resized images of `examples`: an index gives uint8 (H, W, 3), an array of indices (N, H, W, 3).

    With `cache` (a folder) they are decoded once, in parallel, into the memory-mapped
    `pixels-<fingerprint>.npy`, which ends with a CRC-32 of each image. A second process that needs the file
    waits for the first. A file that is cut short is built again, and an image with a wrong CRC-32 is decoded
    again. Without `cache` an image is decoded each time. Raises `UserError` if an image is damaged or the
    disk too full.
    """
    paths = [example.image for example in examples]
    if cache is None or not paths:
        return Decoded(paths, size)
    from filelock import FileLock

    file = _file(cache, paths, size)
    pixels = _cached(file, paths, size)
    if pixels is None:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        with FileLock(file.with_suffix(".lock")):
            pixels = _cached(file, paths, size)
            if pixels is None:
                if not _add_sums(file, (len(paths), size, size, 3)):
                    _build(file, paths, size, workers, progress)
                pixels = _cached(file, paths, size)
    return pixels


def unbuilt(examples: Sequence[Example], size: int, cache: Path) -> int:
    """Bytes that `open_pixels` still has to write into `cache` for these images; 0 if they are there."""
    paths = [example.image for example in examples]
    shape = (len(paths), size, size, 3)
    file = _file(cache, paths, size) if paths else cache
    built = not paths or any(_mapped(file, shape, sums) is not None for sums in (True, False))
    return 0 if built else int(np.prod(shape))


class Cached:
    """Images of a memory-mapped cache file; each is compared with its checksum when first read."""

    def __init__(self, pixels: np.ndarray, sums: np.ndarray, file: Path, paths: Sequence[Path]) -> None:
        self.pixels, self.sums, self.file, self.paths = pixels, sums, file, paths
        self.shape = pixels.shape
        self.checked = np.zeros(len(paths), bool)
        self.apart: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> np.ndarray:
        wanted = np.arange(len(self.paths))[index]
        for i in np.atleast_1d(wanted):
            if not self.checked[i] and zlib.crc32(self.pixels[i]) != self.sums[i]:
                self._decode_again(int(i))
            self.checked[i] = True
        found = self.pixels[index]
        if self.apart and (places := np.isin(wanted, list(self.apart))).any():
            found = np.array(found)
            for place in np.argwhere(places):
                found[tuple(place)] = self.apart[int(wanted[tuple(place)])]
        return found

    def _decode_again(self, i: int) -> None:
        """Write an image to its place in the file, or keep it in memory if the file can't be written."""
        image = _pixels(self.paths[i], self.shape[1])
        try:
            with self.file.open("r+b") as file:
                file.seek(len(_header(self.shape)) + i * image.nbytes)
                file.write(image)
                file.seek(len(_header(self.shape)) + len(self.paths) * image.nbytes + 4 * i)
                file.write(np.array(zlib.crc32(image), "<u4"))
        except OSError:
            self.apart[i] = image


class Decoded:
    """Images that are decoded and resized each time they are read."""

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


class Whole:
    """Images in their own shapes, decoded each time they are read; an array of indices gives a list.

    An image whose longer side has more than `size` pixels is shrunk to it.
    """

    def __init__(self, examples: Sequence[Example], size: int) -> None:
        self.paths, self.size = [example.image for example in examples], size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if np.ndim(index) == 0:
            return _pixels(self.paths[index], self.size, shrink)
        return [_pixels(self.paths[i], self.size, shrink) for i in index]


def shrink(image: Image.Image, size: int) -> np.ndarray:
    """An RGB image with its longer side at most `size` pixels, in its shape: uint8 (H, W, 3)."""
    longest = max(image.size)
    if longest > size:
        sides = [max(1, round(side * size / longest)) for side in image.size]
        image = image.resize(sides, Image.Resampling.BICUBIC)
    return np.array(image)


def _pixels(path: Path, size: int, fit: Callable[[Image.Image, int], np.ndarray] = resize) -> np.ndarray:
    try:
        return fit(decode(path), size)
    except DAMAGE as error:
        hint = "All of them: harness data check FOLDER"
        raise UserError([Problem(damage(error), path, hint=hint)]) from None


def _file(cache: Path, paths: Iterable[Path], size: int) -> Path:
    """The cache file, named by what determines its pixels; found without opening an image."""
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {size}".encode())
    folders: dict[Path, Path] = {}  # resolving each image alone would take most of the time
    for path in paths:
        status = path.stat()
        folder = folders.get(path.parent) or folders.setdefault(path.parent, path.parent.resolve())
        digest.update(f"\0{folder / path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return cache / f"pixels-{fingerprint(digest.hexdigest())}.npy"


def _sweep(cache: Path) -> None:
    """Delete the incomplete files of killed processes; a process that still builds holds its lock."""
    from filelock import FileLock, Timeout

    for stray in cache.glob("pixels-*.tmp"):
        with contextlib.suppress(Timeout), FileLock(stray.with_suffix(".lock"), timeout=0):
            stray.unlink(missing_ok=True)


def _build(
    file: Path, paths: Sequence[Path], size: int, workers: int | None, progress: Progress | None
) -> None:
    need = len(paths) * size * size * 3
    if need > free(file.parent):
        raise UserError([_too_full(file.parent, need)])
    squeezed = each(lambda path: _pixels(path, size), paths, workers, progress)
    try:
        _write(file, (len(paths), size, size, 3), squeezed)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError([_too_full(file.parent, need)]) from None


def _cached(file: Path, paths: Sequence[Path], size: int) -> Cached | None:
    """The images of a cache file; None if it is absent or not complete with its checksums."""
    pixels = _mapped(file, (len(paths), size, size, 3), sums=True)
    return None if pixels is None else Cached(pixels, _sums(file, len(paths)), file, paths)


def _mapped(file: Path, shape: tuple[int, ...], sums: bool) -> np.ndarray | None:
    """The memory-mapped pixels of a file of exactly that shape, with or without checksums at its end."""
    header = _header(shape)
    bytes_wanted = len(header) + int(np.prod(shape)) + (4 * shape[0] if sums else 0)
    if not file.is_file() or file.stat().st_size != bytes_wanted:
        return None
    with file.open("rb") as content:
        whole = content.read(len(header)) == header
    return np.memmap(file, np.uint8, "r", len(header), shape) if whole else None


def _sums(file: Path, count: int) -> np.ndarray:
    return np.fromfile(file, "<u4", offset=file.stat().st_size - 4 * count)


def _add_sums(file: Path, shape: tuple[int, ...]) -> bool:
    """Add checksums to a complete cache file of an earlier version; False for other files."""
    pixels = _mapped(file, shape, sums=False)
    if pixels is not None:
        sums = np.array([zlib.crc32(image) for image in pixels], "<u4")
        with file.open("ab") as content:
            content.write(sums)
    return pixels is not None


def _header(shape: tuple[int, ...]) -> bytes:
    """The header of an .npy file of uint8 images."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _write(file: Path, shape: tuple[int, ...], images: Iterable[np.ndarray]) -> None:
    """Write uint8 images as an .npy file, with their checksums at the end.

    It does not write through a memory map, since a full disk would then kill the process.
    """
    temporary, sums = file.with_suffix(".tmp"), []
    try:
        with temporary.open("w+b") as out:
            out.write(_header(shape))
            if hasattr(os, "posix_fallocate"):  # reserve all the space before hours of decoding
                os.posix_fallocate(out.fileno(), 0, out.tell() + int(np.prod(shape)) + 4 * shape[0])
            for image in images:
                out.write(image)
                sums.append(zlib.crc32(image))
            out.write(np.array(sums, "<u4"))
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _too_full(folder: Path, need: int) -> Problem:
    return Problem(
        f"the decoded images need {gb(need)}, {gb(free(folder))} are free",
        folder,
        key="data.cache",
        hint="Free some space, or decode again in every epoch: --set data.cache=false",
    )


def each(
    function: Callable[[In], Out],
    items: Sequence[In],
    workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Out]:
    """`function` of every item, in order, computed by threads: PIL releases the interpreter while it decodes.

    The threads run only a few items ahead of the caller, so results do not fill the memory.
    """
    workers = workers or cores()
    rest = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        try:
            waiting = deque(pool.submit(function, item) for item in islice(rest, _AHEAD * workers))
            for done in range(1, len(items) + 1):
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
                if progress:
                    progress(done, len(items))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
