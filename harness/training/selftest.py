"""Compares a device with fp32 on the CPU: attention, losses, optimiser, one training step and decoding."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.machine import device as devices
from harness.models import parts
from harness.models.base import Family, Sample
from harness.models.text import IGNORE, to_device
from harness.training.engine import engine, place, precision, release
from harness.training.settings import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The largest relative error of rounding a number once."""
ROUNDINGS = {torch.float32: 2 * 1024, torch.bfloat16: 2 * 16, torch.float16: 2 * 16}
"""How often a number is rounded on its way through a layer, forward and backward.

These are 6 products and 10 other operations. In fp32 also the sums in the products round: up to 256 terms of
each, but partial sums are smaller, so 1024 for all. In half precision, products are summed in fp32.
"""
DEVIATIONS = 8.0
"""Allowed standard deviations: the largest of 1e5 errors is at 4.4, both sides round, the rest is reserve."""
_QUERIES, _KEYS = 9, 13
_TEXT = torch.ones(_QUERIES, _KEYS, dtype=torch.bool).tril(_KEYS - _QUERIES)
MASKS: dict[str, tuple[Tensor, bool]] = {
    "boolean mask": (_TEXT, False),
    "additive mask": (_TEXT, True),
    "masked rows": (_TEXT & (torch.arange(_QUERIES) % 3 > 0)[:, None], True),
}
"""Which keys each query of an attention sees, and whether the mask is added to the scores.

NPUs were reported to read boolean masks the other way round (Ascend/pytorch issue 88).
"""
_NEW_TOKENS, _RATE = 8, 3e-3


@dataclass(frozen=True)
class Finding:
    """The largest difference of a part from fp32 on the CPU, relative to the root mean square of its values.

    `allowed` is the difference that the precision explains. `error` says why there is no difference.
    """

    name: str
    difference: float
    allowed: float
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the precision explains the difference; NaN is not explained."""
        return self.difference <= self.allowed


def allowed(dtype: torch.dtype, layers: int) -> float:
    """The difference that rounding to `dtype` explains after this many layers.

    Rounding errors add like the steps of a random walk (Higham and Mary 2019, SIAM J. Sci. Comput. 41(5)).
    """
    return DEVIATIONS * UNIT[dtype] * math.sqrt(ROUNDINGS[dtype] * layers)


def named(config: TrainConfig, kind: devices.Kind) -> str:
    """The precision of a training on this kind of device: fp32, bf16 or fp16."""
    dtype = precision(config, kind) or torch.float32
    return next(name for name, known in DTYPES.items() if known == dtype)


def findings(family: Family, precision: str, kind: devices.Kind) -> Iterator[Finding]:
    """Compare every part on the device in this precision; empty if the family has no sample."""
    ours, theirs = family.sample(), family.sample()
    if ours is None or theirs is None:
        return
    settings, dtype = _settings(precision), DTYPES[precision]
    place(ours.model, settings, kind)
    device = ours.model.device
    depth = sum(layers for layers, _ in ours.paths.values())
    parts: dict[str, tuple[int, Callable[[], float]]] = {
        **{name: (1, partial(_attention, mask, dtype, device)) for name, mask in MASKS.items()},
        **{name: (layers, partial(_path, name, ours, theirs)) for name, (layers, _) in ours.paths.items()},
        "decoding": (depth, lambda: _regret(ours, theirs)),
        "gradients": (depth, lambda: _gradients(ours, theirs)),
        "training step": (depth, lambda: _step(ours, theirs, settings, kind)),
    }
    in_fp32: dict[str, Callable[[], float]] = {
        "cross-entropy": lambda: _cross_entropy(device),
        "AdamW": lambda: _adamw(settings, kind),
    }
    # the first NPUs round the factors of fp32 products to fp16
    products = dtype if devices.computes_fp32(kind) else torch.float16
    for name, (layers, difference) in parts.items():
        yield _finding(name, difference, allowed(products, layers))
    for name, difference in in_fp32.items():  # in every precision
        yield _finding(name, difference, allowed(torch.float32, 1))


def _finding(name: str, difference: Callable[[], float], bound: float) -> Finding:
    try:
        return Finding(name, difference(), bound)
    except Exception as error:  # a device may fail in any way, and the other parts are still compared
        what = (str(error).strip() or "no reason given").splitlines()[0]
        return Finding(name, math.nan, bound, f"{type(error).__name__}: {what}")


def _settings(precision: str) -> TrainConfig:
    changes = {"precision": precision, "zero_stage": int(precision == "fp16"), "learning_rate": _RATE}
    return TrainConfig.model_validate(changes | {"batch_size": 1, "micro_batch_size": 1})


def _far(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the root mean square of the expected values."""
    expected = expected.detach()
    return float((found.detach().float().cpu() - expected).abs().max() / expected.square().mean().sqrt())


def _attention(mask: tuple[Tensor, bool], dtype: torch.dtype, device: torch.device) -> float:
    """torch's attention against its definition; rows that see no key have no defined result."""
    seen, added = mask
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, 32, generator=draw) for n in (_QUERIES, _KEYS, _KEYS))
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    expected = (query @ key.mT / math.sqrt(32) + bias).softmax(-1) @ value
    there = [part.to(device, dtype) for part in (query, key, value)]
    given = (bias.to(dtype) if added else seen).to(device)
    found = F.scaled_dot_product_attention(*there, attn_mask=given)
    rows = seen.any(1)
    return _far(found.cpu()[:, :, rows], expected[:, :, rows])


@torch.no_grad()
def _path(name: str, ours: Sample, theirs: Sample) -> float:
    return _far(ours.paths[name][1](ours.model), theirs.paths[name][1](theirs.model))


@torch.no_grad()
def _regret(ours: Sample, theirs: Sample) -> float:
    """By how much the device's tokens miss the largest logit of the CPU: close calls may differ."""
    prompt = theirs.texts["caption"]["ids"][0, :2]
    device = ours.model.device
    with ours.model.decoder(1, _NEW_TOKENS) as begin:
        decoding = begin(ours.pixels.to(device), prompt.expand(len(ours.pixels), -1).to(device))
        tokens = [decoding.logits.argmax(-1)]
        for _ in range(_NEW_TOKENS - 1):
            tokens.append(decoding.step(tokens[-1]).argmax(-1))
    found = torch.stack(tokens, 1).cpu()
    ids = torch.cat([prompt.expand(len(found), -1), found], 1)
    logits = theirs.logits(theirs.model, ids)[:, len(prompt) - 1 : -1]
    missed = logits.amax(-1) - logits.gather(-1, found[..., None])[..., 0]
    return float(missed.max() / logits.std())


def _cross_entropy(device: torch.device) -> float:
    """The gradient of the summed loss, with labels to ignore and label smoothing."""
    draw = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(40, 500, generator=draw)
    labels = torch.randint(500, (40,), generator=draw).index_fill(0, torch.tensor([3, 7]), IGNORE)
    gradients = []
    how = {"ignore_index": IGNORE, "reduction": "sum", "label_smoothing": 0.1}
    for one in (device, torch.device("cpu")):
        given = logits.to(one).requires_grad_()
        F.cross_entropy(given, labels.to(one), **how).backward()
        gradients.append(given.grad)
    return _far(*gradients)


def _loss(model: Any, sample: Sample, device: torch.device) -> Tensor:
    """The mean caption loss and the mean concept loss, together."""
    texts = {name: to_device(text, device) for name, text in sample.texts.items()}
    sums = model(sample.pixels.to(device), texts["caption"], texts["concept"])
    counts = {name: (text["labels"][:, 1:] != IGNORE).sum().item() for name, text in sample.texts.items()}
    return sum(getattr(sums, name) / count for name, count in counts.items())


def _gradients(ours: Sample, theirs: Sample) -> float:
    """The difference of all gradients together: some, such as those of key biases, are noise around zero."""
    found = []
    for sample in (ours, theirs):
        sample.model.freeze(("caption", "concept"))
        _loss(sample.model, sample, sample.model.device).backward()
        trained = [weight for weight in sample.model.parameters() if weight.requires_grad]
        found.append(torch.cat([weight.grad.float().cpu().flatten() for weight in trained]))
        sample.model.zero_grad()
    return float((found[0] - found[1]).norm() / found[1].norm())


def _step(ours: Sample, theirs: Sample, config: TrainConfig, kind: devices.Kind) -> float:
    """The loss after one step of the engine, against a step of plain torch; relative to what that changed."""
    device = ours.model.device
    with _engine(ours.model, config, kind) as trainer:
        trainer.train()
        for _ in range(20):  # in fp16 the first steps only find a loss scale
            trainer.backward(_loss(trainer, ours, device))
            trainer.step()
            if not getattr(trainer.optimizer, "overflow", False):
                break
        ours.model.eval()
        with torch.no_grad():
            found = _loss(ours.model, ours, device)
    groups = parts.groups(theirs.model, config.weight_decay, {})
    plain = torch.optim.AdamW(groups, lr=_RATE, betas=config.betas, foreach=False)
    before = _loss(theirs.model, theirs, theirs.model.device)
    before.backward()
    nn.utils.clip_grad_norm_([weight for group in groups for weight in group["params"]], config.max_grad_norm)
    plain.step()
    with torch.no_grad():
        after = _loss(theirs.model, theirs, theirs.model.device)
    return float((found.cpu() - after).abs() / (before.detach() - after).abs())


class _Weights(nn.Module):
    """A matrix for the optimiser, and gradients of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.matrix = nn.Parameter(0.01 * torch.randn(64, 64, generator=draw))
        scales = 10.0 ** torch.randint(-6, 3, (3, 64, 64), generator=draw)
        self.gradients = scales * torch.randn(3, 64, 64, generator=draw)

    def part_of(self, name: str) -> str:
        return "connector"

    def take(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """What the steps change."""
        before = self.matrix.detach().clone()
        for gradient in self.gradients:
            self.matrix.grad = gradient.to(self.matrix.device)
            optimizer.step()
        return self.matrix.detach() - before


def _adamw(config: TrainConfig, kind: devices.Kind) -> float:
    """The change by three steps of the optimiser that training uses, against AdamW without fused kernels."""
    ours, theirs = _Weights(), _Weights()
    ours.to(devices.torch_device(kind))
    with _engine(ours, _settings("fp32"), kind) as trainer:
        found = ours.take(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    groups = parts.groups(theirs, config.weight_decay, {})
    return _far(found, theirs.take(torch.optim.AdamW(groups, lr=_RATE, betas=config.betas, foreach=False)))


@contextlib.contextmanager
def _engine(model: Any, config: TrainConfig, kind: devices.Kind) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = engine(model, config, kind, Path(folder))
        try:
            yield trainer
        finally:
            release(trainer)
