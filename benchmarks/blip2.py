"""A BLIP-2 of 20 M parameters and captions of real lengths, for the benchmarks of training and prediction."""

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from harness.config.sections import AugmentConfig
from harness.machine import device
from harness.models.settings import ModelConfig, TinyConfig

device.before_torch()  # the modules below import it

from harness.models import tiny  # noqa: E402
from harness.models.blip2 import loading  # noqa: E402
from harness.models.loading import Loaded  # noqa: E402
from harness.models.text import concept_sentence  # noqa: E402
from harness.training.split import Split  # noqa: E402

IMAGE_SIZE, IMAGES, MAX_TOKENS = 224, 256, 128
SIZES = TinyConfig(
    patch_size=14,
    hidden_size=256,
    vision_layers=8,
    qformer_layers=6,
    num_query_tokens=32,
    text_hidden_size=288,
    text_layers=6,
    vocab_size=4000,
    text_epochs=1,
    vision_epochs=0,
)


def texts() -> list[tuple[str, str]]:
    """(concept sentence, caption) of each image; captions have 4 to 60 words, with a median of 15."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeiourstlnmcd", k=draw.randint(2, 9))) for _ in range(3000)]
    lengths = [min(4 + int(draw.lognormvariate(2.4, 0.8)), 60) for _ in range(IMAGES)]
    return [
        (concept_sentence(draw.sample(words, draw.randint(1, 6))), " ".join(draw.choices(words, k=length)))
        for length in lengths
    ]


@contextmanager
def folder() -> Iterator[Path]:
    """A checkpoint of the model, saved like a published one."""
    with tempfile.TemporaryDirectory() as place:
        small = np.zeros((IMAGES, *2 * [tiny.image_side(SIZES)], 3), np.uint8)
        small[::2] = 255
        tiny.build(SIZES, texts(), small, np.ones((IMAGES, 1)), AugmentConfig(), "a photo of", Path(place))
        yield Path(place)


def load(place: Path) -> Loaded:
    """The model as training loads it, but without dropout."""
    config = ModelConfig(checkpoint=str(place), image_size=IMAGE_SIZE, tiny=SIZES)
    loaded = loading.load(config, place, MAX_TOKENS, dropout=0.0)
    loaded.model.language_model.config.dropout = 0.0
    for module in loaded.model.language_model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return loaded


def pixels() -> np.ndarray:
    """uint8 (N, S, S, 3) of noise."""
    return np.random.default_rng(0).integers(0, 256, (IMAGES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


def split(loaded: Loaded) -> Split:
    """All images with their texts."""
    captions = [loaded.caption.encode(caption) for _, caption in texts()]
    concepts = [loaded.concept.encode(sentence) for sentence, _ in texts()]
    return Split([f"image_{i}" for i in range(IMAGES)], pixels(), captions, concepts)
