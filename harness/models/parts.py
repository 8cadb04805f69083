"""The parts of a captioner: what trains, at which learning rate, and what is saved; for every family.

An adapter belongs to the part that it is in. See `base.Captioner.part_of`.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from harness.models.base import PARTS, Captioner

if TYPE_CHECKING:
    from harness.models.settings import ModelConfig
    from harness.training.settings import TrainConfig

_ADAPTER = ".lora_"  # in the names of peft's weights


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to a precision, or none if it is None."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def trained(model: "ModelConfig", train: "TrainConfig") -> frozenset[str]:
    """The parts all of whose weights training may change; those of an adapted part are frozen."""
    wanted = {"vision": train.train_vision, "connector": True, "language": train.train_language}
    adapted = model.lora.parts if model.lora else ()
    return frozenset(part for part in PARTS if wanted[part] and part not in adapted)


def is_adapter(name: str) -> bool:
    """Whether a weight with this name is of an adapter (`adapters.add`)."""
    return _ADAPTER in name


def train_only(model: Captioner) -> None:
    """Freeze all parameters except those of `model.trained_parts` and of adapters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(changes(model, name))


def is_saved(model: Captioner, name: str, tied: Collection[str]) -> bool:
    """Whether training may change a weight of the state dict; not for those that are `tied` to others."""
    return name not in tied and changes(model, name)


def changes(model: Captioner, name: str) -> bool:
    """Whether training may change a weight with this name."""
    return is_adapter(name) or model.part_of(name) in model.trained_parts


@contextlib.contextmanager
def new() -> Iterator[None]:
    """In this block random weights are the same in every call.

    They do not depend on the run's seed, so that runs of several seeds have one initialisation and can be
    averaged (`steps.soup`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def groups(model: Captioner, weight_decay: float, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The parameters that are not frozen, as parameter groups for torch's AdamW.

    Matrices have weight decay; biases and norms have none. `rates` has the factor of the learning rate of
    each part; a group has it as `factor`.
    """
    found: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for factor in dict.fromkeys(rates.get(part, 1.0) for part in PARTS):
        found |= {(factor, True): [], (factor, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[rates.get(model.part_of(name), 1.0), parameter.ndim > 1].append(parameter)
    return [
        {"params": own, "weight_decay": weight_decay if matrix else 0.0, "factor": factor}
        for (factor, matrix), own in found.items()
        if own or len(found) == 2  # empty ones too, as in checkpoints from before there were factors
    ]


class Count(NamedTuple):
    """Numbers of parameters of a part."""

    trained: int
    total: int


def counts(model: Captioner) -> dict[str, Count]:
    """The parameters of each part of a model, as it is frozen now; tied ones count once."""
    found = {part: Count(0, 0) for part in PARTS}
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())  # at ZeRO-3 a rank holds a part
        before = found[model.part_of(name)]
        own = size if parameter.requires_grad else 0
        found[model.part_of(name)] = Count(before.trained + own, before.total + size)
    return {part: count for part, count in found.items() if count.total}


def worded(found: Mapping[str, Count]) -> str:
    """Trained and all parameters of each part, as text."""
    return ", ".join(f"{part} {_short(c.trained)} of {_short(c.total)}" for part, c in found.items())


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
