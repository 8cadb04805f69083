"""The exponential moving average of the weights that a stage trains: `train.ema`."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from harness.machine import ranks
from harness.models.base import Captioner
from harness.training.engine import assembled, held

FILE = "average.pt"


class Average:
    """The average of the weights that a stage trains, in fp32 and on their device.

    It starts from the weights at the start of the stage. At ZeRO-3 each rank keeps the average of its own
    part.
    """

    def __init__(self, model: Captioner, decay: float) -> None:
        self._update = get_ema_multi_avg_fn(decay)
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._parts = {
            name: held(weight).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            for name, weight in self._trained.items()
        }

    def follow(self, trainer: Any) -> None:
        """Add the weights after an optimiser step, unless fp16 overflowed and the step was skipped."""
        if trainer.was_step_applied():
            self._update(list(self._parts.values()), list(map(held, self._trained.values())), None)

    @contextlib.contextmanager
    def instead(self, model: Captioner) -> Iterator[None]:
        """In this block `model` has the averaged weights; all ranks must enter it.

        `model` is the trained one, or at ZeRO-3 a whole copy of it.
        """
        other = {name: assembled(part, self._trained[name]) for name, part in self._parts.items()}
        own = {name: weight for name, weight in model.named_parameters() if name in other}
        _exchange(own, other)
        try:
            yield
        finally:
            _exchange(own, other)

    def save(self, folder: Path, write: Callable[[Callable[[Any, Path], None], Any, Path], None]) -> None:
        """Have rank 0 `write(save, state, file)` the whole average in a checkpoint; all ranks call this."""
        whole = {}
        for name, part in self._parts.items():
            weight = assembled(part, self._trained[name])
            if ranks.rank() == 0:  # at ZeRO-3 one weight at a time is whole on the device
                whole[name] = weight if weight is part else weight.cpu()
        if ranks.rank() == 0:
            write(torch.save, whole, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on any number of ranks."""
        saved = torch.load(folder / FILE, map_location="cpu", weights_only=True, mmap=True)
        for name, part in self._parts.items():
            size, sharded = part.numel(), part.shape != saved[name].shape
            own = saved[name].flatten()[ranks.rank() * size * sharded :][:size]
            part.view(-1)[: len(own)].copy_(own)


@torch.no_grad()
def _exchange(weights: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Exchange the values of two sets of weights, one weight at a time."""
    for name, weight in weights.items():
        before = weight.clone()
        weight.copy_(other[name])
        other[name].copy_(before)
