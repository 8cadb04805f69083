"""The set-up of one training: what auto chooses, kept over interruptions, halved if memory runs out."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.config.sections import AUTO
from harness.store import bytes_of, gb, write_json
from harness.training import memory
from harness.training.memory import Model, Setup
from harness.training.settings import TrainConfig

FILE = "setup.json"
HALVED = "smaller, because more did not fit into the memory"


def pick(
    config: TrainConfig, model: Model | None, kind: str, devices: int, free: float, directory: Path
) -> tuple[Setup, str]:
    """The set-up of a training on `devices` devices with `free` bytes each, and the reason for it.

    `model` is None if its sizes are not known. A training that was interrupted keeps the set-up in
    `directory` as long as it fits, so that its result is equal to the bit.
    """
    before = _kept(config, directory, devices)
    auto = memory.is_auto(config)
    if before and (not model or not auto or memory.needed(model, before[0]) <= free):
        return before
    if not auto:
        return memory.configured(config, devices), "as configured"
    if model is None:
        why = "the smallest, because the sizes of the model are not known; write a larger one if it fits"
        return memory.safest(config, devices, kind), why
    return fastest(model, devices, free)


def fastest(model: Model, devices: int, free: float) -> tuple[Setup, str]:
    """The set-up that auto chooses for `free` bytes on each device, and the reason for it."""
    setup = memory.chosen(model, devices, free)
    need = memory.needed(model, setup)
    which = "the fastest that fits" if need <= free else "the smallest"
    return setup, f"{which}: {gb(need)} needed, {gb(free)} free"


def _kept(config: TrainConfig, directory: Path, devices: int) -> tuple[Setup, str] | None:
    """The set-up before an interruption and its reason, if the config allows it on these devices."""
    found = recorded(directory)
    micro, ways = found.get("micro_batch_size"), (False, True)
    if not isinstance(micro, int) or micro < 1 or found.get("devices") != devices:
        return None
    why, checkpointing = found.get("why"), found.get("gradient_checkpointing")
    if config.batch_size % (micro * devices) or checkpointing not in ways or not isinstance(why, str):
        return None
    allowed = (micro, AUTO) if why != HALVED else (config.micro_batch_size,)
    if config.micro_batch_size not in allowed or config.gradient_checkpointing not in (checkpointing, AUTO):
        return None
    return memory.configured(memory.resolved(config, micro, checkpointing), devices), why


def halved(setup: Setup) -> Setup | None:
    """The set-up with half the micro batch, or its largest divisor below that; None if it is 1."""
    sizes = (n for n in range(setup.micro_batch // 2, 0, -1) if setup.micro_batch % n == 0)
    return next((replace(setup, micro_batch=size) for size in sizes), None)


def record(directory: Path, setup: Setup, why: str) -> None:
    """Write the set-up of a training beside its weights."""
    values = {"micro_batch_size": setup.micro_batch, "gradient_checkpointing": setup.checkpointing}
    write_json(directory / FILE, {"devices": setup.devices, **values, "why": why})


def recorded(directory: Path) -> Mapping[str, Any]:
    """What `record` wrote; empty if the file is missing or damaged."""
    try:
        found = json.loads(bytes_of(directory / FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
