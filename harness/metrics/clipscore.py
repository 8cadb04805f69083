"""CLIPScore and RefCLIPScore (Hessel et al. 2021), computed as jmhessel/clipscore does."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.config.sections import Section
from harness.data.files import read
from harness.data.images import DAMAGE, damage, decode, open_image
from harness.errors import Problem, UserError
from harness.metrics.base import Absent, Inputs, Measured, Metric, Standin, Weights, cut_rows, sign
from harness.metrics.cache import Row
from harness.metrics.images import Features, identities
from harness.metrics.neural import at_hand, by_length, contents, dtype, files_of, lacking, last_kept, loaded
from harness.models import checkpoints

KEY = "score.clipscore.checkpoint"
OFFICIAL = "openai/clip-vit-base-patch32"
PREFIX = "A photo depicts "
WEIGHT = 2.5
BATCH = 8
MOST_TEXTS = 50_000
# all checkpoints of OpenAI's CLIP share these
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScoreConfig(Section):
    """The model of CLIPScore and RefCLIPScore."""

    checkpoint: str = OFFICIAL
    """A hub name, a local folder, or `standin`: a small CLIP trained on the training split."""


def measure(inputs: Inputs) -> Measured:
    """CLIPScore of each raw prediction with its image, in 0 to 2.5; a blank one is the prefix alone."""
    return _measure("clipscore", inputs, [(caption,) for caption in inputs.predictions], _clipscores)


def refclipscore(inputs: Inputs) -> Measured:
    """RefCLIPScore of each raw prediction with its image and its raw reference, in 0 to 10/7.

    This is the harmonic mean of CLIPScore (with its weight of 2.5) and the cosine between prediction and
    reference, clipped at 0 (section 3 of the paper). If both are 0, the score is 0. The authors' code does
    not clip the cosine and divides by zero there.
    """
    return _measure("refclipscore", inputs, inputs.pairs, _refclipscores)


def _clipscores(images: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return WEIGHT * np.maximum((images * predictions).sum(1), 0)


def _refclipscores(images: np.ndarray, predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    with_image = _clipscores(images, predictions)
    with_reference = np.maximum((predictions * references).sum(1), 0)
    total = with_image + with_reference
    return 2 * with_image * with_reference / np.where(total > 0, total, 1)


def _measure(
    name: str, inputs: Inputs, captions: Sequence[Row], formula: Callable[..., np.ndarray]
) -> Measured:
    """Scores from `formula` of the unit-length features (n, d) of images and of each column of captions."""
    if inputs.images is None:
        raise Absent("needs images")
    checkpoint, precision = inputs.config.clipscore.checkpoint, inputs.config.precision
    found = at_hand(checkpoint, KEY)
    signature = sign(
        name,
        inputs.edition,
        inputs.name_of(found),
        f"prefix:{PREFIX.strip()}",
        f"w:{WEIGHT}",
        "pre:raw",
        precision,
    )

    weights = checkpoints.contents(found.folder, inputs.cache)

    def compute(rows: Sequence[Row]) -> np.ndarray:
        clip = load(found.folder, inputs.device, precision)
        clip.features.keep(inputs.cache, inputs.device, [weights, precision])
        count = len(captions[0])
        columns = [[clean(PREFIX + row[column]) for row in rows] for column in range(count)]
        scores = formula(clip.features.of([row[count:] for row in rows]), *map(clip.texts, columns))
        cut = [any(text in clip.cut for text in texts) for texts in zip(*columns, strict=True)]
        return np.column_stack([scores, clip.limit * np.array(cut)])

    rows = [(*texts, *image) for texts, image in zip(captions, identities(inputs.images), strict=True)]
    per_image, cut = inputs.scored_by_all([signature, weights], rows, compute).T
    official, doubts = inputs.official(found, OFFICIAL, KEY) if precision == "fp32" else (False, [])
    return Measured(
        per_image,
        signature,
        official=official,
        warnings=cut_rows(name, cut),
        doubts=doubts,
    )


def clean(caption: str) -> str:
    """The text as OpenAI's `simple_tokenizer.py` cleans it before byte-pair encoding."""
    import ftfy

    unescaped = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", unescaped.strip()).strip().lower()


def pixels(path: Path, size: int) -> np.ndarray:
    """An image (3, size, size) float32, prepared as for OpenAI's CLIP.

    The shorter side is resized to `size` (bicubic). The central square is cropped, converted to RGB and
    normalised. Raises `UserError` if the file is not a whole image.
    """
    try:
        rgb = _square(path, size)
    except DAMAGE as error:
        raise UserError([Problem(damage(error), path)]) from None
    values = np.asarray(rgb, dtype=np.float32) / 255
    return ((values - np.float32(_MEAN)) / np.float32(_STD)).transpose(2, 0, 1)


def _square(path: Path, size: int) -> Image.Image:
    content = read(path)
    with open_image(content) as opened:
        # PIL would turn 16-bit grey white; colour and 8-bit grey are converted last, as in OpenAI's code
        image = opened if opened.mode in ("L", "RGB") else decode(content)
        width, height = image.size
        # as in torchvision, the longer side is truncated and the margin is rounded
        scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        image = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in image.size)
        return image.crop((left, top, left + size, top + size)).convert("RGB")


@last_kept(files_of)
def load(folder: Path, device: str, precision: str = "fp32") -> "Clip":
    """The CLIP in a folder; the last one used stays in memory, with its image features."""
    return Clip(folder, device, precision)


class Clip:
    """A CLIP that returns unit-length features (n, d) float32; each distinct image and text is encoded once.

    `features` are the features of images. `cut` are the texts so far that were too long. At most `MOST_TEXTS`
    texts are kept, plus the texts of the last call.
    """

    def __init__(self, folder: Path, device: str, precision: str = "fp32"):
        from transformers import AutoTokenizer, CLIPModel

        self.device, self.dtype = device, dtype(precision)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.model = loaded(CLIPModel, folder, "position_ids", dtype=self.dtype).to(device)
        self.size = self.model.config.vision_config.image_size
        self.limit = self.model.config.text_config.max_position_embeddings
        self.cut: set[str] = set()
        self.features = Features(self._image_features, BATCH)
        self._texts: dict[str, np.ndarray] = {}

    def images(self, paths: Sequence[Path]) -> np.ndarray:
        """Features of image files."""
        return self.features.of(identities(paths))

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Features of clean texts, cut to the encoder's length; a cut text keeps its end token."""
        if len(self._texts) > MOST_TEXTS:
            self._texts.clear()
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._texts]
        lengths = {caption: len(self.tokenizer(caption, verbose=False)["input_ids"]) for caption in new}
        self.cut |= {caption for caption, length in lengths.items() if length > self.limit}
        # all at once, since a fast tokenizer must not be used from several threads
        encoded = self.tokenizer(new, truncation=True, max_length=self.limit)["input_ids"] if new else []
        features = by_length(
            lambda rows, width: self._text_features([encoded[row] for row in rows], width),
            [len(ids) for ids in encoded],
            self.limit,
            self.device,
        )
        self._texts |= zip(new, features, strict=True)
        return np.stack([self._texts[caption] for caption in captions])

    def _image_features(self, paths: Sequence[Path]) -> np.ndarray:
        import torch

        decoded = {path: pixels(path, self.size) for path in dict.fromkeys(paths)}
        values = torch.from_numpy(np.stack([decoded[path] for path in paths]))
        with torch.inference_mode():
            seen = self.model.vision_model(values.to(self.device, self.dtype)).pooler_output
            return _unit(self.model.visual_projection(seen))

    def _text_features(self, encoded: list[list[int]], width: int) -> np.ndarray:
        import torch

        how = {"padding": "max_length", "max_length": width, "return_tensors": "pt", "verbose": False}
        batch = self.tokenizer.pad({"input_ids": encoded}, **how).to(self.device)
        with torch.inference_mode():
            read = self.model.text_model(batch["input_ids"], batch["attention_mask"]).pooler_output
            return _unit(self.model.text_projection(read))


def _unit(features: Any) -> np.ndarray:
    features = features.float()
    return (features / features.norm(dim=-1, keepdim=True)).cpu().numpy()


def _build_standin(images: Sequence[Path], captions: Sequence[str], folder: Path) -> None:
    from harness.models import standins

    standins.build_clip(images, captions, folder)


METRIC = Metric(
    measure,
    neural=True,
    weights=Weights(
        "clipscore",
        ClipScoreConfig,
        "checkpoint",
        problems=lambda section: lacking(section.checkpoint, KEY),
        identity=lambda section, cache: contents(section.checkpoint, cache),
        standin=Standin(_build_standin),
        unload=load.cache_clear,
    ),
)
REFCLIPSCORE = replace(METRIC, measure=refclipscore)
