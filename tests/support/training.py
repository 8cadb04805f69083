"""Training of a tiny checkpoint in this process, and the same steps in plain PyTorch."""

import gc
import json
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from harness.concepts.settings import HeadConfig
from harness.config.sections import AugmentConfig
from harness.models import head
from harness.models.blip2.model import Captioner
from harness.models.text import IGNORE
from harness.training import schedule, train
from harness.training.settings import TrainConfig
from support.models import FINDINGS, ORGANS, TEXTS, load_tiny, pixels, stages

HEAD = (ORGANS + FINDINGS, HeadConfig())
"""The labels of a head in tests, and its settings."""


class Interrupted(Exception):
    """What a test raises to stop a training."""


def alive():
    """The optimisers and models in memory, by type: a weak proxy whose object is gone has no class."""
    return [kept for kept in gc.get_objects() if issubclass(type(kept), torch.optim.AdamW | Captioner)]


def config(**changes):
    """The section `train` of a training of three steps an epoch: two epochs with concepts, one without."""
    values = {
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "precision": "fp32",
        "stages": stages(2, 1),
    }
    return TrainConfig(**(values | changes))


def splits(loaded):
    """20 images of noise to train with and 4 to validate with, and their texts."""

    def split(name, chosen, seed):
        texts = [TEXTS[i] for i in chosen]
        return train.Split(
            [f"{name}_{i}" for i in chosen],
            pixels(len(texts), seed=seed),
            [loaded.caption.encode(caption) for _, caption in texts],
            [loaded.concept.encode(concepts) for concepts, _ in texts],
            labels_of_texts(chosen),
        )

    return {"train": split("train", range(20), 1), "valid": split("valid", range(0, 20, 5), 2)}


def labels_of_texts(chosen):
    """The labels of these texts, by their numbers in `HEAD`."""
    return [[n for n, word in enumerate(HEAD[0]) if word in TEXTS[i][1]] for i in chosen]


def with_head(loaded, **changes):
    """The same, with a head for the labels of `TEXTS`."""
    numbers = [number for own in labels_of_texts(range(20)) for number in own]
    counts = np.bincount(numbers, minlength=len(HEAD[0]))
    head.attach(loaded.model, HEAD[1].model_copy(update=changes), counts.tolist(), 20)
    return loaded


@cache
def data_of(folder, **model):
    """The splits for a checkpoint, which no training changes."""
    return splits(load_tiny(folder, **model))


def said(words, letter="i"):
    """Made-up measures of captions: the share of a letter, and a number that depends on the image too."""
    texts = ["".join(caption.split()) for _, caption in words]
    share = [text.count(letter) / max(len(text), 1) for text in texts]
    own = [(len(text) + image) % 7 / 7 for (image, _), text in zip(words, texts, strict=True)]
    return {"rouge1": np.array(share), "bleu1": np.array(own)}


def measure(reward, words):
    """`said` for the metrics of a reward."""
    return reward, said(words)


def run(folder, directory, settings, *, log=lambda row: None, evaluate=None, dropout=0.0, load=None, **model):
    """Train the tiny checkpoint of `folder` -> what is loaded at the end, and the rows of losses.jsonl.

    `load` loads another model with the tokenizers of that folder.
    """
    directory.mkdir(exist_ok=True)

    def tiny():
        return load_tiny(folder, dropout=dropout, **model)

    scores = evaluate or (lambda: {"valid_primary": 0.0})
    data = data_of(folder, **model)
    training = train.Training(
        settings,
        AugmentConfig(),
        load or tiny,
        data,
        "cpu",
        42,
        directory,
        log,
        lambda loaded: scores(),
        measure=measure,
    )
    loaded = training.run()
    return loaded, [json.loads(line) for line in (directory / "losses.jsonl").read_text().splitlines()]


def by_hand(folder, settings, language_model, place="cpu"):
    """Both stages in plain PyTorch: AdamW, mean losses over the tokens of the global batch, clipping."""
    loaded = load_tiny(folder, language_model=language_model)
    model, split = loaded.model.to(place), splits(loaded)["train"]
    lengths = np.array([len(text.ids) for text in split.captions])
    losses = []
    for stage in schedule.stages(settings):
        model.freeze(["caption", "concept"] if stage.number == 1 else ["caption"])
        own = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in own if p.ndim > 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0}],
            weight_decay=settings.weight_decay,
            betas=settings.betas,
        )
        model.train()
        total = stage.epochs * 3
        for step in range(total):
            epoch, number = divmod(step, 3)
            indices = schedule.epoch_batches(lengths, 8, 42, stage.number, epoch)[number]
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(settings, stage.learning_rate, step, total, 3)
            captions = moved(loaded.caption.collate([split.captions[i] for i in indices]), place)
            concepts = moved(loaded.concept.collate([split.concepts[i] for i in indices]), place)
            images = torch.from_numpy(split.pixels[indices]).to(place)
            queries, states = model.see(loaded.normalise(images))
            if language_model:
                loss = mean_loss(model._speak(queries, captions["ids"], captions["mask"]), captions, 0.0)
            else:
                loss = mean_loss(model.read(captions["ids"], states), captions, settings.label_smoothing)
            if stage.number == 1:
                loss = loss + mean_loss(
                    model.read(concepts["ids"], states), concepts, settings.label_smoothing
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own, settings.max_grad_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
    return model, losses


def moved(batch, place):
    """A collated batch on a device."""
    return {name: values.to(place) for name, values in batch.items()}


def mean_loss(logits, batch, smoothing):
    """Cross-entropy of the next token, the mean over all tokens that count."""
    return F.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORE, label_smoothing=smoothing
    )
