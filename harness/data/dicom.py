"""DICOM files as plain images: rescaled, windowed and inverted as their headers say, by `pydicom`."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.data.images import window

_SUFFIXES = (".dcm", ".dicom", ".ima")
_FAR = 1e12  # beyond every stored value, so that a window clips it


class Unreadable(Exception):
    """Why a DICOM file can't be read, in words."""


def is_dicom(file: Path) -> bool:
    """Whether a file is DICOM, by its suffix or its first bytes; scanners often write no suffix."""
    if file.name.lower().endswith(_SUFFIXES):
        return True
    try:
        with file.open("rb") as content:
            return file.is_file() and content.read(132)[128:] == b"DICM"
    except OSError:
        return False


def convert(file: Path, png: Path) -> str:
    """Write the first frame of a DICOM file as an 8-bit PNG -> what was done, in words.

    Grey values are rescaled (slope and intercept, or the modality's table), and windowed by the file's first
    window or its VOI table; without one, from the smallest to the largest value that is not padding.
    MONOCHROME1 is inverted, so that more is brighter. Colours become RGB. Raises `Unreadable`, also if
    `pydicom` is not installed.
    """
    try:
        import pydicom
        from pydicom import pixels
    except ImportError:
        raise Unreadable("DICOM needs a further package: pip install pydicom") from None
    try:
        data = pydicom.dcmread(file, force=file.suffix.lower() in _SUFFIXES)
        frame = pixels.pixel_array(data, index=0)
        image, done = _image(data, frame)
    except Exception as error:  # pydicom raises errors of many kinds on strange files
        raise Unreadable(f"can't be read as DICOM: {str(error) or type(error).__name__}") from error
    image.save(png)
    frames = int(data.get("NumberOfFrames") or 1)
    return ", ".join([*([f"the first of {frames} frames"] if frames > 1 else []), *done])


def _image(data: Any, frame: np.ndarray) -> tuple[Image.Image, list[str]]:
    """One frame as an 8-bit image, and what was done to it."""
    from pydicom import pixels

    kind = data.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        frame = pixels.apply_color_lut(frame, data)
        deep = frame.dtype.itemsize > 1
        return Image.fromarray((frame >> 8 if deep else frame).astype(np.uint8)[..., :3]), ["palette"]
    if frame.ndim == 3:  # pydicom gives RGB for YBR too
        if frame.dtype != np.uint8:
            raise ValueError(f"its colours have {8 * frame.dtype.itemsize} bits; 8 are allowed")
        return Image.fromarray(frame), []
    grey = np.asarray(pixels.apply_modality_lut(frame, data), np.float64)
    grey, done = _windowed(data, frame, grey)
    if kind == "MONOCHROME1":
        grey, done = 1 - grey, [*done, "inverted (MONOCHROME1)"]
    return Image.fromarray(np.round(255 * grey).astype(np.uint8)), done


def _windowed(data: Any, frame: np.ndarray, grey: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Rescaled grey values as 0 to 1, and how."""
    from pydicom import pixels

    if data.get("VOILUTSequence"):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        return pixels.apply_voi(grey.astype(np.int64), data) / (2**bits - 1), ["VOI table"]
    if data.get("WindowCenter") is not None and data.get("WindowWidth") is not None:
        low, high = pixels.apply_windowing(np.array([-_FAR, _FAR]), data)
        centre, width = (_first(data[key].value) for key in ("WindowCenter", "WindowWidth"))
        return (pixels.apply_windowing(grey, data) - low) / (high - low), [f"window {centre:g}/{width:g}"]
    padding = data.get("PixelPaddingValue")
    inside = frame != padding if padding is not None else np.ones(frame.shape, bool)
    return window(np.where(inside, grey, np.nan)), ["no window: from smallest to largest value"]


def _first(value: Any) -> float:
    return float(value if isinstance(value, int | float) else value[0])
