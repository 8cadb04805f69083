"""BLEURT (Sellam et al. 2020) by bleurt-pytorch, equal to one pair at a time to 1e-5."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness import checkpoints
from harness.config import BleurtConfig
from harness.metrics.base import Absent, Inputs, Measured, batches, model_name, sign, some_rows

OFFICIAL = {2023: "lucadiliello/BLEURT-20", 2024: "lucadiliello/BLEURT-20"}
OFFICIAL_SINCE_2025 = "lucadiliello/BLEURT-20-D12"
BATCH_TOKENS = 2048


def measure(inputs: Inputs) -> Measured:
    """BLEURT of each row after the official pre-processing.

    The organisers' code of 2023 for BLEURT is not public; that of 2025 pre-processes, and so does this, as
    the signature says.
    """
    config: BleurtConfig = inputs.config.bleurt
    found = checkpoints.find(config.checkpoint)
    if found is None:
        raise Absent(f"weights are not on this machine: {config.checkpoint}")
    pairs = list(zip(inputs.clean_references, inputs.clean_predictions, strict=True))
    scorer = load(found.folder, inputs.device)
    distinct = list(dict.fromkeys(pairs))
    scored = dict(zip(distinct, scorer.scores(distinct), strict=True))
    official = OFFICIAL.get(inputs.edition, OFFICIAL_SINCE_2025)
    cut = [row for row, pair in enumerate(pairs) if pair in scorer.cut]
    return Measured(
        np.array([scored[pair] for pair in pairs]),
        sign("bleurt", inputs.edition, model_name(found), "pre:official", "fp32", "bleurt-pytorch:0.0.1"),
        official=not found.standin and found.name == official,
        warnings=some_rows(cut, f"longer than the encoder of bleurt, cut at {scorer.limit} tokens"),
    )


@functools.lru_cache(maxsize=1)
def load(folder: Path, device: str) -> "Scorer":
    """The BLEURT in a folder; the last one used stays in memory."""
    return Scorer(folder, device)


class Scorer:
    """A BLEURT and its tokenizer; `cut` are the pairs seen so far that were too long for it."""

    def __init__(self, folder: Path, device: str):
        import torch
        from bleurt_pytorch import BleurtForSequenceClassification, BleurtTokenizer

        self.device = device
        self.tokenizer = BleurtTokenizer.from_pretrained(folder)
        self.model = BleurtForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        self.model.eval().to(device)
        self.limit = min(512, self.model.config.max_position_embeddings)
        self.cut: set[tuple[str, str]] = set()

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """One score for each (reference, prediction), in batches of similar length."""
        # as lists, since a lone empty prediction would be taken for none, without its [SEP]
        encoded = self.tokenizer(*map(list, zip(*pairs, strict=True)), verbose=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        self.cut |= {pair for pair, length in zip(pairs, lengths, strict=True) if length > self.limit}
        scores = [0.0] * len(pairs)
        for rows in batches([min(length, self.limit) for length in lengths], BATCH_TOKENS):
            for row, value in zip(rows, self._forward([pairs[row] for row in rows]), strict=True):
                scores[row] = value
        return scores

    def _forward(self, pairs: list[tuple[str, str]]) -> list[float]:
        import torch

        references, predictions = map(list, zip(*pairs, strict=True))
        batch = self.tokenizer(
            references, predictions, padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            return self.model(**batch).logits.flatten().float().tolist()
