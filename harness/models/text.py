"""Captions and concept sentences as ids and back, with masks, end tokens and their loss as in LAVIS."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from harness.machine.device import moved

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a token without a loss."""
_LAVIS_STRIPPED = re.compile(r"[.!\"()*#:;~]")


def clean_caption(caption: str, how: Literal["lavis", "none"], max_words: int) -> str:
    """A training caption as the model sees it, cut to `max_words` (LAVIS's BlipCaptionProcessor)."""
    if how == "lavis":
        caption = _LAVIS_STRIPPED.sub(" ", caption.lower())
    return " ".join(caption.split()[:max_words])


def concept_sentence(names: Sequence[str]) -> str:
    """The text of the concept loss (the paper's section 3.1)."""
    return f"The image shows {', '.join(names)}."


@dataclass(frozen=True)
class Text:
    """Token ids (T,); the first `prompt` ids have no loss."""

    ids: list[int]
    prompt: int

    @property
    def predicted(self) -> int:
        """The number of tokens with a loss; the first of a sequence is never predicted."""
        return len(self.ids) - max(self.prompt, 1)


@dataclass(frozen=True)
class Codec:
    """Text to ids and back for one part of the model; `prompt`, with the start token, precedes the text.

    `words` is the text of the prompt, if it has one.
    """

    tokenizer: "PreTrainedTokenizerBase"
    prompt: tuple[int, ...]
    end: int
    pad: int
    max_tokens: int
    separator: str = ""
    words: str = ""

    def prompt_after(self, text: str, most: int) -> tuple[int, ...]:
        """The ids of a prompt that begins with a text of its own, of which at most `most` tokens are kept."""
        if not text:
            return self.prompt
        start, *rest = self.prompt
        if self.words:
            rest = self.tokenizer(self.separator + self.words, add_special_tokens=False).input_ids
        own = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return (start, *own[:most], *rest)

    def encode(self, text: str, prompt: Sequence[int] | None = None) -> Text:
        """The ids of a text, cut to `max_tokens` with the end token; in LAVIS long captions lose it.

        `prompt` are the ids before it, by default those of the codec.
        """
        prompt = self.prompt if prompt is None else prompt
        ids = self.tokenizer(self.separator + text, add_special_tokens=False, verbose=False).input_ids
        return Text([*prompt, *ids[: self.max_tokens - 1], self.end], len(prompt))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of new token ids up to the first end token."""
        kept = list(ids)
        if self.end in kept:
            kept = kept[: kept.index(self.end)]
        return " ".join(self.tokenizer.decode(kept, skip_special_tokens=True).split())

    def collate(self, texts: Sequence[Text], multiple: int = 1) -> dict[str, Tensor]:
        """Batch texts -> ids, mask and labels, each (B, T), padded on the right.

        T is the longest length, rounded up to a multiple but not beyond the longest text that `encode` gives.
        """
        longest = max(len(text.ids) for text in texts)
        rounded = multiple * math.ceil(longest / multiple)
        prompt = max([len(self.prompt), *(text.prompt for text in texts if text.predicted)])
        width = max(longest, min(rounded, prompt + self.max_tokens))
        ids = torch.full((len(texts), width), self.pad)
        labels = torch.full((len(texts), width), IGNORE)
        mask = torch.zeros((len(texts), width), dtype=torch.long)
        for row, text in enumerate(texts):
            length = len(text.ids)
            ids[row, :length] = torch.tensor(text.ids)
            labels[row, text.prompt : length] = ids[row, text.prompt : length]
            mask[row, :length] = 1
        return {"ids": ids, "mask": mask, "labels": labels}


def summed_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the next token, summed over labels except -100; logits (B, T, V), labels (B, T)."""
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def to_device(batch: Mapping[str, Tensor] | None, device: torch.device) -> dict[str, Tensor] | None:
    """A collated batch with its tensors on another device."""
    return None if batch is None else {key: moved(value, device) for key, value in batch.items()}
