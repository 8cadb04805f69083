"""Family `prefix`: an image encoder, a connector, and a causal language model, against transformers' own."""

import json
from pathlib import Path

import pytest
import torch
from support import prefix as small
from support.models import TEXTS, pixels
from support.shared_folders import made_once
from transformers import AutoModel, AutoModelForCausalLM

from harness.config.sections import PredictConfig
from harness.decoding import predict
from harness.decoding.search import search
from harness.errors import UserError
from harness.machine import device
from harness.models import adapters, parts, problems
from harness.models.base import Samples
from harness.models.loading import Loaded, load_trained, save_trained
from harness.models.prefix import load, settings
from harness.models.settings import ConnectorConfig, ModelConfig
from harness.training.settings import TrainConfig

device.probe("cpu")
PAIRS = [("clip", "gpt2"), ("convnext", "llama"), ("cvt", "qwen2"), ("clip", "opt")]
TRAIN = TrainConfig(
    batch_size=4,
    micro_batch_size=2,
    learning_rate=1e-2,
    warmup_steps=0,
    precision="fp32",
    language_dropout=0,
    max_caption_tokens=60,
    stages=[{"epochs": 1, "losses": {"caption": 1}}],
)
SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "prefix", small.build)


def model_config(folder: Path, vision: str = "clip", language: str = "gpt2", **changes) -> ModelConfig:
    named = {"vision_checkpoint": str(folder / vision), "language_checkpoint": str(folder / language)}
    return ModelConfig(family="prefix", image_size=SIZE, **named, **changes)


def loaded(folder: Path, vision: str = "clip", language: str = "gpt2", train=TRAIN, **changes) -> Loaded:
    return load(model_config(folder, vision, language, **changes), train, None, torch.float32)


def batch(found: Loaded, count: int = 3):
    """Images and captions of different lengths, as the model takes them."""
    texts = [found.caption.encode(TEXTS[i][1]) for i in range(count)]
    return found.normalise(torch.from_numpy(pixels(count, SIZE))), found.caption.collate(texts)


def prefix(found: Loaded, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What the language model reads: the image's embeddings, then those of the ids."""
    words = found.model.language.get_input_embeddings()(ids)
    return torch.cat([found.model.connector(found.model.vision(images)), words], 1)


@pytest.mark.parametrize(("vision", "language"), PAIRS)
@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_generate(folder, vision, language, beams):
    found = loaded(folder, vision, language)
    model, codec = found.model.eval(), found.caption
    images, _ = batch(found)
    options = PredictConfig(
        num_beams=beams, max_new_tokens=20, min_new_tokens=0, no_repeat_ngram_size=3, repetition_penalty=1.2
    )
    prompts = torch.tensor(codec.prompt).expand(len(images), -1)
    with model.decoder(beams, 20) as begin:
        ours = search(begin(images, prompts), options, codec.end, codec.pad).ids[:, 0]
    embeds = prefix(found, images, prompts)
    theirs = model.language.generate(
        inputs_embeds=embeds,
        attention_mask=embeds.new_ones(embeds.shape[:2], dtype=torch.long),
        num_beams=beams,
        max_new_tokens=20,
        no_repeat_ngram_size=3,
        repetition_penalty=1.2,
        do_sample=False,
        eos_token_id=codec.end,
        pad_token_id=codec.pad,
    )
    assert len({tuple(row) for row in theirs.tolist()}) > 1
    assert [codec.decode(row) for row in ours.tolist()] == [codec.decode(row) for row in theirs.tolist()]


@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_the_loss_is_that_of_transformers(folder, vision, language):
    found = loaded(folder, vision, language)
    found.model.eval()
    images, text = batch(found)
    ours = found.model(images, text).caption
    embeds = prefix(found, images, text["ids"])
    before = embeds.shape[1] - text["ids"].shape[1]
    mask = torch.nn.functional.pad(text["mask"], (before, 0), value=1)
    labels = torch.nn.functional.pad(text["labels"], (before, 0), value=-100)
    theirs = found.model.language(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    count = (text["labels"] != -100).sum()
    torch.testing.assert_close(ours / count, theirs, rtol=1e-6, atol=1e-6)
    seen = {}
    again = Samples(text, lambda logits: seen.setdefault("logits", logits).sum())
    found.model(images, samples=again)
    assert seen["logits"].shape[:2] == text["ids"].shape
