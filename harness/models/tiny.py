"""A small BLIP-2 made here, for machines without weights: its OPT learns the captions, then is frozen."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoTokenizer,
    BertTokenizerFast,
    Blip2Config,
    BlipImageProcessor,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from harness import checkpoints, device
from harness.config import TinyConfig
from harness.models.blip2 import IGNORE, Captioner
from harness.models.loading import QFORMER_TOKENIZER
from harness.models.text import DEC, Codec, Text, language_codec

BATCH_SIZE = 32
LEARNING_RATE = 2e-3
GRID = 8  # patches on a side of the position table as built; loading resizes it to the image size
_START, _PAD, _END, _IMAGE = "</s>", "<pad>", "<end>", "<image>"


def build(
    config: TinyConfig,
    texts: Sequence[tuple[str, str]],
    pixels: np.ndarray,
    prompt: str,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Build and save a small BLIP-2 that `loading.load` reads like a published one.

    texts: (concept sentence, caption) of the training split, as the model will see them. The language model
    learns to continue a concept sentence with the caption, so that what the Q-Former puts before it can steer
    it. pixels: uint8 (N, S, S, 3), a sample of the training images, for their mean and deviation. The same
    arguments give the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        _save_tokenizers(config, texts, folder)
        qformer = AutoTokenizer.from_pretrained(folder / QFORMER_TOKENIZER)
        language = AutoTokenizer.from_pretrained(folder)
        blip2 = _blip2_config(config, language, len(qformer))
        model = Captioner(blip2)
        nn.init.normal_(model.query_tokens, std=0.02)
        codec = language_codec(language, blip2.text_config, prompt, max_tokens=96)
        _pretrain(model.language_model, codec, texts, config, progress)
        model.save_pretrained(folder)
    grey = pixels.astype(np.float32) / 255
    processor = BlipImageProcessor(image_mean=[float(grey.mean())] * 3, image_std=[float(grey.std())] * 3)
    processor.save_pretrained(folder)
    checkpoints.mark_standin(folder, folder.name)


def _save_tokenizers(config: TinyConfig, texts: Sequence[tuple[str, str]], folder: Path) -> None:
    """Train both tokenizers, once: tokenizers' trainers break ties differently in every process."""
    corpus = [text for pair in texts for text in pair]
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", DEC]
    words.train_from_iterator(
        corpus,
        trainers.WordPieceTrainer(vocab_size=config.vocab_size, special_tokens=special, show_progress=False),
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


def _blip2_config(
    config: TinyConfig, language: PreTrainedTokenizerFast, qformer_vocabulary: int
) -> Blip2Config:
    heads = max(config.hidden_size // 32, 1)
    return Blip2Config(
        vision_config={
            "hidden_size": config.hidden_size,
            "intermediate_size": 4 * config.hidden_size,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": heads,
            "image_size": GRID * config.patch_size,
            "patch_size": config.patch_size,
            "initializer_range": 0.02,
        },
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


def _pretrain(
    model: OPTForCausalLM,
    codec: Codec,
    texts: Sequence[tuple[str, str]],
    config: TinyConfig,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Language modelling of `<concepts> </s> <prompt> <caption> <end>`, with a loss on the caption only."""
    sequences = [
        (codec.tokenizer(concepts, add_special_tokens=False).input_ids[:64], codec.encode(caption))
        for concepts, caption in texts
    ]
    steps_per_epoch = math.ceil(len(sequences) / BATCH_SIZE)
    steps = config.text_epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    # batches of like length, in an order drawn anew each epoch: padding would be half of the work
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
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress:
            progress(step + 1, steps)


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
