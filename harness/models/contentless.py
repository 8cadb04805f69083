"""A training step on tensors without contents: the memory that it needs and its FLOPs.

Floats are torch's fake tensors: they have a shape and no memory. Integers, masks and small new tensors are
real, so that code which reads them runs as usual. All is on the CPU. Where an accelerator saves other tensors
than a CPU, the step can imitate it.
"""

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Collection, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from harness.models import parts
from harness.models.base import Captioner, Pixels, Samples, Work

_SMALL = 2**16
"""Numbers of a new tensor of floats that is real, such as a table of frequencies."""
_IN_FP32 = (F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax)
"""What autocast of an accelerator computes in fp32, and that of a CPU does not."""


_SIZED = (Tensor.split, Tensor.view, Tensor.repeat)
"""Functions whose sizes may be given as real tensors."""


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
        if function in _SIZED:
            args = (args[0], *_numbers(args[1:]))
        if self.accelerator:
            return self._like_an_accelerator(function, args, kwargs)
        return function(*args, **kwargs)

    def _new(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """The result of a function of no tensors: made again with contents if it is integers or small."""
        found = function(*args, **kwargs)
        if not isinstance(found, FakeTensor):
            return found
        weight = self.building and function is not torch.linspace  # rates of stochastic depth are read
        if found.is_floating_point() and (weight or found.numel() > _SMALL):
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
            return _fused(*args, **kwargs)
        return function(*args, **kwargs)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """CUDA's attention for these inputs: without a mask flash attention, else the memory-efficient one."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (one.to(torch.get_autocast_dtype("cpu")) for one in (query, key, value))
    if attn_mask is None:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, scale=scale
        )
        return found[0]
    bias = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
    bias = bias.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, torch.is_grad_enabled(), 0.0, is_causal, scale=scale)[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _numbers(value: Any) -> Any:
    """Sizes in which real tensors of one integer are replaced by it."""
    if isinstance(value, tuple | list):
        return type(value)(_numbers(one) for one in value)
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.ndim == 0:
        with unset_fake_temporarily():
            return value.item()
    return value


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

    Gives the mode. Set its `building` to false once the model is built.
    """
    mode = _Contentless(accelerator)
    with (
        torch.random.fork_rng(devices=[]),
        _weights_replaced(),
        FakeTensorMode(allow_non_fake_inputs=True),
        mode,
    ):
        try:
            yield mode
        finally:
            _forget()


def _forget() -> None:
    """Empty the caches of functions of transformers, which may hold tensors without contents from here.

    Such is the grid of patches of DINOv3, which a real model in this process would read next.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    for value in [value for module in modules for value in vars(module).values()]:
        found = [value]
        if isinstance(value, FunctionType):  # transformers' own decorator has the cache in its closure
            with contextlib.suppress(ValueError):  # a cell may be empty
                found += [cell.cell_contents for cell in value.__closure__ or ()]
        for cached in found:
            if isinstance(cached, functools._lru_cache_wrapper):
                cached.cache_clear()


@contextlib.contextmanager
def _weights_replaced() -> Iterator[None]:
    """`Module.to` gives a weight new data here; it would swap fake weights, which torch refuses for some."""
    swap = torch.utils.swap_tensors

    def replace(weight: Tensor, converted: Tensor) -> None:
        weight.data = converted.data

    torch.utils.swap_tensors = replace
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


def sizes(build: Callable[[], Captioner], half: bool) -> dict[str, int]:
    """`trained`: parameters that training may change; `frozen`: bytes of all other weights and buffers."""
    with without_contents(accelerator=True):
        model = build()
        model.compute_in(torch.bfloat16 if half else None, False)
        own = [weight for name, weight in model.named_parameters() if parts.changes(model, name)]
        held = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in _weights(model)}
        for weight in own:
            held.pop(weight.untyped_storage()._cdata)
        return {"trained": sum(weight.numel() for weight in own), "frozen": sum(held.values())}


def step(
    build: Callable[[], Captioner],
    pixels: Callable[[int], Pixels],
    work: Work,
    word: int,
    checkpointing: bool,
) -> dict[str, int]:
    """The most bytes of forward and backward pass of a micro batch (`peak`), and the FLOPs of its products.

    Weights are not counted, and gradients only at the moment when they are made. One row of texts is shorter
    than the others, so attention has a mask as in a training. FLOPs include what `checkpointing` repeats.
    """
    with without_contents(work.accelerator) as mode:
        model = build()
        model.compute_in(torch.bfloat16 if work.half else None, not work.vision_half)
        if not work.accelerator:
            model.use_plain_attention()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        wanted = {"caption": work.captions, "concept": work.concepts, "reward": work.samples}
        wanted["concepts"] = work.labels
        model.freeze([name for name, is_wanted in wanted.items() if is_wanted])
        model.train()
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        mode.building = False
        # the outer context keeps the casts of weights, as in a training
        with _Memory(_weights(model)) as memory, torch.autocast("cpu", enabled=False):
            texts = [name for name in ("caption", "concept") if wanted[name]]
            given: dict[str, Any] = {name: _text(work.batch, work.tokens, word) for name in texts}
            if work.samples:
                said = work.of_samples
                given["samples"] = Samples(_text(said.batch, said.tokens, word), _chosen)
            if work.labels:
                given["concepts"] = torch.zeros(work.batch, work.labels, dtype=torch.uint8)
            losses = [loss for loss in model(pixels(work.batch), **given) if loss is not None]
            _backward(torch.stack(losses).sum())
    return {"peak": memory.peak, "flops": memory.flops}


def _backward(total: Tensor) -> None:
    """The backward pass; torch's own function would turn the mode off, in which layers are run again."""
    engine, start = torch.autograd.Variable._execution_engine, torch.ones_like(total)
    engine.run_backward((total,), (start,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _weights(model: Captioner) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _text(rows: int, tokens: int, word: int) -> dict[str, Tensor]:
    """Texts as from `Codec.collate`, (rows, tokens)."""
    ids = torch.full((rows, tokens), word)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return {"ids": ids, "mask": mask, "labels": ids.clone()}


def _chosen(logits: Tensor) -> Tensor:
    """A loss that makes tensors like those of `training.rewards.loss`."""
    rows = logits[:, :-1].flatten(0, 1).clone()
    scores = rows.float() / 2
    cut = scores < scores.topk(2).values[:, -1:]
    kept = scores.masked_fill(cut, -torch.inf).log_softmax(-1)
    scaled = rows.float() / 2
    return -(kept[:, 0] + scaled[:, 0]).sum()
