"""A made-up radiology set in the 2023 layout: the images are drawn, and a grammar writes the captions.

Modality, anatomy, finding, side and size are all visible in the pixels, so a small model that uses the image
beats any constant caption. Nothing in it is real medicine.
"""

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from harness.config.sections import PhantomConfig
from harness.data.phantom_grammar import Case, Modality, caption, concept_names, cuis, make_up
from harness.errors import Problem, UserError
from harness.store import write, write_json

MARKER = "phantom.json"
WITHHELD = "withheld"
"""Folder with the test labels, which no reader opens: as in the competition, test has no labels."""
VERSION = 2  # raise it when a seed draws another set than before
_PREFIX = "ImageCLEFmedical_Caption_2023_"
_RADII = {"small": (0.065, 0.072), "large": (0.135, 0.15)}


def ensure(root: Path, config: PhantomConfig) -> None:
    """Draw the set if `root` does not exist; a folder without `phantom.json` is real data and is not changed.

    Raises `UserError` if `root` holds a phantom that was drawn with other settings.
    """
    if not root.exists():
        draw(root, config)
        return
    marker = root / MARKER
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) != _mark(config):
        hint = f"Remove it, or name another folder: --set data.root={root}-2"
        what = f"{root} holds a phantom that was drawn with other settings or by another version ({MARKER})"
        raise UserError([Problem(what, key="data.phantom", hint=hint)])


def draw(root: Path, config: PhantomConfig) -> None:
    """Draw a set into the new folder `root`; the labels of test are separate, in `withheld/`.

    The same config gives the same bytes. The folder gets its name when it is complete; its marker is written
    last. Raises `UserError` if `root` exists and is not empty.
    """
    from filelock import FileLock

    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = root.with_name(f".{root.name}.unfinished")
    lock = root.with_name(f".{root.name}.lock")
    with FileLock(lock):
        if (root / MARKER).exists():  # another process was first
            ensure(root, config)
            return
        if root.exists() and not (root.is_dir() and not any(root.iterdir())):
            lock.unlink()
            raise UserError([Problem(f"{root} exists and is not an empty folder; a phantom needs a new one")])
        shutil.rmtree(unfinished, ignore_errors=True)  # what an interrupted drawing left
        for number, split in enumerate(("train", "valid", "test")):
            _draw_split(unfinished, split, getattr(config, split), [config.seed, number])
        names = "".join(f"{cui}\t{name}\r\n" for cui, name in concept_names().items())
        write(unfinished / f"{_PREFIX}cui_mapping.csv", names)
        write_json(unfinished / MARKER, _mark(config))
        unfinished.replace(root)
        lock.unlink()  # processes that wait for it find the marker


def _mark(config: PhantomConfig) -> dict[str, int]:
    return {"version": VERSION} | config.model_dump()


def _draw_split(root: Path, split: str, count: int, seed: Sequence[int]) -> None:
    (root / split).mkdir(parents=True)
    captions, concepts = "ID\tcaption\r\n", "ID\tcuis\r\n"
    ids = [f"phantom_{split}_{number:06d}" for number in range(1, count + 1)]
    for number, id in enumerate(ids):
        rng = np.random.default_rng([*seed, number])
        case = make_up(rng)
        captions += f"{id}\t{caption(case, rng)}\r\n"
        concepts += f"{id}\t{';'.join(cuis(case))}\r\n"
        (root / split / f"{id}.jpg").write_bytes(_jpeg(picture(case, rng)))
    labels = root / WITHHELD if split == "test" else root
    write(labels / f"{_PREFIX}caption_prediction_{split}_labels.csv", captions)
    write(labels / f"{_PREFIX}concept_detection_{split}_labels.csv", concepts)
    if split == "test":
        write(root / "test_ids.csv", "".join(f"{line}\r\n" for line in ("ID", *ids)))


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


class Pen:
    """Draws tissues in a modality's shades; coordinates and widths are shares of the canvas, y goes down."""

    def __init__(self, modality: Modality, rng: np.random.Generator) -> None:
        self.rng = rng
        self.shades = modality.shades
        self.size = tuple(int(side) for side in rng.integers(224, 297, 2))
        self.image = Image.new("L", self.size, modality.shades["out"])
        self.canvas = ImageDraw.Draw(self.image)
        self.scale = rng.uniform(0.94, 1.04)
        self.shift = rng.uniform(-0.02, 0.02, 2)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        placed = (np.array([x, y]) - 0.5) * self.scale + 0.5 + self.shift
        return float(placed[0] * self.size[0]), float(placed[1] * self.size[1])

    def ellipse(self, tissue: str, x: float, y: float, rx: float, ry: float) -> None:
        box = (*self._at(x - rx, y - ry), *self._at(x + rx, y + ry))
        self.canvas.ellipse(box, fill=self.shades[tissue])

    def polygon(self, tissue: str, points: Sequence[tuple[float, float]]) -> None:
        self.canvas.polygon([self._at(*point) for point in points], fill=self.shades[tissue])

    def line(self, tissue: str, points: Sequence[tuple[float, float]], width: float) -> None:
        pixels = max(1, round(width * self.scale * min(self.size)))
        self.canvas.line([self._at(*p) for p in points], self.shades[tissue], pixels, joint="curve")

    def bar(self, tissue: str, left: float, top: float, right: float, bottom: float) -> None:
        box = (*self._at(left, top), *self._at(right, bottom))
        radius = 0.3 * min(box[2] - box[0], box[3] - box[1])
        self.canvas.rounded_rectangle(box, radius, fill=self.shades[tissue])


def picture(case: Case, rng: np.random.Generator) -> Image.Image:
    """Draw a case: 8-bit grey, sides of 224 to 296 pixels; the patient's right is on the image's left."""
    pen = Pen(case.modality, rng)
    _ANATOMY[case.anatomy](pen)
    if case.modality.name == "angiography":
        _vessels(pen)
    if case.lesion and case.side and case.size:
        dx, y, spread = _SITES[case.anatomy]
        x = 0.5 + (dx + rng.uniform(-0.012, 0.012)) * (1 if case.side == "left" else -1)
        y, radius = y + rng.uniform(-spread, spread), rng.uniform(*_RADII[case.size])
        if case.modality.name != "angiography":  # bone behind a bright lesion would hide it
            pen.ellipse("body", x, y, 1.2 * radius, 1.2 * radius)
        _LESIONS[case.lesion.name](pen, x, y, radius)
        return _arrow(
            _acquire(pen.image, case.modality, rng),
            x > 0.5,
            y,
            0 if case.modality.shades["out"] > 128 else 255,
        )
    return _acquire(pen.image, case.modality, rng)


def _head(pen: Pen) -> None:
    pen.ellipse("rim", 0.5, 0.5, 0.40, 0.46)
    pen.ellipse("bone", 0.5, 0.5, 0.375, 0.435)
    pen.ellipse("organ", 0.5, 0.5, 0.32, 0.38)
    pen.line("body", [(0.5, 0.13), (0.5, 0.87)], 0.012)
    for x in (0.455, 0.545):
        pen.ellipse("air", x, 0.62, 0.028, 0.09)


def _chest(pen: Pen) -> None:
    pen.ellipse("rim", 0.5, 0.52, 0.49, 0.45)
    pen.ellipse("body", 0.5, 0.52, 0.465, 0.425)
    for x in (0.28, 0.72):
        pen.ellipse("air", x, 0.5, 0.165, 0.32)
        for y in (0.27, 0.40, 0.53, 0.66):
            pen.line("body", [(x - 0.15, y), (x, y - 0.03), (x + 0.15, y)], 0.012)
    pen.ellipse("organ", 0.53, 0.62, 0.11, 0.15)
    pen.bar("bone", 0.46, 0.14, 0.54, 0.92)


def _abdomen(pen: Pen) -> None:
    pen.ellipse("rim", 0.5, 0.5, 0.49, 0.37)
    pen.ellipse("body", 0.5, 0.5, 0.465, 0.345)
    pen.ellipse("organ", 0.27, 0.36, 0.19, 0.13)
    pen.ellipse("organ", 0.77, 0.38, 0.09, 0.11)
    for x in (0.29, 0.71):
        pen.ellipse("organ", x, 0.64, 0.08, 0.10)
    pen.ellipse("air", 0.53, 0.32, 0.09, 0.05)
    pen.ellipse("bone", 0.5, 0.70, 0.085, 0.07)
    pen.ellipse("organ", 0.5, 0.57, 0.035, 0.035)


def _pelvis(pen: Pen) -> None:
    pen.ellipse("rim", 0.5, 0.5, 0.48, 0.44)
    pen.ellipse("body", 0.5, 0.5, 0.455, 0.415)
    for side in (-1, 1):
        wing = [
            (0.12, 0.12),
            (0.36, 0.20),
            (0.40, 0.40),
            (0.27, 0.58),
            (0.13, 0.66),
            (0.10, 0.58),
            (0.20, 0.42),
        ]
        pen.polygon("bone", [(0.5 + side * x, y) for x, y in wing])
        pen.ellipse("bone", 0.5 + side * 0.31, 0.74, 0.085, 0.085)
    pen.polygon("bone", [(0.41, 0.16), (0.59, 0.16), (0.5, 0.44)])
    pen.ellipse("organ", 0.5, 0.68, 0.11, 0.08)


def _spine(pen: Pen) -> None:
    pen.bar("body", 0.10, -0.1, 0.90, 1.1)
    for side in (-1, 1):
        muscle = [(0.10, 0.05), (0.18, 0.2), (0.34, 0.8), (0.32, 1.0), (0.16, 1.0), (0.12, 0.6)]
        pen.polygon("organ", [(0.5 + side * x, y) for x, y in muscle])
    for top in np.arange(0.0, 1.0, 0.165):
        pen.bar("bone", 0.40, top, 0.60, top + 0.115)
        pen.bar("bone", 0.33, top + 0.045, 0.67, top + 0.07)


def _legs(pen: Pen) -> None:
    for x in (0.26, 0.74):
        pen.bar("rim", x - 0.185, -0.2, x + 0.185, 1.2)
        pen.bar("body", x - 0.165, -0.2, x + 0.165, 1.2)
        pen.bar("bone", x - 0.05, -0.2, x + 0.05, 0.30)
        pen.bar("bone", x - 0.05, 0.33, x + 0.05, 1.2)
        pen.ellipse("bone", x, 0.255, 0.10, 0.055)
        pen.ellipse("bone", x, 0.37, 0.10, 0.045)


_ANATOMY: Mapping[str, Callable[[Pen], None]] = {
    "head": _head,
    "chest": _chest,
    "abdomen": _abdomen,
    "pelvis": _pelvis,
    "spine": _spine,
    "legs": _legs,
}
_SITES = {  # distance from the midline, height, variation of the height
    "head": (0.165, 0.43, 0.05),
    "chest": (0.22, 0.48, 0.06),
    "abdomen": (0.23, 0.50, 0.05),
    "pelvis": (0.23, 0.48, 0.05),
    "spine": (0.26, 0.50, 0.08),
    "legs": (0.24, 0.60, 0.06),
}


def _vessels(pen: Pen) -> None:
    for side in (-1, 1):
        heights = np.linspace(1.0, 0.06, 9)
        sway = np.cumsum(pen.rng.uniform(-0.012, 0.016, 9))
        trunk = [(0.5 + side * (0.06 + 0.02 * i + sway[i]), y) for i, y in enumerate(heights)]
        pen.line("dark", trunk, 0.024)
        for x, y in trunk[1:8]:
            reach = side * pen.rng.choice([-0.05, 0.12, 0.18])
            bend = y - pen.rng.uniform(0.02, 0.08)
            pen.line("dark", [(x, y), (x + reach / 2, bend), (x + reach, bend - 0.07)], 0.010)


def _mass(pen: Pen, x: float, y: float, r: float) -> None:
    pen.ellipse("bright", x, y, 0.8 * r, 0.8 * r)
    for angle in np.arange(6) + pen.rng.uniform(0, 1):
        bump = pen.rng.uniform(0.30, 0.45) * r
        pen.ellipse("bright", x + 0.7 * r * np.cos(angle), y + 0.7 * r * np.sin(angle), bump, bump)


def _cyst(pen: Pen, x: float, y: float, r: float) -> None:
    pen.ellipse("bright", x, y, r, r)
    pen.ellipse("dark", x, y, r - 0.014, r - 0.014)


def _abscess(pen: Pen, x: float, y: float, r: float) -> None:
    pen.ellipse("bright", x, y, r, r)
    pen.ellipse("dark", x, y, 0.42 * r, 0.42 * r)


def _hematoma(pen: Pen, x: float, y: float, r: float) -> None:
    bulge = 1 if x > 0.5 else -1
    angles = np.linspace(-np.pi / 2, np.pi / 2, 15)
    outer = [(x + bulge * r * (np.cos(a) - 0.3), y + 1.4 * r * np.sin(a)) for a in angles]
    inner = [(x + bulge * r * (0.3 * np.cos(a) - 0.3), y + 1.4 * r * np.sin(a)) for a in angles[::-1]]
    pen.polygon("bright", outer + inner)


def _fracture(pen: Pen, x: float, y: float, r: float) -> None:
    steps = np.linspace(-1.3 * r, 1.3 * r, 7)
    zigzag = [(x + step, y + (0.45 if i % 2 else -0.45) * r - 0.4 * step) for i, step in enumerate(steps)]
    pen.line("bright", zigzag, 0.55 * r)
    pen.line("dark", zigzag, 0.28 * r)


def _nodules(pen: Pen, x: float, y: float, r: float) -> None:
    for number, angle in enumerate(np.arange(7) * 2.4 + pen.rng.uniform(0, 6)):
        distance = 0.42 * r * number**0.6
        pen.ellipse("bright", x + distance * np.cos(angle), y + distance * np.sin(angle), 0.26 * r, 0.26 * r)


def _aneurysm(pen: Pen, x: float, y: float, r: float) -> None:
    pen.line("dark", [(x - 0.2 * (x - 0.5), y + 1.6 * r), (x, y)], 0.03)
    pen.ellipse("dark", x, y, r, r)


def _stenosis(pen: Pen, x: float, y: float, r: float) -> None:
    pen.polygon("dark", [(x - 0.7 * r, y - 1.5 * r), (x + 0.7 * r, y - 1.5 * r), (x, y)])
    pen.polygon("dark", [(x - 0.7 * r, y + 1.5 * r), (x + 0.7 * r, y + 1.5 * r), (x, y)])
    pen.line("dark", [(x, y - 0.5 * r), (x, y + 0.5 * r)], 0.012)


def _nodes(pen: Pen, x: float, y: float, r: float) -> None:
    for step in (-1.35, -0.45, 0.45, 1.35):
        wiggle = pen.rng.uniform(-0.3, 0.3) * r
        pen.ellipse("bright", x + wiggle, y + step * r, 0.36 * r, 0.36 * r)


_LESIONS: Mapping[str, Callable[[Pen, float, float, float], None]] = {
    "mass": _mass,
    "cyst": _cyst,
    "abscess": _abscess,
    "hematoma": _hematoma,
    "fracture": _fracture,
    "nodules": _nodules,
    "aneurysm": _aneurysm,
    "stenosis": _stenosis,
    "nodes": _nodes,
}


def _acquire(image: Image.Image, modality: Modality, rng: np.random.Generator) -> Image.Image:
    """The image with the blur, gain and noise of its modality."""
    width, height = image.size
    if modality.name == "PET":
        coarse = image.filter(ImageFilter.GaussianBlur(2)).resize((width // 4, height // 4))
        image = coarse.resize(image.size, Image.Resampling.BILINEAR)
    grey = np.asarray(image.filter(ImageFilter.GaussianBlur(modality.blur)), np.float32)
    noise = rng.standard_normal(grey.shape, np.float32) * modality.noise
    if modality.name == "X-ray":  # the beam is stronger in the middle
        grey = grey * (0.65 + 0.35 * np.outer(np.hanning(height), np.hanning(width)).astype(np.float32))
    if modality.name == "ultrasound":
        grain = Image.fromarray(rng.gamma(7, 1 / 7, (height // 3, width // 3)).astype(np.float32))
        grey = grey * np.asarray(grain.resize(image.size, Image.Resampling.BILINEAR)) * _fan(width, height)
    if modality.name == "MRI":  # the magnitude of a complex signal
        grey = np.hypot(grey, rng.standard_normal(grey.shape, np.float32) * modality.noise)
    grey = (grey + noise) * rng.uniform(0.92, 1.08)
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))


def _arrow(image: Image.Image, from_right: bool, y: float, shade: int) -> Image.Image:
    """The image with an arrow from the edge to the lesion, as in most published figures."""
    width, height = image.size
    half = [(0.0, 0.026), (0.07, 0.026), (0.07, 0.066), (0.15, 0.0)]
    shape = half + [(dx, -dy) for dx, dy in reversed(half)]
    points = [((1 - dx if from_right else dx) * width, (y + dy) * height) for dx, dy in shape]
    ImageDraw.Draw(image).polygon(points, fill=shade, outline=255 - shade)
    return image


def _fan(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width - 0.5, y / height + 0.25
    radius = np.hypot(x, y)
    return ((radius > 0.28) & (radius < 1.2) & (np.abs(x) < 0.62 * y)).astype(np.float32)
