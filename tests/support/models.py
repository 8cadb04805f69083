"""Small models and batches for the tests of model and training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from harness.config.sections import AugmentConfig
from harness.models import tiny
from harness.models.blip2 import loading
from harness.models.settings import ModelConfig, TinyConfig
from harness.models.text import concept_sentence

SIZES = TinyConfig(
    patch_size=8,
    hidden_size=32,
    vision_layers=2,
    qformer_layers=2,
    num_query_tokens=4,
    text_hidden_size=48,
    text_layers=2,
    vocab_size=300,
    text_epochs=1,
    vision_epochs=1,
)
FINDINGS = ("nodule", "effusion", "fracture", "mass", "stenosis")
ORGANS = ("lung", "liver", "brain", "knee")
TEXTS = [
    (concept_sentence([organ, finding]), f"axial ct of the {organ} showing a {finding}")
    for organ in ORGANS
    for finding in FINDINGS
]


def pixels(count: int, size: int = 64, seed: int = 0) -> np.ndarray:
    """uint8 (count, size, size, 3) of noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def build_tiny(
    folder: Path,
    texts: Sequence[tuple[str, str]] = TEXTS,
    images: np.ndarray | None = None,
    **sizes: int,
) -> Path:
    """A tiny checkpoint of `SIZES`, but for `sizes`, that has read `texts` and seen `images` or noise."""
    folder.mkdir(parents=True, exist_ok=True)
    concepts = np.array([[word in text for word in (*ORGANS, *FINDINGS)] for _, text in TEXTS])
    if images is None:
        images = pixels(len(TEXTS), tiny.image_side(SIZES))
    tiny.build(SIZES.model_copy(update=sizes), texts, images, concepts, AugmentConfig(), "a photo of", folder)
    return folder


def load_tiny(folder: Path, image_size: int = 64, language_model: bool = True, **options) -> loading.Loaded:
    """The checkpoint of `build_tiny`, without dropout unless told."""
    config = ModelConfig(
        checkpoint=str(folder), image_size=image_size, language_model=language_model, tiny=SIZES
    )
    loaded = loading.load(config, folder, options.pop("max_tokens", 32), options.pop("dropout", 0.0))
    if loaded.model.language_model is not None:
        loaded.model.language_model.config.dropout = 0.0
        for layer in loaded.model.language_model.model.decoder.layers:
            layer.dropout = 0.0
        loaded.model.language_model.model.decoder.dropout = 0.0
    return loaded


def stages(*epochs: int) -> list[dict]:
    """`train.stages` of so many epochs each: captions and concepts in the first, captions in the others."""
    losses = [{"caption": 1, "concept": 1}, *[{"caption": 1}] * (len(epochs) - 1)]
    return [{"epochs": count, "losses": one} for count, one in zip(epochs, losses, strict=True)]


def batch(loaded: loading.Loaded, count: int = 3) -> tuple:
    """Images (count, 3, S, S), normalised, with the first captions and concept sentences, collated."""
    images = loaded.normalise(torch.from_numpy(pixels(count)))
    captions = loaded.caption.collate([loaded.caption.encode(TEXTS[i][1]) for i in range(count)])
    concepts = loaded.concept.collate([loaded.concept.encode(TEXTS[i][0]) for i in range(count)])
    return images, captions, concepts
