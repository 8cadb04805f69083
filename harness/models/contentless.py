"""A training step on tensors without contents: the memory that it needs and its FLOPs.

Floats are torch's fake tensors: they have a shape and no memory. Integers, masks and small new tensors are real,
so that code which reads them runs as usual. All is on the CPU; an accelerator's way is imitated where it saves
other tensors.
"""

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from harness.models.base import Captioner, Samples, Work

_SMALL = 2**16
"""Numbers of a new tensor of floats that is real, such as a table of frequencies."""
_IN_FP32 = (F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax)
"""What autocast of an accelerator computes in fp32, and that of a CPU does not."""


class _Contentless(TorchFunctionMode):
    """Keeps integers real; with `accelerator`, saves what an accelerator saves.

    By the published list of CUDA's autocast: norms and softmax in fp32. Dropout masks have a byte, and
    attention is fused whatever its dropout.
    """

    building = True
    """Whether the model is being built, so that all new floats are weights and none is real."""

    def __init__(self, accelerator: bool) -> None:
        super().__init__()
        self.accelerator = accelerator

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        if not tensors:
            return self._new(function, args, kwargs)
        if not any(isinstance(one, FakeTensor) for one in tensors):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if self.building and function is Tensor.__bool__:  # whether a random weight is out of its range
            return False
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _places(args[1]), *args[2:])
        if self.accelerator:
            return self._like_an_accelerator(function, args, kwargs)
        return function(*args, **kwargs)

    def _new(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """The result of a function of no tensors: made again with contents if it is integers or small."""
        found = function(*args, **kwargs)
        if not isinstance(found, FakeTensor) or found.is_floating_point() and (self.building or found.numel() > _SMALL):
            return found
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    def _like_an_accelerator(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        if function in _IN_FP32 and args[0].dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        if function is F.dropout and kwargs.get("training", args[2:3] != (False,)):
            rate = kwargs["p"] if "p" in kwargs else args[1]
            return torch.native_dropout(args[0], rate, True)[0] if rate else args[0]
        if function is F.scaled_dot_product_attention:
            kwargs = kwargs | {"dropout_p": 0.0}
        return function(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _places(index: Any) -> Any:
    """An index in which masks are replaced by their places, so that the size of the result is known."""
    if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
        with unset_fake_temporarily():
            found = index.nonzero(as_tuple=True)
        return found if len(found) > 1 else found[0]
    if isinstance(index, tuple):
        parts = [_places(one) for one in index]
        return tuple(one for part in parts for one in (part if isinstance(part, tuple) else (part,)))
    return index


class _Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is active, at the moment when they are most."""

    def __init__(self, own: Collection[Tensor]) -> None:
        super().__init__()
        self.held = [one.untyped_storage() for one in own]
        self.seen = {one._cdata for one in self.held}
        self.now = self.peak = self.flops = 0

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for one in _tensors(found):
            self._count(one.untyped_storage())
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=found)
        return found

    def _count(self, storage: Any) -> None:
        if storage._cdata in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@contextlib.contextmanager
def without_contents(accelerator: bool) -> Iterator[_Contentless]:
    """Floats made here have shapes and no memory; the state of random numbers stays as it was.

    Gives the mode, which is `building` until it is told otherwise.
    """
    mode = _Contentless(accelerator)
    with (
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(allow_non_fake_inputs=True),
        mode,
    ):
        yield mode
