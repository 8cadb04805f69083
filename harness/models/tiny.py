"""A small BLIP-2 for machines without weights; like the real one, it consists of pre-trained parts.

Its OPT learns the training captions and is then frozen. Its ViT learns to predict the concepts of an image.
After that its Q-Former can learn to write captions and concept sentences, as in published checkpoints.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoTokenizer,
    BertTokenizerFast,
    Blip2Config,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from harness.config.sections import AugmentConfig
from harness.data.augment import augment
from harness.machine import device
from harness.models import checkpoints
from harness.models.blip2.loading import QFORMER_TOKENIZER
from harness.models.blip2.model import Captioner
from harness.models.blip2.sizes import image_side
from harness.models.blip2.text import DEC, language_codec, qformer_codec
from harness.models.prefix.checks import vision_values
from harness.models.remarks import quieten
from harness.models.settings import TinyConfig
from harness.models.text import IGNORE, Codec, Text

BATCH_SIZE = 32
LEARNING_RATE = 2e-3
VISION_LEARNING_RATE = 2e-3
CONNECTOR_BATCH_SIZE, CONNECTOR_LEARNING_RATE = 16, 3e-3
_START, _PAD, _END, _IMAGE = "</s>", "<pad>", "<end>", "<image>"


def build(
    config: TinyConfig,
    texts: Sequence[tuple[str, str]],
    pixels: Any,
    concepts: np.ndarray,
    augmentation: AugmentConfig,
    prompt: str,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Build and save a small BLIP-2 that `blip2.load` reads like a published one.

    texts: (concept sentence, caption) of the training split, as the model will see them. The language model
    learns to continue a concept sentence with the caption, so the Q-Former's output before the caption can
    control it. `pixels[indices]`: uint8 (B, S, S, 3), S = `image_side(config)`, of the same images. concepts:
    (N, C), 1 if an image has the concept. The same arguments give the same weights.
    """
    quieten()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        _save_tokenizers(config, texts, folder)
        qformer = AutoTokenizer.from_pretrained(folder / QFORMER_TOKENIZER, trust_remote_code=False)
        language = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        blip2 = _blip2_config(config, language, len(qformer))
        model = Captioner(blip2)
        model.use_plain_attention()
        nn.init.normal_(model.query_tokens, std=0.02)
        codec = language_codec(language, blip2.text_config, prompt, max_tokens=96)
        steps = _steps(config, concepts)
        reports = _reports(progress, steps)
        _pretrain_text(model.language_model, codec, texts, config, steps[0], reports[0])
        units = _units(pixels, len(texts))
        _pretrain_vision(
            model.vision_model, pixels, units, concepts, augmentation, config, steps[1], reports[1]
        )
        codecs = codec, qformer_codec(qformer, max_tokens=96)
        _pretrain_connector(model, codecs, texts, pixels, units, augmentation, config, steps[2], reports[2])
        _save(model, units, folder)


def build_vision(
    config: TinyConfig,
    pixels: Any,
    concepts: np.ndarray,
    augmentation: AugmentConfig,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Build and save a small ViT that has learned to predict the concepts of the images; see `build`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ViTModel(ViTConfig(**_vision_config(config)), add_pooling_layer=False)
        model.set_attn_implementation("eager")
        units, steps = _units(pixels, len(concepts)), _steps(config, concepts)[1]
        report = _reports(progress, [steps])[0]
        _pretrain_vision(model, pixels, units, concepts, augmentation, config, steps, report)
        _save(model, units, folder)


def _steps(config: TinyConfig, concepts: np.ndarray) -> list[int]:
    """Steps of the pre-training of language model, ViT and connector; `concepts` has a row for each image."""
    each = [math.ceil(len(concepts) / size) for size in (BATCH_SIZE, BATCH_SIZE, CONNECTOR_BATCH_SIZE)]
    epochs = config.text_epochs, config.vision_epochs if concepts.shape[1] else 0, config.connector_epochs
    return [steps * number for steps, number in zip(each, epochs, strict=True)]


def _reports(
    progress: Callable[[int, int], None] | None, steps: Sequence[int]
) -> list[Callable[[int], None]]:
    """For each training, what it calls after each of its steps; `progress` gets the steps of all."""

    def after(before: int) -> Callable[[int], None]:
        return lambda step: progress and progress(before + step + 1, sum(steps))

    return [after(sum(steps[:number])) for number in range(len(steps))]


def _units(pixels: Any, count: int) -> tuple[float, float]:
    """Mean and deviation of the grey levels of up to 200 of these images."""
    sample = pixels[np.linspace(0, count - 1, min(count, 200)).astype(int)].astype(np.float32)
    return float(sample.mean()), float(sample.std())


def _save(model: PreTrainedModel, units: tuple[float, float], folder: Path) -> None:
    from transformers import BlipImageProcessor  # in 5 its import says that torchvision is missing

    model.save_pretrained(folder)
    mean, std = ([unit / 255] * 3 for unit in units)
    BlipImageProcessor(image_mean=mean, image_std=std).save_pretrained(folder)
    checkpoints.mark_standin(folder, folder.name)


def _save_tokenizers(config: TinyConfig, texts: Sequence[tuple[str, str]], folder: Path) -> None:
    """Train and save both tokenizers; the same texts give the same files."""
    corpus = [text for pair in texts for text in pair]
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", DEC]
    # the trainer numbers letters within words in the order of a hash map, which differs in every process, and
    # breaks ties by these numbers (tokenizers issue 1794); it numbers special tokens in the given order
    within = sorted({"##" + letter for text in corpus for word in _words(words, text) for letter in word[1:]})
    words.train_from_iterator(
        corpus,
        trainers.WordPieceTrainer(
            vocab_size=config.vocab_size, special_tokens=special + within, show_progress=False
        ),
    )
    vocabulary = sorted(words.get_vocab().items(), key=lambda item: item[1])
    (folder / QFORMER_TOKENIZER).mkdir(parents=True, exist_ok=True)
    vocabulary_file = folder / QFORMER_TOKENIZER / "vocab.txt"
    vocabulary_file.write_text("\n".join(word for word, _ in vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(str(vocabulary_file), bos_token=DEC).save_pretrained(folder / QFORMER_TOKENIZER)

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[_PAD, _START, _END, _IMAGE],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token=_START,
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=[_IMAGE],
    ).save_pretrained(folder)


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    return [word for word, _ in pieces]


def _vision_config(config: TinyConfig) -> dict[str, Any]:
    values = {key: value for key, value in vision_values(config).items() if key != "model_type"}
    return values | {"image_size": image_side(config)}


def _blip2_config(
    config: TinyConfig, language: PreTrainedTokenizerFast, qformer_vocabulary: int
) -> Blip2Config:
    heads = max(config.hidden_size // 32, 1)
    return Blip2Config(
        vision_config=_vision_config(config),
        qformer_config={
            "vocab_size": qformer_vocabulary,
            "hidden_size": config.hidden_size,
            "encoder_hidden_size": config.hidden_size,
            "intermediate_size": 4 * config.hidden_size,
            "num_hidden_layers": config.qformer_layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 256,
            "use_qformer_text_input": True,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": len(language),
            "hidden_size": config.text_hidden_size,
            "word_embed_proj_dim": config.text_hidden_size,
            "ffn_dim": 4 * config.text_hidden_size,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": max(config.text_hidden_size // 48, 1),
            "max_position_embeddings": 512,
            "dropout": 0.1,
            "bos_token_id": language.bos_token_id,
            "eos_token_id": language.eos_token_id,
            "pad_token_id": language.pad_token_id,
        },
        num_query_tokens=config.num_query_tokens,
        image_token_index=language.convert_tokens_to_ids(_IMAGE),
        initializer_range=0.02,
    )


def _pretrain_text(
    model: OPTForCausalLM,
    codec: Codec,
    texts: Sequence[tuple[str, str]],
    config: TinyConfig,
    steps: int,
    report: Callable[[int], None],
) -> None:
    """Train language modelling of `<concepts> </s> <prompt> <caption> <end>`; only the caption has a loss."""
    sequences = [
        (codec.tokenizer(concepts, add_special_tokens=False).input_ids[:64], codec.encode(caption))
        for concepts, caption in texts
    ]
    steps_per_epoch = math.ceil(len(sequences) / BATCH_SIZE)
    update = _optimiser(model, steps, LEARNING_RATE)
    # batches of similar length, shuffled in each epoch; else padding would be half of the work
    sequences.sort(key=lambda item: len(item[0]) + len(item[1].ids))
    order = torch.Generator().manual_seed(config.seed)
    bf16 = device.has_bf16("cpu")
    model.train()
    for step in range(steps):
        if step % steps_per_epoch == 0:
            starts = torch.randperm(steps_per_epoch, generator=order).tolist()
        start = starts[step % steps_per_epoch] * BATCH_SIZE
        ids, labels = _batch(sequences[start : start + BATCH_SIZE], codec.pad)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, attention_mask=(ids != codec.pad).long(), labels=labels).loss
        update(loss)
        report(step)


def _pretrain_vision(
    model: nn.Module,
    pixels: Any,
    units: tuple[float, float],
    concepts: np.ndarray,
    augmentation: AugmentConfig,
    config: TinyConfig,
    steps: int,
    report: Callable[[int], None],
) -> None:
    """Train multi-label classification of the concepts from the mean of the patches; drop its head."""
    if not steps:
        return
    classifier = nn.Sequential(_Mean(model), nn.Linear(config.hidden_size, concepts.shape[1]))
    update = _optimiser(classifier, steps, VISION_LEARNING_RATE)
    draw = torch.Generator().manual_seed(config.seed)
    labels = torch.from_numpy(concepts.astype(np.float32))
    bf16 = device.has_bf16("cpu")
    classifier.train()
    for step, chosen in enumerate(_chosen(len(labels), BATCH_SIZE, steps, draw)):
        planes = _planes(pixels, chosen, units, augmentation, draw)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = classifier(planes)
        update(nn.functional.binary_cross_entropy_with_logits(logits.float(), labels[chosen]))
        report(step)


def _chosen(count: int, size: int, steps: int, draw: torch.Generator) -> Iterator[torch.Tensor]:
    """The places of up to `size` of `count` images for each step; each epoch has an order of its own."""
    while steps > 0:
        batches = torch.randperm(count, generator=draw).split(size)[:steps]
        yield from batches
        steps -= len(batches)


def _planes(
    pixels: Any,
    chosen: torch.Tensor,
    units: tuple[float, float],
    augmentation: AugmentConfig,
    draw: torch.Generator,
) -> torch.Tensor:
    """The chosen images, augmented and normalised, (B, 3, S, S)."""
    images = augment(torch.from_numpy(np.ascontiguousarray(pixels[chosen.numpy()])), augmentation, draw)
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.sub_(units[0]).div_(units[1])


def _pretrain_connector(
    model: Captioner,
    codecs: tuple[Codec, Codec],
    texts: Sequence[tuple[str, str]],
    pixels: Any,
    units: tuple[float, float],
    augmentation: AugmentConfig,
    config: TinyConfig,
    steps: int,
    report: Callable[[int], None],
) -> None:
    """Train ViT, Q-Former and projection on captions and concept sentences, without dropout."""
    if not steps:
        return
    losses = ("caption", "concept") if any(sentence for sentence, _ in texts) else ("caption",)
    (caption, concept), draw = codecs, torch.Generator().manual_seed(config.seed)
    captions = [caption.encode(text) for _, text in texts]
    sentences = [concept.encode(text) if text else Text([*concept.prompt], 1) for text, _ in texts]
    model.freeze(losses)
    model.eval()
    model.autocast_dtype = torch.bfloat16 if device.has_bf16("cpu") else None
    update = _optimiser(model, steps, CONNECTOR_LEARNING_RATE)
    for step, chosen in enumerate(_chosen(len(texts), CONNECTOR_BATCH_SIZE, steps, draw)):
        planes = _planes(pixels, chosen, units, augmentation, draw)
        batches = {"caption": [captions[n] for n in chosen], "concept": [sentences[n] for n in chosen]}
        collated = {name: codec.collate(batches[name]) for name, codec in zip(losses, codecs, strict=False)}
        sums = model(planes, **collated)._asdict()
        update(sum(sums[name] / max(1, sum(text.predicted for text in batches[name])) for name in losses))
        report(step)


class _Mean(nn.Module):
    """The mean of a ViT's output over class token and patches, (B, D)."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        return self.vision(pixel_values=planes).last_hidden_state.mean(1)


def _optimiser(model: nn.Module, steps: int, rate: float) -> Callable[[torch.Tensor], None]:
    """A function that does one AdamW step for a loss, with a one-cycle schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, fused=True)
    warm_up = 0.1 if steps != 10 else 0.2  # torch divides by zero if the warm-up is exactly one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warm_up)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return update


def _batch(sequences: Sequence[tuple[list[int], Text]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prefix) + len(text.ids) for prefix, text in sequences)
    ids = torch.full((len(sequences), width), pad)
    labels = torch.full((len(sequences), width), IGNORE)
    for row, (prefix, text) in enumerate(sequences):
        whole = [*prefix, *text.ids]
        ids[row, : len(whole)] = torch.tensor(whole)
        first = len(prefix) + text.prompt
        labels[row, first : len(whole)] = ids[row, first : len(whole)]
    return ids, labels
