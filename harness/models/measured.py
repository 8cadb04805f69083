"""The shape of any captioner, found by running its training step on tensors without contents.

    def shape(model: ModelConfig) -> Shape | None:      # in the module of a family
        return measured.shape(
            determined_by={"family": "prefix", "config": ..., "lora": ...},
            build=lambda trained: build(model, trained),
            pixels=lambda batch: torch.zeros(batch, 3, side, side),
        )

The model is built from its config, so no weights are needed. Its weights and activations have shapes and no
memory (torch's fake tensors). Integers and small tensors are real, so code that reads them, such as grids of
patches and positions of image tokens, runs as usual. What is counted is every tensor that the step makes, from
the forward pass to the end of the backward pass. It takes seconds and imports torch, so it is kept in
`runs/cache`; what is there is read without torch.
"""

import contextlib
import functools
import json
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from harness.models.base import FLOAT, Activations, Work
from harness.store import RUNS, bytes_of, fingerprint, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models.base import Captioner

_BATCHES = (1, 16)
"""Micro batches that are run; memory in between and beyond is taken to be linear in their size."""
_SMALL = 2**16
"""Numbers of a new tensor of floats that is real, such as a table of frequencies."""


@dataclass(frozen=True)
class Shape:
    """`base.Shape` of a model that is run without contents; see `shape`."""

    determined_by: Mapping[str, Any]
    build: "Callable[[frozenset[str]], Captioner]"
    pixels: Callable[[int], Any]
    losses: Collection[str]
    word: int

    def trained(self, train_vision: bool, train_language: bool = False) -> int:
        """Number of parameters that training may change; tied weights count once."""
        return self._found("sizes", train_vision, train_language, False)["trained"]

    def frozen(self, train_vision: bool, half: bool, train_language: bool = False) -> int:
        """Bytes of the weights that are never trained; `half`: the model computes in half precision."""
        return self._found("sizes", train_vision, train_language, half)["frozen"]

    def flops(self, work: Work) -> int:
        """The FLOPs of forward and backward pass of one micro batch, without what checkpointing repeats."""
        return work.batch * self._found("step", replace(work, batch=1), False)["flops"]

    def activations(self, work: Work) -> Activations:
        """The activations of one micro batch; the temporaries of the worst moment count as kept."""
        plain, less = (self._peak(work, checkpointing) for checkpointing in (False, True))
        return Activations(kept=plain, kept_checkpointed=less, casts=0, loss=0, layer=0)

    def _peak(self, work: Work, checkpointing: bool) -> int:
        least, most = (
            self._found("step", replace(work, batch=batch), checkpointing)["peak"] for batch in _BATCHES
        )
        each = (most - least) / (_BATCHES[1] - _BATCHES[0])
        return round(least + each * (work.batch - _BATCHES[0]))

    def _found(self, what: str, *given: Any) -> dict[str, int]:
        """What is in the cache for these arguments, or else is measured now and put there."""
        plain = [astuple(one) if isinstance(one, Work) else one for one in given]
        versions = [version(name) for name in ("torch", "transformers")]
        key = fingerprint([self.determined_by, sorted(self.losses), what, plain, versions, _source()])
        file = RUNS / "cache" / f"shape-{key}.json"
        try:
            return json.loads(bytes_of(file))
        except (OSError, ValueError):
            pass
        found = {"sizes": _sizes, "step": _step}[what](self, *given)
        with contextlib.suppress(OSError):  # a folder that can't be written costs time only
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found)
        return found
