"""BLEURT (Sellam et al. 2020): the network and the tokenizers of its checkpoints on the hub.

Weights have the names of the package bleurt-pytorch, which reads the same folders and cannot be imported
beside transformers 5.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertTokenizerFast, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

DEFAULTS = {
    "vocab_size": 30522,
    "embedding_size": None,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
"""The sizes that a `config.json` leaves out."""


class BleurtConfig(PretrainedConfig):
    """The sizes of a BLEURT; `config_of` gives those of a folder."""

    model_type = "bleurt"


def config_of(folder: Path) -> BleurtConfig:
    """The config of a checkpoint's folder."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return BleurtConfig(**DEFAULTS | values)


class _Part(PreTrainedModel):
    config_class = BleurtConfig
    base_model_prefix = "bleurt"
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["position_ids"]


class Bleurt(_Part):
    """Ids (B, T) of pairs, their segments and their mask -> a score of each pair, (B,).

    `pooled` gives what `classifier` makes the scores from, (B, D).
    """

    def __init__(self, config: BleurtConfig) -> None:
        super().__init__(config)
        self.bleurt = _Encoder(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def pooled(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        return self.bleurt(ids, segments, mask)

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        return self.classifier(self.pooled(ids, segments, mask)).flatten()


class _Encoder(_Part):
    def __init__(self, config: BleurtConfig) -> None:
        super().__init__(config)
        self.embeddings = _Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        if config.embedding_size is not None:
            self.encoder.embedding_projection = nn.Linear(config.embedding_size, config.hidden_size)
        self.pooler = nn.Module()
        self.pooler.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embeddings(ids, segments)
        if self.config.embedding_size is not None:
            hidden = self.encoder.embedding_projection(hidden)
        # as bleurt-pytorch has it: the lowest number is added to the scores of padding
        mask = (1 - mask[:, None, None].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        for layer in self.encoder.layer:
            hidden = layer(hidden, mask)
        return self.pooler.dense(hidden[:, 0]).tanh()


class _Embeddings(nn.Module):
    def __init__(self, config: BleurtConfig) -> None:
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, segments: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        words = self.word_embeddings(ids) + self.token_type_embeddings(segments)
        return self.dropout(self.LayerNorm(words + self.position_embeddings(positions)))


class _Layer(nn.Module):
    def __init__(self, config: BleurtConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = nn.Module()
        self.attention.self = _Attention(config)
        self.attention.output = _Output(config, width)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, config.intermediate_size)
        self.output = _Output(config, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = self.attention.output(self.attention.self(hidden, mask), hidden)
        return self.output(self.act(self.intermediate.dense(hidden)), hidden)


class _Output(nn.Module):
    def __init__(self, config: BleurtConfig, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + before)


class _Attention(nn.Module):
    def __init__(self, config: BleurtConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            part(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
        context = self.dropout(scores.softmax(-1)) @ value
        return context.transpose(1, 2).flatten(2)


class Encoded(NamedTuple):
    """Ids of each pair, how many of them are the first text's, and how many they were before the cut."""

    ids: list[list[int]]
    first: list[int]
    lengths: list[int]


def tokenizer_of(folder: Path) -> "WordPieces | SentencePieces":
    """The tokenizer of a folder: words and their pieces, or BLEURT-20's, which is sentencepiece's.

    Its `encode` gives the ids of pairs of texts, `[CLS] first [SEP] second [SEP]`, cut to `limit` tokens.
    """
    words = any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
    return WordPieces(BertTokenizerFast.from_pretrained(folder)) if words else SentencePieces(folder)


class WordPieces:
    """Words and their pieces, as BERT's."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, pairs: Sequence[tuple[str, str]], limit: int) -> Encoded:
        # as lists: a single empty text would be taken for none and get no [SEP]
        sides = tuple(map(list, zip(*pairs, strict=True)))
        lengths = [len(ids) for ids in self.tokenizer(*sides, verbose=False)["input_ids"]]
        cut = self.tokenizer(*sides, truncation=True, max_length=limit)
        first = [segments.count(0) for segments in cut["token_type_ids"]]
        return Encoded(cut["input_ids"], first, lengths)


class SentencePieces:
    """Pieces of `spm.model`, taken apart as by transformers' slow tokenizer of DeBERTa-v2."""

    def __init__(self, folder: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            file = folder / name
            settings |= json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.model = SentencePieceProcessor(model_file=str(folder / "spm.model"))
        self.lower = settings.get("do_lower_case", False)
        self.start, self.end = (self._special(settings, kind) for kind in ("cls", "sep"))

    def _special(self, settings: dict[str, Any], kind: str) -> int:
        token = settings.get(f"{kind}_token", f"[{kind.upper()}]")
        piece = token["content"] if isinstance(token, dict) else token
        found = self.model.piece_to_id(piece)
        if found == self.model.unk_id():
            raise ValueError(f"spm.model has no {piece}")
        return found

    def encode(self, pairs: Sequence[tuple[str, str]], limit: int) -> Encoded:
        texts = [text.lower() if self.lower else text for pair in pairs for text in pair]
        pieces = self.model.encode(texts)
        sides = list(zip(pieces[::2], pieces[1::2], strict=True))
        kept = [_longest_first(*side, limit - 3) for side in sides]
        ids = [[self.start, *one, self.end, *other, self.end] for one, other in kept]
        lengths = [len(one) + len(other) + 3 for one, other in sides]
        return Encoded(ids, [len(one) + 2 for one, _ in kept], lengths)


def _longest_first(one: list[int], other: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Cut the longer text to the other's length, then both; of an odd number the second loses one more."""
    surplus = max(len(one) + len(other) - limit, 0)
    longer = min(abs(len(one) - len(other)), surplus)
    both = surplus - longer
    first = longer + both // 2 if len(one) > len(other) else both // 2
    return one[: len(one) - first], other[: len(other) - (surplus - first)]


def padded(encoded: Encoded, rows: Sequence[int], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a `Bleurt` takes for some rows of encoded pairs: ids, segments and mask, each (B, width)."""
    ids, first = ([column[row] for row in rows] for column in encoded[:2])
    batch = torch.zeros(len(ids), width, dtype=torch.long)
    for row, tokens in enumerate(ids):
        batch[row, : len(tokens)] = torch.tensor(tokens)
    places, lengths = torch.arange(width), torch.tensor([len(tokens) for tokens in ids])[:, None]
    mask = (places < lengths).long()
    return batch, (places >= torch.tensor(first)[:, None]).long() * mask, mask
