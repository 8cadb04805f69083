"""CLIPScore (Hessel et al. 2021), computed as jmhessel/clipscore does."""

import functools
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness import checkpoints
from harness.data.images import decode
from harness.metrics.base import Absent, Inputs, Measured, model_name, sign, some_rows

OFFICIAL = "openai/clip-vit-base-patch32"
PREFIX = "A photo depicts "
WEIGHT = 2.5
BATCH = 32
# of OpenAI's CLIP, all of whose checkpoints share them
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def measure(inputs: Inputs) -> Measured:
    """CLIPScore of each raw prediction with its image, in 0 to 2.5."""
    if inputs.images is None:
        raise Absent("needs images")
    config = inputs.config.clipscore
    found = checkpoints.find(config.checkpoint)
    if found is None:
        raise Absent(f"weights are not on this machine: {config.checkpoint}")
    clip = load(found.folder, inputs.device)
    texts = [clean(PREFIX + caption) for caption in inputs.predictions]
    cosines = (clip.images(inputs.images) * clip.texts(texts)).sum(1)
    cut = [row for row, caption in enumerate(texts) if caption in clip.cut]
    return Measured(
        WEIGHT * np.maximum(cosines, 0),
        sign(
            "clipscore",
            inputs.edition,
            model_name(found),
            f"prefix:{PREFIX.strip()}",
            f"w:{WEIGHT}",
            "pre:raw",
            "fp32",
        ),
        official=not found.standin and found.name == OFFICIAL,
        warnings=some_rows(cut, f"longer than the text encoder of clipscore, cut at {clip.limit} tokens"),
    )


def clean(caption: str) -> str:
    """The text as OpenAI's `simple_tokenizer.py` cleans it before its byte pairs."""
    import ftfy

    unescaped = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", unescaped.strip()).strip().lower()


def pixels(path: Path, size: int) -> np.ndarray:
    """An image (3, size, size) float32 as OpenAI's CLIP prepares it.

    The shorter side is resized to `size` (bicubic), the middle is cut out, made RGB and normalised.
    """
    from PIL import Image

    with Image.open(path) as opened:
        # PIL would turn 16-bit grey white; colours and 8-bit grey are converted last, as OpenAI does
        image = opened if opened.mode in ("L", "RGB") else decode(path)
        width, height = image.size
        # the longer side is truncated and the margin rounded as torchvision does both
        scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        image = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in image.size)
        rgb = image.crop((left, top, left + size, top + size)).convert("RGB")
    values = np.asarray(rgb, dtype=np.float32) / 255
    return ((values - np.float32(_MEAN)) / np.float32(_STD)).transpose(2, 0, 1)


@functools.lru_cache(maxsize=1)
def load(folder: Path, device: str) -> "Clip":
    """The CLIP in a folder; the last one used stays in memory, and with it the features of images."""
    return Clip(folder, device)


class Clip:
    """A CLIP that gives unit-length features, each distinct image and text encoded once.

    `cut` are the texts seen so far that were too long for it. Image features are kept for later calls: the
    captions before and after post-processing are scored against the same images.
    """

    def __init__(self, folder: Path, device: str):
        import torch
        from transformers import AutoTokenizer, CLIPModel

        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        self.size = self.model.config.vision_config.image_size
        self.limit = self.model.config.text_config.max_position_embeddings
        self.cut: set[str] = set()
        self._images: dict[tuple, np.ndarray] = {}

    def images(self, paths: Sequence[Path]) -> np.ndarray:
        """Features (n, d) of image files."""
        keys = [_identity(path) for path in paths]
        distinct = dict(zip(keys, paths, strict=True))
        new = [(key, path) for key, path in distinct.items() if key not in self._images]
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            features = self._image_features(np.stack([pixels(path, self.size) for _, path in batch]))
            self._images |= {key: row for (key, _), row in zip(batch, features, strict=True)}
        return np.stack([self._images[key] for key in keys])

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Features (n, d) of clean texts, cut to the encoder's length with their end token kept."""
        encoded = {caption: self.tokenizer(caption)["input_ids"] for caption in captions}
        self.cut |= {caption for caption, ids in encoded.items() if len(ids) > self.limit}
        order = sorted(encoded, key=lambda caption: len(encoded[caption]))
        features: dict[str, np.ndarray] = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            features |= zip(batch, self._text_features(batch), strict=True)
        return np.stack([features[caption] for caption in captions])

    def _image_features(self, values: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return _unit(self.model.get_image_features(torch.from_numpy(values).to(self.device)))

    def _text_features(self, captions: list[str]) -> np.ndarray:
        import torch

        batch = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            return _unit(self.model.get_text_features(batch["input_ids"], batch["attention_mask"]))


def _identity(path: Path) -> tuple[str, int, int]:
    status = Path(path).stat()
    return str(path), status.st_size, status.st_mtime_ns


def _unit(features: Any) -> np.ndarray:
    return (features / features.norm(dim=-1, keepdim=True)).float().cpu().numpy()
