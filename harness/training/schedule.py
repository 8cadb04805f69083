"""The order of training: stages, the images of each optimiser step, the learning rate at each step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.config.sections import AUTO
from harness.errors import Problem
from harness.models.base import Losses
from harness.training.settings import RewardConfig, TrainConfig

_GROUPED = 50
"""Number of optimiser steps whose images are sorted by length together."""


@dataclass(frozen=True)
class Stage:
    """A stage with resolved numbers: `losses` are the weights above 0 by name, `number` counts from 1.

    With `until` the stage ends after that epoch.
    """

    number: int
    epochs: int
    learning_rate: float
    losses: Mapping[str, float]
    reward: RewardConfig | None = None
    constant: bool = False
    """Whether the learning rate stays as it is, without warm-up and cosine."""
    until: float | None = None
    from_best: bool = False
    """Whether it starts from the best weights so far, and not from the last ones."""
    validations: int = 1
    """How many validations an epoch has."""

    @property
    def last(self) -> float:
        """The last epoch that is trained; the schedule of the learning rate is that of all `epochs`."""
        return self.epochs if self.until is None else self.until

    @property
    def texts(self) -> tuple[str, ...]:
        """What to compute of `Losses`: its fields need only their own, any other loss the first two."""
        others = self.losses.keys() - set(Losses._fields)
        return tuple(
            text
            for text in Losses._fields
            if text in self.losses or (others and text in ("caption", "concept"))
        )


def stages(config: TrainConfig, until: Mapping[str, Any] | None = None) -> list[Stage]:
    """The stages that have epochs, in order, with their numbers in the config.

    With `until` (stage, epoch) the training ends after that epoch; `before` has the last epoch of each stage
    before it, if one of them ended early.
    """
    found = [
        Stage(
            number,
            stage.epochs,
            stage.learning_rate or config.learning_rate,
            {name: weight for name, weight in stage.losses if weight},
            stage.reward,
            stage.schedule == "constant",
            from_best=stage.start == "best",
            validations=stage.validations_per_epoch,
        )
        for number, stage in enumerate(config.stages, 1)
        if stage.epochs
    ]
    if until is None:
        return found
    ends = [*until.get("before", ()), until["epoch"]]
    own = dict(zip(range(until["stage"], 0, -1), reversed(ends), strict=False))
    return [replace(one, until=own.get(one.number)) for one in found if one.number <= until["stage"]]


def pauses(stage: Stage, steps: int) -> set[int]:
    """After which of the `steps` of an epoch, counted from 1, the stage is validated; the last one is."""
    return {math.ceil(part * steps / stage.validations) for part in range(1, stage.validations + 1)}


def learning_rate(config: TrainConfig, peak: float, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate at optimiser step `step` (from 0) of a stage of `steps`: linear warm-up, then cosine.

    `warmup_first_epoch_only` follows LAVIS's linear_warmup_cosine_lr: the warm-up ends with epoch 0, finished
    or not, and the cosine is over all epochs and changes once per epoch.
    """
    warmup = config.warmup_steps
    if config.warmup_first_epoch_only:
        warming = step < steps_per_epoch
        epochs = max(steps // steps_per_epoch, 1)
        progress = (step // steps_per_epoch) / epochs
        ramp = min(step / max(warmup, 1), 1.0)
    else:
        warmup = min(warmup, steps)
        warming = step < warmup
        progress = (step - warmup) / max(steps - warmup, 1)
        ramp = step / max(warmup, 1)
    if warming:
        return config.warmup_learning_rate + (peak - config.warmup_learning_rate) * ramp
    return config.min_learning_rate + (peak - config.min_learning_rate) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, stage: int, epoch: int, group_by_length: bool = False
) -> list[np.ndarray]:
    """The images of each optimiser step of an epoch; images from the epoch's start fill up the last step.

    `lengths` (N,) are text lengths. Within a step longer texts come first, so the texts of a micro-batch have
    similar lengths and need little padding; this changes no gradient. `group_by_length` also sorts across
    steps: the images of `_GROUPED` steps are sorted together. The step with the longest text comes first, so
    a lack of memory shows at once.
    """
    draws = np.random.default_rng([seed, stage, epoch])
    steps = math.ceil(len(lengths) / batch_size)
    order = np.resize(draws.permutation(len(lengths)), steps * batch_size)
    if group_by_length:
        parts = np.split(order, range(_GROUPED * batch_size, len(order), _GROUPED * batch_size))
        order = np.concatenate([_longest_first(part, lengths) for part in parts])
    batches = np.split(order, steps)
    if group_by_length:
        longest = max(range(steps), key=lambda step: lengths[batches[step]].max())
        rest = draws.permutation([step for step in range(steps) if step != longest])
        batches = [batches[step] for step in [longest, *rest]]
    return [_longest_first(batch, lengths) for batch in batches]


def _longest_first(images: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return images[np.argsort(-lengths[images], kind="stable")]


def indivisible(config: TrainConfig, devices: int) -> Problem | None:
    """The problem if this number of devices can't share an optimiser step's batch equally, or None."""
    micro = 1 if config.micro_batch_size == AUTO else config.micro_batch_size
    if not config.stages or config.batch_size % (micro * devices) == 0:
        return None
    return Problem(
        f"got {config.batch_size}, which {devices} devices with micro batches of {micro} "
        f"cannot share; a multiple of {devices * micro} is allowed",
        key="train.batch_size",
    )


def total_steps(config: TrainConfig, images: int, left_out: float = 0) -> int:
    """The number of optimiser steps of all stages, without `left_out` epochs."""
    per_epoch = math.ceil(images / config.batch_size)
    return round((sum(stage.epochs for stage in stages(config)) - left_out) * per_epoch)
