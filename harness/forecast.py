"""What a training will take, told before it starts and without torch: its steps, and memory per device."""

import math
from collections.abc import Sequence
from typing import Any

from harness import memory
from harness.config import Config, TrainConfig
from harness.data import readers
from harness.memory import GB, Model, Setup
from harness.models import sizes
from harness.schedule import stages

_CPU_BF16 = ("avx512_bf16", "amx_tile")


def images(config: Config) -> dict[str, int]:
    """Images per split that the run decodes, as far as they can be counted without opening one."""
    data = config.data
    if data.root.is_dir():
        listing = readers.read(data.root, data.layout)
        counts = {split: len(examples) for split, examples in listing.splits.items()}
    elif data.phantom:
        counts = {split: getattr(data.phantom, split) for split in readers.SPLITS}
    else:
        return {}
    wanted = {"train", "valid", *config.predict.splits}
    return {split: count for split, count in counts.items() if split in wanted}


def forecast(config: Config) -> dict[str, Any]:
    """Steps and memory of a run; what can't be told is None, with the reason under `unknown`.

    Memory is that of the configured kind of device; where that is left open, of an accelerator in bf16.
    """
    unknown = []
    count = images(config).get("train")
    if count is None:
        unknown.append(f"steps: no such folder: {config.data.root}")
    shape = sizes.of_model(config.model)
    if shape is None:
        unknown.append(f"memory: the sizes of {config.model.checkpoint} are not known without its config")
    kind = "cuda" if config.device == "auto" else config.device
    model = shape and Model(shape, config.train, kind, _half(config.train, kind))
    return {
        "steps": None if count is None else steps(config.train, count),
        "accumulation": accumulation(config.train),
        "memory": model and _memory(model),
        "unknown": unknown,
    }


def steps(config: TrainConfig, count: int) -> list[dict[str, int]]:
    """For each stage its epochs, optimiser steps and micro batches, over all devices, for `count` images."""
    per_epoch = math.ceil(count / config.batch_size)
    return [
        {
            "stage": stage.number,
            "epochs": stage.epochs,
            "optimiser_steps": stage.epochs * per_epoch,
            "micro_batches": stage.epochs * per_epoch * (config.batch_size // config.micro_batch_size),
        }
        for stage in stages(config)
    ]


def accumulation(config: TrainConfig) -> dict[int, int]:
    """Micro batches that each of N devices accumulates for one optimiser step, for every N that divides."""
    parts = config.batch_size // config.micro_batch_size
    return {devices: parts // devices for devices in memory.DEVICES if parts % devices == 0}


def _half(config: TrainConfig, kind: str) -> bool:
    if config.precision == "auto" and kind == "cpu":
        try:
            with open("/proc/cpuinfo") as file:
                return any(flag in line for line in file if line.startswith("flags") for flag in _CPU_BF16)
        except OSError:
            return False
    return config.precision != "fp32"


def _memory(model: Model) -> dict[str, Any]:
    return {
        "computed_in": "half precision" if model.half else "fp32",
        "micro_batch_size": model.config.micro_batch_size,
        "per_device": memory.table(model),
        "smallest": {
            str(size): {"fits": fits(setup, model), "setup": setup and vars(setup)}
            for size, setup in memory.cards(model).items()
        },
    }


def lines(found: dict[str, Any]) -> list[str]:
    """A forecast as lines to read."""
    out = [
        f"stage {row['stage']}: {row['epochs']} epochs, {row['optimiser_steps']} optimiser steps, "
        f"{row['micro_batches']} micro batches over all devices"
        for row in found["steps"] or ()
    ]
    parts = ", ".join(f"{count} on {devices}" for devices, count in found["accumulation"].items())
    out.append(f"micro batches that each device accumulates for a step: {parts}")
    if found["memory"]:
        out += _memory_lines(found["memory"])
    return out + [f"not told: {reason}" for reason in found["unknown"]]


def _memory_lines(found: dict[str, Any]) -> list[str]:
    micro, computed = found["micro_batch_size"], found["computed_in"]
    out = [f"memory per device in GB, micro batch {micro}, {computed}; with / without gradient checkpointing"]
    out.append(f"{'devices':16}" + "".join(f"{devices:>15}" for devices in memory.DEVICES))
    cells = {(row["zero_stage"], row["offload"], row["devices"]): row for row in found["per_device"]}
    for stage, offload in dict.fromkeys(key[:2] for key in cells):
        rows = [cells[stage, offload, devices] for devices in memory.DEVICES]
        totals = [f"{row['total_checkpointed'] / GB:.1f} / {row['total'] / GB:.1f}" for row in rows]
        name = f"ZeRO {stage}{', offload' if offload else ''}"
        out.append(f"{name:16}" + "".join(f"{total:>15}" for total in totals))
    for size, setup in found["smallest"].items():
        out.append(f"{size} GB: {setup['fits']}")
    return out


def fits(setup: Setup | None, model: Model) -> str:
    """A smallest set-up in words, with the options that it takes."""
    if setup is None:
        return f"not on {memory.DEVICES[-1]} devices, whatever the options"
    return _worded(setup.devices, setup.options(model.config))


def _worded(devices: int, options: str) -> str:
    return f"{devices} device{'s' if devices > 1 else ''}, {options or 'as configured'}"


def largest(models: Sequence[Model]) -> Model:
    """The model whose configured training takes the most memory on one device."""
    return max(models, key=lambda model: memory.needed(model, memory.configured(model.config, 1)))
