"""BLEURT (Sellam et al. 2020), equal to bleurt-pytorch's scores of one pair at a time to 1e-5."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.config.editions import EDITIONS
from harness.config.sections import Section
from harness.metrics.base import Inputs, Measured, Metric, Original, Pairs, Standin, Weights, cut_rows, sign
from harness.metrics.cache import Row
from harness.metrics.neural import (
    at_hand,
    by_length,
    contents,
    dtype,
    files_of,
    lacking,
    last_kept,
    loaded,
    row_by_row,
)
from harness.models import checkpoints

if TYPE_CHECKING:
    from harness.models.bleurt import Encoded

KEY = "score.bleurt.checkpoint"


class BleurtConfig(Section):
    """The model of BLEURT."""

    checkpoint: str | None = None
    """A hub name, a local folder, or `standin` (a small BLEURT trained here); by default the edition's."""


def measure(inputs: Inputs) -> Measured:
    """BLEURT of each row after the official pre-processing; the model also scores blank captions.

    The organisers' 2023 code for BLEURT is not public. Their 2025 code pre-processes the captions, and so
    does this one, as the signature says.
    """
    name, precision = inputs.config.bleurt.checkpoint, inputs.config.precision
    found = at_hand(name, KEY)
    signature = sign(
        "bleurt", inputs.edition, inputs.name_of(found), "pre:official", precision, "bleurt-pytorch:0.0.1"
    )

    def compute(pairs: list[Row]) -> np.ndarray:
        scorer = load(found.folder, inputs.device, precision)
        return scorer.scores([(reference, prediction) for prediction, reference in pairs])

    weights = checkpoints.contents(found.folder, inputs.cache)
    per_image, cut = inputs.scored_by_all([signature, weights], inputs.clean_pairs, compute).T
    named = EDITIONS[inputs.edition].weights["bleurt"]
    official, doubts = inputs.official(found, named, KEY) if precision == "fp32" else (False, [])
    return Measured(
        per_image,
        signature,
        official=official,
        warnings=cut_rows("bleurt", cut),
        doubts=doubts,
    )


@last_kept(files_of)
def load(folder: Path, device: str, precision: str = "fp32") -> "Scorer":
    """The BLEURT in a folder; the last one used stays in memory."""
    return Scorer(folder, device, precision)


class Scorer:
    """A BLEURT and its tokenizer."""

    def __init__(self, folder: Path, device: str, precision: str):
        from harness.models.bleurt import Bleurt, config_of, tokenizer_of

        self.device = device
        self.tokenizer = tokenizer_of(folder)
        self.model = loaded(Bleurt, folder, config=config_of(folder), dtype=dtype(precision)).to(device)
        self.limit = min(512, self.model.config.max_position_embeddings)

    def scores(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """(n, 2): the score of each (reference, prediction), and the tokens that it was cut to, 0 if not."""
        encoded = self.tokenizer.encode(pairs, self.limit)
        scores = by_length(
            lambda rows, width: self._forward(encoded, rows, width),
            list(map(len, encoded.ids)),
            self.limit,
            self.device,
        )
        return np.column_stack([scores, np.where(np.array(encoded.lengths) > self.limit, self.limit, 0)])

    def _forward(self, encoded: "Encoded", rows: list[int], width: int) -> list[float]:
        import torch

        from harness.models.bleurt import padded

        with torch.inference_mode():
            pooled = self.model.pooled(*(part.to(self.device) for part in padded(encoded, rows, width)))
            return row_by_row(self.model.classifier, pooled).flatten().float().tolist()


def _build_standin(_: Sequence[Path], captions: Sequence[str], folder: Path) -> None:
    from harness.models import standins

    standins.build_bleurt(captions, folder)


def _original(inputs: Inputs, pairs: Pairs) -> list[float]:
    import torch
    from bleurt_pytorch import BleurtForSequenceClassification, BleurtTokenizer

    folder = checkpoints.find(inputs.config.bleurt.checkpoint).folder
    tokenizer = BleurtTokenizer.from_pretrained(folder)
    model = BleurtForSequenceClassification.from_pretrained(folder).eval().to(inputs.device)
    longest = min(512, model.config.max_position_embeddings)
    found = []
    for prediction, reference in pairs:
        encoded = tokenizer(
            [reference], [prediction], truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.inference_mode():
            found.append(model(**encoded.to(inputs.device)).logits.item())
    return found


METRIC = Metric(
    measure,
    neural=True,
    original=Original("bleurt-pytorch", _original),
    weights=Weights(
        "bleurt",
        BleurtConfig,
        "checkpoint",
        problems=lambda section: lacking(section.checkpoint, KEY),
        identity=lambda section, cache: contents(section.checkpoint, cache),
        standin=Standin(_build_standin),
        unload=load.cache_clear,
    ),
)
