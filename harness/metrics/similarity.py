"""Similarity of 2025 and 2026: how close MedImageInsight (Codella et al. 2024) finds caption and image.

The organisers run the published code and weights unchanged, and so does this module: it loads the model's own
module from the folder that the config names.
"""

import base64
import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from harness.config.editions import EDITIONS
from harness.config.sections import Section
from harness.data.files import read
from harness.data.images import DAMAGE, damage, decode, open_image
from harness.errors import Problem, UserError
from harness.metrics.base import Absent, Flagged, Inputs, Measured, Metric, Weights, cut_rows, empty, sign
from harness.metrics.cache import Row
from harness.metrics.images import Features, identities
from harness.metrics.neural import filled, last_kept
from harness.models.checkpoints import sha256, standin_name, sums, untrusted

KEY = "score.similarity.folder"
WEIGHT = 2.5
BATCH = 4
MODULE, PACKAGE = "medimageinsightmodel", "MedImageInsight"
MODEL = "2024.09.27"
VISION = "medimageinsigt-v1.0.0.pt"  # the publishers' spelling
LANGUAGE = "language_model.pth"
WEIGHTS = f"{MODEL}/vision_model/{VISION}"
PARTS = (
    f"{MODULE}.py",
    PACKAGE,
    f"{MODEL}/config.yaml",
    WEIGHTS,
    f"{MODEL}/language_model/clip_tokenizer_4.16.2",
)
"""What the folder must hold; the file of the vision model also has the language model's weights."""
HINT = (
    "Clone lion-ai/MedImageInsights from the Hugging Face hub with Git LFS, install its requirements.txt, "
    f"and name its folder as {KEY}; it holds {', '.join(PARTS)}"
)
_POINTER = b"version https://git-lfs"


class SimilarityConfig(Section):
    """The model of Similarity, MedImageInsight, of the editions since 2025."""

    folder: Path | None = None
    """A local folder of MedImageInsight. Without it, Similarity and the overall score are absent."""


def problems(config: SimilarityConfig) -> list[Problem]:
    """What is wrong with the folder of MedImageInsight; found without loading anything."""
    if not config.folder.is_dir():
        return [Problem(f"no such folder: {config.folder}", key=KEY, hint=HINT)]
    lacking = [part for part in PARTS if not (config.folder / part).exists()]
    if lacking:
        return [Problem(f"{config.folder} lacks {', '.join(lacking)}", key=KEY, hint=HINT)]
    with (config.folder / WEIGHTS).open("rb") as weights:
        if weights.read(len(_POINTER)) == _POINTER:
            what = f"{config.folder / WEIGHTS} is a Git LFS pointer, not the weights"
            return [Problem(what, key=KEY, hint=f"Fetch them: git -C {config.folder} lfs pull")]
    return []


def measure(inputs: Inputs) -> Measured:
    """2.5 * max(cos(image, prediction), 0) of each raw prediction with its image, in 0 to 2.5.

    White space is embedded like any text. In 2025 a prediction of length 0 is embedded too, and two captions
    of length 0 score 1. In 2026 a prediction of length 0 scores 0. After an exception the evaluator of 2026
    scores 1; this code reports the error. MedImageInsight always computes in float32.
    """
    folder = inputs.config.similarity.folder
    if wrong := problems(inputs.config.similarity):
        raise Absent(f"{wrong[0]}. {wrong[0].hint}")
    if inputs.images is None:
        raise Absent("needs images")
    standin = standin_name(folder)
    name = f"STAND-IN {standin}" if standin else f"MedImageInsight-{MODEL}"
    name += f"@{sha256(folder, inputs.cache)[:8]}"
    signature = sign("similarity", inputs.edition, name, f"w:{WEIGHT}", "pre:raw", "fp32")
    contents = identity(inputs.config.similarity, inputs.cache)

    def compute(rows: Sequence[Row]) -> list[tuple[float, int]]:
        model = load(folder, inputs.device)
        model.features.keep(inputs.cache, inputs.device, contents)
        return model.scores([row[0] for row in rows], [row[1:] for row in rows])

    images = identities(inputs.images)
    rows = [(caption, *image) for caption, image in zip(inputs.predictions, images, strict=True)]
    per_image, cut = inputs.scored_by_all([signature, contents], rows, compute).T
    values, warnings = _with_empty(inputs, per_image)
    trusted = not standin and inputs.trusts(folder)
    return Measured(
        values,
        signature,
        official=trusted,
        warnings=cut_rows("similarity", cut) + warnings,
        doubts=[] if trusted or standin else [untrusted(KEY, folder, inputs.cache)],
    )


def _with_empty(inputs: Inputs, per_image: np.ndarray) -> tuple[np.ndarray, list[Flagged]]:
    """The scores (n,) with the edition's rule for captions of length 0, and a warning about these."""
    blanks = EDITIONS[inputs.edition].blanks
    if blanks.similarity_embeds_empty:
        rows, what, value = empty(inputs.pairs), "both captions", 1.0
    else:
        rows, what, value = empty([(caption,) for caption in inputs.predictions]), "a prediction", 0.0
    said = f"with {what} of length 0: similarity is {value:.0f} by {blanks.rule}"
    flagged = [Flagged(np.flatnonzero(rows).tolist(), said)] if rows.any() else []
    return np.where(rows, value, per_image), flagged


def identity(config: SimilarityConfig, cache: Path | None) -> list[list[str]]:
    """What determines the scores: code, weights and tokenizer, by names and SHA-256."""
    return sums(config.folder, cache)


@last_kept(lambda folder: sha256(folder, None))
def load(folder: Path, device: str) -> "Model":
    """The MedImageInsight in a folder; the last one used stays in memory, with its image features."""
    return Model(folder, device)


class Model:
    """A MedImageInsight, with the features of the images so far."""

    def __init__(self, folder: Path, device: str):
        import torch

        with _its_own_modules(folder):
            module = _module(folder / f"{MODULE}.py")
            self.model = module.MedImageInsight(
                model_dir=str(folder / MODEL), vision_model_name=VISION, language_model_name=LANGUAGE
            )
            self.model.load_model()
        self.model.device = torch.device(device)
        self.model.model.to(self.model.device).eval()
        self.features = Features(self._image_features, BATCH)

    def scores(self, captions: Sequence[str], images: Sequence[Row]) -> list[tuple[float, int]]:
        """The score of each caption with its image, and the tokens that the caption was cut to, 0 if not."""
        whole = list(dict.fromkeys(captions))
        texts = dict(zip(whole, self._text_features(whole), strict=True))
        cut = {caption for caption in whole if self._length(caption) > self.model.max_length}
        return [
            (_score(image, texts[caption]), self.model.max_length * (caption in cut))
            for caption, image in zip(captions, self.features.of(images), strict=True)
        ]

    def _text_features(self, captions: Sequence[str]) -> list[np.ndarray]:
        import torch

        found: list[np.ndarray] = []
        for batch in filled(captions, BATCH):
            with torch.inference_mode():
                found += list(self.model.encode(texts=batch)["text_embeddings"])
        return found[: len(captions)]

    def _image_features(self, paths: Sequence[Path]) -> np.ndarray:
        import torch

        read = {path: encoded(path) for path in dict.fromkeys(paths)}
        with torch.inference_mode():
            return np.asarray(self.model.encode(images=[read[p] for p in paths])["image_embeddings"])

    def _length(self, caption: str) -> int:
        return len(self.model.tokenize([caption], truncation=False)["input_ids"][0])


def _score(image: np.ndarray, caption: np.ndarray) -> float:
    cosine = image @ caption / (np.linalg.norm(image) * np.linalg.norm(caption))
    return WEIGHT * max(float(cosine), 0.0)


def encoded(path: Path) -> str:
    """An image file in base64, as the organisers give it to the model.

    16-bit grey, palettes and transparency are converted to RGB as PNG first, since the model refuses them or
    turns them white. Raises `UserError` if the file is not a whole image.
    """
    try:
        content = read(path)
        with open_image(content) as image:
            plain = image.mode in ("L", "RGB")
        if not plain:
            png = io.BytesIO()
            decode(content).save(png, "PNG")
            content = png.getvalue()
    except DAMAGE as error:
        raise UserError([Problem(damage(error), path)]) from None
    return base64.b64encode(content).decode()


@contextlib.contextmanager
def _its_own_modules(folder: Path) -> Iterator[None]:
    """Puts the folder's modules first on the path, without bytecode, and sends what they print to stderr."""
    before, bytecode = sys.path.copy(), sys.pycache_prefix
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:  # of another folder
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    try:
        with contextlib.redirect_stdout(sys.stderr), TemporaryDirectory() as sys.pycache_prefix:
            yield
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another build of torch
        raise Absent(f"the code in {folder} does not run here: {error}. {HINT}") from error
    finally:
        sys.path[:], sys.pycache_prefix = before, bytecode


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(MODULE, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


METRIC = Metric(
    measure,
    neural=True,
    weights=Weights(
        "similarity",
        SimilarityConfig,
        "folder",
        problems,
        identity,
        unload=load.cache_clear,
        executes=True,
        hint=HINT,
    ),
)
