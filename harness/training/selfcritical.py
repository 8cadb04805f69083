"""Sampling for self-critical training: captions of the images of an optimiser step, rewarded and collated."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from harness.config.sections import PredictConfig
from harness.decoding.search import Captions, sample, search, uniforms
from harness.machine import device as devices
from harness.machine import ranks
from harness.models.base import Decoding, Samples
from harness.models.loading import Loaded
from harness.models.text import Text, to_device
from harness.training import rewards
from harness.training.schedule import Stage
from harness.training.settings import RewardConfig

Measure = Callable[
    [Mapping[str, float], Sequence[tuple[int, str]]], tuple[dict[str, float], dict[str, np.ndarray]]
]
"""(a reward's metrics, pairs of a training image and a caption) -> the weight and the numbers (n,) by metric.

All ranks of a launch call it with the same pairs.
"""


class Sampled(NamedTuple):
    """The samples of one image: their new tokens with the end token, texts and log-probabilities.

    `greedy` is the text of the greedy caption, if it is the baseline.
    """

    ids: list[list[int]]
    texts: list[str]
    chances: list[float]
    greedy: str | None


class SelfCritical:
    """Makes the samples of one stage; `captions` are the texts of the training images by their number.

    Draws depend only on seed, stage, step, image and number of the sample. In the block `gathered` the model
    has all its weights, which ZeRO-3 shards. `seconds` sums the time of
    sampling and of rewards, `total` that of whole steps.
    """

    def __init__(
        self,
        stage: Stage,
        loaded: Loaded,
        ids: Sequence[str],
        captions: Sequence[Text],
        measure: Measure,
        seed: int,
        multiple: int,
        gathered: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.gathered = gathered
        self.stage, self.loaded, self.ids, self.captions = stage, loaded, ids, captions
        self.measure, self.seed, self.multiple = measure, seed, multiple
        self.config: RewardConfig = stage.reward
        self.seconds: Counter[str] = Counter()
        self.total = 0.0

    def __call__(
        self, step: int, parts: Sequence[np.ndarray], pixels: Sequence[Tensor]
    ) -> tuple[list[Samples], dict[str, float]]:
        """The samples of this rank's micro-batches, and numbers for the row of the step.

        `parts` are the images of all micro-batches of the step; `pixels` (B, 3, S, S), normalised, those of
        this rank's. Captions are sampled in evaluation mode, without gradient. All are rewarded together.
        """
        own = parts[ranks.rank() :: ranks.world_size()]
        with self._timed("sampling"), self.gathered():
            found = ranks.gather(self._sampled(step, own, pixels))
        with self._timed("rewards"):
            images = np.concatenate(parts)
            advantages, row = self._rewarded(images, [one for part in found for one in part])
        shares = np.split(advantages, len(parts))
        mine = slice(ranks.rank(), None, ranks.world_size())
        given = zip(own, found[mine], shares[mine], strict=True)
        return [self._collated(*one) for one in given], row

    def worded(self) -> str:
        """Where the time of the stage's steps went, as text."""
        shares = {part: spent / self.total for part, spent in self.seconds.items()}
        shares["updates"] = 1 - sum(shares.values())
        listed = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
        return f"time of stage {self.stage.number}: {listed}"

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        kind = self.loaded.model.device.type
        if kind != "cpu":
            devices.module(kind).synchronize()  # else work that was given before counts as this part's
        begun = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - begun

    def _sampled(
        self, step: int, parts: Sequence[np.ndarray], pixels: Sequence[Tensor]
    ) -> list[list[Sampled]]:
        config, codec, model = self.config, self.loaded.caption, self.loaded.model
        lengths = PredictConfig(num_beams=1, max_new_tokens=config.max_new_tokens, min_new_tokens=0)
        drawn = np.random.SeedSequence([self.seed, self.stage.number, step]).generate_state(1, np.uint64)

        def draw(decoding: Decoding, images: Sequence[int]) -> Captions:
            ids = [self.ids[i] for i in images]
            draws = uniforms(int(drawn[0]), ids, config.samples, config.max_new_tokens).to(model.device)
            return sample(decoding, config, lengths, draws, codec.end, codec.pad)

        def greedy(decoding: Decoding, images: Sequence[int]) -> Captions:
            return search(decoding, lengths, codec.end, codec.pad)

        model.eval()
        found = self._decoded(draw, config.samples, parts, pixels)
        best = self._decoded(greedy, 1, parts, pixels) if config.baseline == "greedy" else []
        model.train()
        texts = [[codec.decode(ids[0]) for ids, _ in part] for part in best]
        greedy_texts = texts or [[None] * len(part) for part in parts]
        return [
            [
                Sampled(ids, list(map(codec.decode, ids)), chances, greedy_text)
                for (ids, chances), greedy_text in zip(*both, strict=True)
            ]
            for both in zip(found, greedy_texts, strict=True)
        ]

    def _decoded(
        self,
        decode: Callable[[Decoding, Sequence[int]], Captions],
        width: int,
        parts: Sequence[np.ndarray],
        pixels: Sequence[Tensor],
    ) -> list[list[tuple[list[list[int]], list[float]]]]:
        """For each image of each part: the new tokens of its captions up to the end token, and their scores.

        Images with prompts of one length are decoded together.
        """
        found = []
        with self.loaded.model.decoder(width, self.config.max_new_tokens) as begin:
            for part, seen in zip(parts, pixels, strict=True):
                prompts = [self._prompt(i) for i in part]
                one: dict[int, tuple[list[list[int]], list[float]]] = {}
                for length in dict.fromkeys(map(len, prompts)):
                    rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
                    given = torch.tensor([prompts[row] for row in rows], device=self.loaded.model.device)
                    captions = decode(begin(seen[rows], given), [int(part[row]) for row in rows])
                    ids = [list(map(self._ended, own)) for own in captions.ids.tolist()]
                    one |= zip(rows, zip(ids, captions.scores.tolist(), strict=True), strict=True)
                found.append([one[row] for row in range(len(part))])
        return found

    def _prompt(self, image: int) -> list[int]:
        """The ids before the caption of an image, as in the loss `caption`."""
        text = self.captions[image]
        return text.ids[: text.prompt] if text.predicted else list(self.loaded.caption.prompt)

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.loaded.caption.end
        return ids[: ids.index(end) + 1] if end in ids else ids

    def _rewarded(self, images: np.ndarray, found: Sequence[Sampled]) -> tuple[np.ndarray, dict[str, float]]:
        """The advantage of each sample (B, N), 0 for images without a caption; and numbers for the row.

        Each distinct caption of an image is rewarded once.
        """
        own = list(zip(images.tolist(), found, strict=True))
        pairs = [(image, text) for image, one in own for text in one.texts]
        pairs += [(image, one.greedy) for image, one in own if one.greedy is not None]
        place = {pair: row for row, pair in enumerate(dict.fromkeys(pairs))}
        weights, values = self.measure(self.config.metrics, list(place))
        rows = [place[pair] for pair in pairs]
        values = {name: value[rows] for name, value in values.items()}
        counted = np.array([self.captions[i].predicted > 0 for i in images])
        if not counted.any():
            return np.zeros((len(images), self.config.samples)), {}
        own, base = self._compared(rewards.mixed(values, weights), len(images))
        row = _described([one for one, counts in zip(found, counted, strict=True) if counts])
        row |= {"reward": float(own[counted].mean()), "reward_baseline": float(base[counted].mean())}
        if self.config.standardise:
            like = np.flatnonzero(counted.repeat(self.config.samples))
            own, base = self._compared(rewards.mixed(values, weights, like), len(images))
        return np.where(counted[:, None], own - base, 0.0), row

    def _compared(self, mixed: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
        """The rewards of the samples and their baselines, (B, N) both, from those of all captions (n,)."""
        samples = images * self.config.samples
        own = mixed[:samples].reshape(images, -1)
        if self.config.baseline == "leave_one_out":
            return own, rewards.baseline(own)
        return own, np.broadcast_to(mixed[samples:, None], own.shape)

    def _collated(self, part: np.ndarray, found: Sequence[Sampled], advantages: np.ndarray) -> Samples:
        prompts = [self._prompt(i) for i in part]
        texts = [
            Text([*prompt, *ids], len(prompt))
            for prompt, one in zip(prompts, found, strict=True)
            for ids in one.ids
        ]
        device = self.loaded.model.device
        text = to_device(self.loaded.caption.collate(texts, self.multiple), device)
        weights = torch.tensor(advantages.flatten(), dtype=torch.float32, device=device)
        return Samples(
            text, partial(rewards.loss, labels=text["labels"], advantages=weights, settings=self.config)
        )


def _described(found: Sequence[Sampled]) -> dict[str, float]:
    """Share of distinct samples, mean tokens, and mean of -log p of a token: an estimate of the entropy."""
    tokens = [len(ids) for one in found for ids in one.ids]
    chances = [chance for one in found for chance in one.chances]
    return {
        "distinct_samples": float(np.mean([len(set(one.texts)) / len(one.texts) for one in found])),
        "sample_length": float(np.mean(tokens)),
        "sample_entropy": -math.fsum(chances) / sum(tokens),
    }


_RATES = ("dropout", "layerdrop", "drop_prob")
"""How transformers ends the names of rates of dropout; drop_prob is of stochastic depth."""


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """In this block a model in training mode drops nothing, so that layers can still be recomputed.

    transformers recomputes layers, and saves memory by it, in training mode only.
    """
    before = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
        and (name.endswith(_RATES) or (name == "p" and isinstance(module, nn.Dropout)))
    ]
    for module, name, _ in before:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
