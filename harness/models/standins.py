"""Small BLEURT and CLIP models for machines without weights, trained in seconds on the training split.

They have the classes and files of real checkpoints, so metrics load them in the same way. They are marked, so
their scores never count as official.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.data import images as data_images
from harness.models import checkpoints
from harness.models.remarks import quieten
from harness.store import fingerprint

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORDS = 4000

BLEURT_STEPS, BLEURT_BATCH = 200, 32
CLIP_STEPS, CLIP_BATCH = 130, 64
IMAGE_SIZE, PATCH_SIZE = 112, 16


def build_bleurt(captions: Sequence[str], folder: Path, seed: int = 0) -> None:
    """Train a BLEURT to predict the overlap of made-up pairs of captions, and save it in `folder`.

    As in BLEURT's own pre-training (Sellam et al. 2020, section 4), a caption is paired with a copy in which
    words are dropped, swapped or replaced; also with another caption. The target is the mean of unigram and
    bigram F1. The same captions and seed give the same model.
    """
    quieten()
    from transformers import BertTokenizerFast

    from harness.models.bleurt import DEFAULTS, Bleurt, BleurtConfig, WordPieces

    texts = sorted({" ".join(caption.lower().split()) for caption in captions} - {""})
    tokenizer = _tokenizer(BertTokenizerFast, texts, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": 512,
        }
        model = Bleurt(BleurtConfig(**DEFAULTS | sizes))
        _attend_to_equals(model.bleurt)
        _learn(model, _bleurt_losses(model, WordPieces(tokenizer), texts, seed), BLEURT_STEPS, 2e-3)
    _save(model, folder, "bleurt", [texts, seed])


def build_clip(images: Sequence[Path], captions: Sequence[str], folder: Path, seed: int = 0) -> None:
    """Train a CLIP contrastively on images and their captions, and save it in `folder`.

    The same images, captions and seed give the same model.
    """
    quieten()
    from transformers import BertTokenizerFast, CLIPConfig, CLIPImageProcessor, CLIPModel

    texts = [" ".join(caption.lower().split()) for caption in captions]
    tokenizer = _tokenizer(BertTokenizerFast, sorted(set(texts)), folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    processor.save_pretrained(folder)
    pixels = torch.cat([_pixels(processor, path) for path in images])
    width = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(
            CLIPConfig(
                vision_config={
                    **width,
                    "num_hidden_layers": 3,
                    "image_size": IMAGE_SIZE,
                    "patch_size": PATCH_SIZE,
                },
                text_config={
                    **width,
                    "num_hidden_layers": 1,
                    "vocab_size": len(tokenizer),
                    "max_position_embeddings": 77,
                    "bos_token_id": tokenizer.cls_token_id,
                    "eos_token_id": tokenizer.sep_token_id,
                    "pad_token_id": tokenizer.pad_token_id,
                },
                projection_dim=96,
            )
        )
        _learn(model, _clip_losses(model, tokenizer, pixels, texts), CLIP_STEPS, 1e-3)
    _save(model, folder, "clip", [texts, [path.stat().st_size for path in images], seed])


def _tokenizer(kind: type, texts: Sequence[str], folder: Path) -> Any:
    """Save a WordPiece tokenizer of the most frequent words and of all characters in `folder` -> it.

    The trainers of `tokenizers` are not used, because they break ties differently in every process.
    """
    words = Counter(word for caption in texts for word in _words(caption))
    characters = sorted(set("".join(words)))
    common = sorted(words, key=lambda word: (-words[word], word))[:MAX_WORDS]
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters), *common]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    tokenizer = kind(str(vocabulary), model_max_length=512)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _words(caption: str) -> list[str]:
    from tokenizers import normalizers, pre_tokenizers

    normal = normalizers.BertNormalizer(lowercase=True).normalize_str(caption)
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normal)]


def _attend_to_equals(encoder: Any) -> None:
    """Initialise attention so that equal words attend to each other; learning that takes minutes."""
    torch.nn.init.normal_(encoder.embeddings.word_embeddings.weight, std=1.0)
    torch.nn.init.normal_(encoder.embeddings.token_type_embeddings.weight, std=0.5)
    attention = encoder.encoder.layer[0].attention.self
    for projection in (attention.query, attention.key):
        torch.nn.init.eye_(projection.weight).data.mul_(1.4)


def _bleurt_losses(model: Any, tokenizer: Any, texts: Sequence[str], seed: int) -> Callable[[], Tensor]:
    from harness.models.bleurt import padded

    draw = random.Random(seed)
    vocabulary = [word for caption in texts for word in caption.split()]

    def loss() -> Tensor:
        references = [draw.choice(texts) for _ in range(BLEURT_BATCH)]
        predictions = [_perturb(reference, texts, vocabulary, draw) for reference in references]
        targets = torch.tensor([_overlap(*pair) for pair in zip(references, predictions, strict=True)])
        encoded = tokenizer.encode(list(zip(references, predictions, strict=True)), 256)
        batch = padded(encoded, range(BLEURT_BATCH), max(map(len, encoded.ids)))
        return functional.mse_loss(model(*batch), targets)

    return loss


def _perturb(caption: str, texts: Sequence[str], vocabulary: Sequence[str], draw: random.Random) -> str:
    """The caption itself, another caption, or the caption with words dropped, replaced and swapped."""
    kind = draw.random()
    if kind < 0.1:
        return caption
    if kind < 0.3:
        return draw.choice(texts)
    strength = draw.random()
    words = [word for word in caption.split() if draw.random() > strength * (kind < 0.65)]
    words = [draw.choice(vocabulary) if draw.random() < strength * (kind > 0.5) else word for word in words]
    if words and kind > 0.85:
        cut = draw.randrange(len(words))
        words = words[cut:] + words[:cut]
    return " ".join(words)


def _overlap(reference: str, prediction: str) -> float:
    scores = []
    for size in (1, 2):
        ours, theirs = (Counter(_ngrams(caption.split(), size)) for caption in (prediction, reference))
        total = ours.total() + theirs.total()
        scores.append(2 * (ours & theirs).total() / total if total else 1.0)
    return sum(scores) / 2


def _ngrams(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)), strict=False)


def _pixels(processor: Any, path: Path) -> Tensor:
    return processor(data_images.decode(path), return_tensors="pt")["pixel_values"]


def _clip_losses(model: Any, tokenizer: Any, pixels: Tensor, texts: Sequence[str]) -> Callable[[], Tensor]:
    identity = {caption: number for number, caption in enumerate(dict.fromkeys(texts))}
    same = torch.tensor([identity[caption] for caption in texts])
    order: list[int] = []

    def loss() -> Tensor:
        if len(order) < min(CLIP_BATCH, len(texts)):
            order[:] = torch.randperm(len(texts)).tolist()
        rows = [order.pop() for _ in range(min(CLIP_BATCH, len(texts)))]
        # CLIPScore puts the same prefix before every caption
        captions = [f"a photo depicts {texts[row]}" for row in rows]
        batch = tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt")
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=_jitter(pixels[rows]),
        )
        # every image with the same caption is a right answer
        right = (same[rows][:, None] == same[rows]).float()
        right /= right.sum(1, keepdim=True)
        logits = out.logits_per_text
        return (functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)) / 2

    return loss


def _jitter(pixels: Tensor) -> Tensor:
    """Shift the images by a few pixels and change their contrast, against overfitting to few images."""
    shift = torch.randint(-6, 7, (2,)).tolist()
    contrast = 1 + 0.2 * torch.randn(len(pixels), 1, 1, 1)
    return torch.roll(pixels, shift, (2, 3)) * contrast


def _learn(model: Any, loss_of_next_batch: Callable[[], Tensor], steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    model.train()
    for _ in range(steps):
        loss = loss_of_next_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _save(model: Any, folder: Path, kind: str, inputs: list[Any]) -> None:
    model.save_pretrained(folder)
    checkpoints.mark_standin(folder, f"{kind}-{fingerprint([checkpoints.STANDIN_VERSION, *inputs])[:8]}")
