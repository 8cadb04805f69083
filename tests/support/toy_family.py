"""The smallest possible model family: image encoder, projection, and a frozen recurrent language model."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer

from harness.models import parts
from harness.models.base import FLOAT, HALF, Activations, Losses
from harness.models.loading import Loaded
from harness.models.text import IGNORE, Codec

LOSSES = ("caption", "concept", "reward")
WHOLE_IMAGES = False
WIDTH = 24


class Toy(nn.Module):
    """`base.Captioner` in its shortest form."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, WIDTH, 16, 16)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.speaker = nn.ModuleDict(
            {"words": nn.Embedding(words, WIDTH), "memory": nn.GRU(WIDTH, WIDTH, batch_first=True)}
        )

    @property
    def device(self):
        return self.projection.weight.device

    def image_features(self, pixels):
        return self.encoder(pixels).flatten(2).transpose(1, 2)

    def first(self, pixels):
        return self.projection(self.image_features(pixels).mean(1))[None]

    def read(self, ids, memory):
        hidden, memory = self.speaker.memory(self.speaker.words(ids), memory)
        return hidden @ self.speaker.words.weight.T, memory

    def forward(self, pixels, caption=None, concept=None, label_smoothing=0.0, samples=None, concepts=None):
        def loss(text):
            logits = self.read(text["ids"], self.first(pixels))[0][:, :-1].flatten(0, 1)
            counts = {"ignore_index": IGNORE, "reduction": "sum", "label_smoothing": label_smoothing}
            return F.cross_entropy(logits, text["labels"][:, 1:].flatten(), **counts)

        def reward():
            ids = samples.text["ids"]
            memory = self.first(pixels).repeat_interleave(len(ids) // len(pixels), 1)
            return samples.loss(self.read(ids, memory)[0])

        return Losses(*(text and loss(text) for text in (caption, concept)), samples and reward())

    @contextmanager
    def decoder(self, width, length):
        yield lambda pixels, prompts: Decoding(self, pixels, prompts, width)

    def part_of(self, name):
        return {"encoder": "vision", "speaker": "language"}.get(name.split(".")[0], "connector")

    def freeze(self, losses):
        parts.train_only(self)

    def is_saved(self, name):
        return parts.is_saved(self, name, ())

    def compute_in(self, dtype, vision_in_fp32):
        assert dtype is None

    def use_plain_attention(self):
        pass

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
        pass

    def parts_to_compile(self, how):
        return []


class Decoding:
    """`base.Decoding`; its memory (1, R, D) does not grow."""

    captured = False

    def __init__(self, model, pixels, prompts, width):
        self.model, self.context = model, prompts
        logits, memory = model.read(prompts, model.first(pixels))
        self.logits, self.memory = logits[:, -1], memory.repeat_interleave(width, 1)

    def step(self, tokens):
        logits, self.memory = self.model.read(tokens[:, None], self.memory)
        return logits[:, -1]

    def reorder(self, rows):
        self.memory = self.memory[:, rows]

    keep = reorder


@dataclass(frozen=True)
class Shape:
    """`base.Shape`; the numbers of activations are made up."""

    words: int

    def trained(self, train_vision):
        return WIDTH * WIDTH + WIDTH + (WIDTH * (3 * 16**2 + 1) if train_vision else 0)

    def frozen(self, train_vision, half):
        speaker = self.words * WIDTH + 6 * (WIDTH * WIDTH + WIDTH)
        vision = self.trained(True) - self.trained(train_vision)
        return FLOAT * vision + (HALF if half else FLOAT) * speaker

    def flops(self, work):
        return 1000 * work.batch

    def activations(self, work):
        return Activations(1000 * work.batch, 100 * work.batch, 0, 0, 0)


def checkpoints(model):
    return {"checkpoint": model.checkpoint}


def problems(model, train, new_tokens):
    return []


def settings(model):
    return {"family": "toy", "checkpoint": model.checkpoint}


def new(model):
    return ()


def shape(model, train):
    return Shape(300)


def built_from(model):
    return None


def codecs(model, folder, max_tokens):
    words = AutoTokenizer.from_pretrained(folder)
    return (Codec(words, (words.bos_token_id,), words.eos_token_id, words.pad_token_id, max_tokens),) * 2


def load(model, train, folder, frozen_dtype):
    caption, concept = codecs(model, folder, train.max_caption_tokens)
    torch.manual_seed(0)
    toy = Toy(len(caption.tokenizer))
    toy.trained_parts = parts.trained(model, train)
    return Loaded(toy, caption, concept, (0.5,) * 3, (0.5,) * 3)
