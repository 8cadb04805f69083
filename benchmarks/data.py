"""How fast a training step gets images from epoch 2 on, compared with decoding them in every epoch.

    python benchmarks/data.py

Draws 300 JPEGs of about 120 KB. One way is PIL's decode and bicubic resize, the other is reading rows of the
memory-mapped cache. Both run on one core and give normalised batches of 16, in a new random order each epoch,
without augmentation. Epochs of both ways alternate, and each figure is a median. `by its own time` counts
only the time of this process. A set this small stays in memory; `from the disk` drops both the JPEGs and the
cache from memory before every epoch.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness.data.images import open_pixels
from harness.data.listing import Example
from harness.models.blip2.loading import CLIP_MEAN, CLIP_STD
from harness.models.loading import Loaded

COUNT, BATCH, EPOCHS = 300, 16, 5


def draw(folder: Path) -> list[Path]:
    """Grey images of the size of published radiographs: soft shapes with scanner noise."""
    random = np.random.default_rng(0)
    paths = []
    for number in range(COUNT):
        width, height = random.integers(550, 900, 2).tolist()
        shapes = random.integers(0, 200, (12, 12), np.uint8)
        soft = np.asarray(Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC), float)
        grey = np.clip(soft + random.normal(0, 7, soft.shape), 0, 255).astype(np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(grey).convert("RGB").save(path, quality=85)
        paths.append(path)
    return paths


def batches(random: np.random.Generator) -> Iterator[np.ndarray]:
    """The images of each batch of an epoch."""
    order = random.permutation(COUNT)
    return (order[start : start + BATCH] for start in range(0, COUNT, BATCH))


def decoded(paths: list[Path], size: int, indices: Iterable[int]) -> torch.Tensor:
    """A batch decoded by PIL alone: uint8 (B, S, S, 3)."""
    images = []
    for i in indices:
        with Image.open(paths[i]) as image:
            square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            images.append(np.asarray(square))
    return torch.from_numpy(np.stack(images))


def cached(pixels: np.ndarray, indices: np.ndarray) -> torch.Tensor:
    """A batch as training collates it: uint8 (B, S, S, 3)."""
    return torch.from_numpy(np.ascontiguousarray(pixels[indices]))


def rates(batch: Callable[[np.ndarray], torch.Tensor], random: np.random.Generator) -> tuple[float, float]:
    """Normalised images per second over one epoch: by the clock, and by this process's CPU time."""
    units = Loaded(None, None, None, CLIP_MEAN, CLIP_STD)
    begun, worked = time.perf_counter(), time.process_time()
    for indices in batches(random):
        units.normalise(batch(indices))
    return COUNT / (time.perf_counter() - begun), COUNT / (time.process_time() - worked)


def forget(files: Iterable[Path]) -> None:
    """Drop files from the system's page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_from_disk() -> int:
    """Bytes that this process has read from disks so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def compare(paths: list[Path], size: int, cache: Path, warm: bool) -> None:
    """Print images per second of both ways, and their ratio."""
    random = np.random.default_rng(1)
    examples = [Example(path.stem, path, None, (), None) for path in paths]
    (file,) = cache.glob("*.npy")
    pil, ours = [], []
    before = read_from_disk()
    for _ in range(EPOCHS):
        if not warm:
            forget(paths)
        pil.append(rates(lambda indices: decoded(paths, size, indices), random))
        if not warm:
            forget([file])
        pixels = open_pixels(examples, size, cache)  # again, since mapped pages can't be dropped
        ours.append(rates(lambda indices, pixels=pixels: cached(pixels, indices), random))
        del pixels
    read = (read_from_disk() - before) / EPOCHS / 1e6
    print(f"  {size} px, " + ("from memory" if warm else f"from the disk ({read:.0f} MB an epoch)"))
    for column, name in enumerate(("by the clock", "by its own time")):
        slow, fast = (statistics.median(row[column] for row in rows) for rows in (pil, ours))
        print(f"    {name:16} PIL {slow:5.0f}   cache {fast:5.0f} images/s   {fast / slow:5.1f} x")


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=".") as place:
        paths = draw(Path(place))
        kilobytes = sum(path.stat().st_size for path in paths) / COUNT / 1e3
        print(f"{COUNT} JPEGs of {kilobytes:.0f} KB on average")
        examples = [Example(path.stem, path, None, (), None) for path in paths]
        for size in (224, 364):
            cache = Path(place, str(size))
            begun = time.perf_counter()
            open_pixels(examples, size, cache)
            seconds = time.perf_counter() - begun
            print(f"  {size} px  built on {len(cores)} cores: {COUNT / seconds:.0f} images/s")
        os.sched_setaffinity(0, cores[:1])
        for warm in (True, False):
            for size in (224, 364):
                compare(paths, size, Path(place, str(size)), warm)


if __name__ == "__main__":
    main()
