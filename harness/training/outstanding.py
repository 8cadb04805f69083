"""An optimiser step that was given to the device, and whose numbers are read while it computes the next."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from harness.machine import device as devices
from harness.training.schedule import Stage


class Numbers:
    """Numbers on their way from the device, after all that it was given before."""

    def __init__(self, tensor: Tensor, kind: devices.Kind) -> None:
        self.tensor = tensor.to("cpu", non_blocking=True)
        self.sent = time.perf_counter()
        self.event = None if kind == "cpu" else devices.module(kind).Event()
        if self.event is not None:
            self.event.record()

    def read(self) -> tuple[list[float], float]:
        """The numbers, and the time (`perf_counter`) when they were there."""
        if self.event is None:
            return self.tensor.tolist(), self.sent
        self.event.synchronize()
        return self.tensor.tolist(), time.perf_counter()


class Learnt(NamedTuple):
    """What an optimiser step leaves, here and on the device.

    `images` are those of this rank's M micro-batches, and `losses` (M, L) their terms, on the device.
    `numbers` are the terms of all ranks, how many ranks were interrupted, and the norm of the gradients if
    the device computes it; `norm` is that of the host. `scale` is the loss scale in fp16. `sampled` describes
    the samples of the loss `reward`.
    """

    images: Sequence[np.ndarray]
    losses: Tensor
    numbers: Numbers
    norm: float | None
    scale: float | None
    sampled: Mapping[str, float]


class Outstanding(NamedTuple):
    """A step whose numbers are not read yet; `begun`: the time when it began (`perf_counter`)."""

    step: int
    stage: Stage
    epoch: float
    learning_rate: float
    begun: float
    learnt: Learnt

    def seconds(self, arrived: float, before: float) -> float:
        """Time that the step took; `arrived`, `before`: when its numbers were there, and those before it."""
        return max(self.learnt.numbers.sent - self.begun, arrived - max(self.begun, before))
