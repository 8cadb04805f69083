"""The shape of any captioner, found by running its training step on tensors without contents.

    def shape(model: ModelConfig, train: TrainConfig) -> base.Shape | None:  # in the module of a family
        return measured.Shape(
            train=train,
            determined_by={**settings(model), "configs": [...]},
            build=lambda train: build(model, train),
            pixels=lambda batch: torch.zeros(batch, 3, model.image_size, model.image_size),
        )

The model is built from its config, so no weights are needed. Its weights and activations have a shape and no
memory (`contentless`). Every tensor that the step makes is counted, from the forward pass to the end of the
backward pass. This takes seconds and imports torch, so the results are kept in `runs/cache`.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from harness.models.base import LABELS, Activations, Work
from harness.store import RUNS, fingerprint, read_checked, write_checked

if TYPE_CHECKING:
    from harness.models.base import Captioner, Pixels
    from harness.training.settings import TrainConfig

_VERSION = 1
"""To be changed when `contentless` counts other bytes than before."""
_BATCHES = (1, 8)
"""Micro batches that are run; memory is taken to be linear in their size."""


class Unmeasured(Exception):
    """Raised for a model that can't be run without contents; the message is the reason."""


@dataclass(frozen=True)
class Shape:
    """`base.Shape` of a model that is run without contents.

    `determined_by` is JSON-like: all settings and configs of checkpoints that the model is built from.
    `build(train)` gives the model as the family's `load` does, but from configs alone: with its adapters and
    `trained_parts`, and with the dropout of `train`. It is called where new tensors have no contents, so no
    weights may be loaded in it. `pixels(batch)` gives images as `Loaded.normalise` does. Texts consist of the
    token `word`.
    """

    train: "TrainConfig"
    determined_by: Mapping[str, Any]
    build: "Callable[[TrainConfig], Captioner]"
    pixels: "Callable[[int], Pixels]"
    word: int = 1

    def trained(self, train_vision: bool) -> int:
        """Number of parameters that training may change; tied weights count once."""
        return self._sizes(train_vision, False)["trained"]

    def frozen(self, train_vision: bool, half: bool) -> int:
        """Bytes of the weights that are never trained; `half`: the model computes in half precision."""
        return self._sizes(train_vision, half)["frozen"]

    def flops(self, work: Work) -> int:
        """FLOPs of forward and backward pass of one micro batch, without what checkpointing repeats."""
        return work.batch * self._step(replace(work, batch=1), False)["flops"]

    def activations(self, work: Work) -> Activations:
        """The activations of one micro batch; `kept` has all that is in memory at the worst moment."""
        plain, less = (self._peak(work, checkpointing) for checkpointing in (False, True))
        return Activations(kept=plain, kept_checkpointed=less, casts=0, loss=0, layer=0)

    def _peak(self, work: Work, checkpointing: bool) -> int:
        few, many = (self._step(replace(work, batch=n), checkpointing)["peak"] for n in _BATCHES)
        return round(few + (many - few) * (work.batch - _BATCHES[0]) / (_BATCHES[1] - _BATCHES[0]))

    def _sizes(self, train_vision: bool, half: bool) -> dict[str, int]:
        def measure() -> dict[str, int]:
            from harness.models import contentless

            return contentless.sizes(lambda: self._built(train), half)

        train = self.train.model_copy(update={"train_vision": train_vision})
        return self._once(["sizes", train_vision, half], measure)

    def _step(self, work: Work, checkpointing: bool) -> dict[str, int]:
        def measure() -> dict[str, int]:
            from harness.models import contentless

            return contentless.step(lambda: self._built(train), self.pixels, work, self.word, checkpointing)

        changes: dict[str, Any] = {"train_vision": work.train_vision}
        if work.samples:  # rewards compare captions that were sampled without dropout
            changes |= {"dropout": 0.0, "language_dropout": 0.0}
        train = self.train.model_copy(update=changes)
        return self._once(["step", vars(work), checkpointing], measure)

    def _built(self, train: "TrainConfig") -> "Captioner":
        """The model with a head, if a stage trains one; how many labels it has is taken to be `LABELS`."""
        model = self.build(train)
        if train.trains_head:
            import torch

            from harness.models import head

            head.attach_new(model, LABELS, head.Mean(), head.CrossEntropy(torch.ones(LABELS)))
        return model

    def _once(self, what: list[Any], measure: Callable[[], dict[str, int]]) -> dict[str, int]:
        """What the cache has, or else what is measured now."""
        keys = {"train_language", "dropout", "language_dropout"}
        train = self.train.model_dump(include=keys) | {"head": self.train.trains_head}
        versions = [_VERSION, *map(version, ("torch", "transformers"))]
        file = (
            RUNS
            / "cache"
            / f"shape-{fingerprint([self.determined_by, train, what, self.word, versions])}.json"
        )
        found = read_checked(file)
        if found is None:
            try:
                found = measure()
            except Exception as error:  # the code of any model of transformers runs in it
                first = str(error).strip().partition("\n")[0]
                why = f"the model can't be run without weights: {type(error).__name__}: {first}"
                raise Unmeasured(why) from error
            with contextlib.suppress(OSError):  # without the file it is measured again
                write_checked(file, found)
        return found
