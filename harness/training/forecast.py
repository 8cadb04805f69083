"""A forecast of what a run needs, without torch: steps, pixel cache, memory per device."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness import data
from harness.config.sections import DataConfig
from harness.data import readers
from harness.data.images import unbuilt
from harness.models import family
from harness.store import RUNS, free, gb
from harness.training import memory
from harness.training.memory import GB, Model, Setup
from harness.training.schedule import stages
from harness.training.settings import TrainConfig

if TYPE_CHECKING:
    from harness.config.schema import Config

_CPU_BF16 = ("avx512_bf16", "amx_tile")
Caches = dict[tuple[str, int], int]
"""Bytes by split and side in pixels."""


def pixels(config: "Config") -> tuple[dict[str, int], Caches]:
    """Images per split that the run decodes, and an upper bound of the pixel caches still to build.

    Counts without opening more than a few images. A run whose steps are done needs no cache.
    """
    source, side = config.data, config.model.image_size
    trained = ("train", "valid") if config.trains else ()
    wanted = dict.fromkeys([*trained, *config.predict.splits] if config.has_model else ())
    sides = {split: [side] for split in wanted}
    built_from = family(config.model).built_from(config.model) if config.has_model else None
    if built_from:
        sides.setdefault("train", []).append(built_from)
    if source.root.is_dir():
        splits = _examples(source)
        counts = {split: len(splits[split]) for split in sides if split in splits}
        sized = {(s, n): unbuilt(splits[s], n, RUNS / "cache") for s in counts for n in sides[s]}
    elif source.phantom:
        counts = {split: getattr(source.phantom, split) for split in sides}
        sized = {(s, n): counts[s] * n * n * 3 for s in counts for n in sides[s]}
    else:
        counts, sized = {}, {}
    return counts, {key: size for key, size in sized.items() if size and source.cache}


@functools.lru_cache(maxsize=1)  # called for each variant of an experiment
def _examples(source: DataConfig) -> Mapping[str, Sequence[readers.Example]]:
    """The existing images of each split, without those that `data.skip_bad` is known to exclude."""
    listing = readers.read(source.root, source.layout)
    if source.skip_bad and not listing.fatal and data.unchecked(source, RUNS) <= data.QUICK_IMAGES:
        checked = data.load(source, RUNS)
        return {split: checked.readable(split) for split in checked.splits}
    return {
        split: [e for e in examples if (split, e.id) in listing.files and (split != "train" or e.trains)]
        for split, examples in listing.splits.items()
    }


def forecast(config: "Config") -> dict[str, Any]:
    """Steps, pixel cache and memory of a run; an unknown part is None, with its reason under `unknown`.

    Memory is for the configured kind of device; if that is `auto`, for an accelerator.
    """
    unknown = []
    counts, to_build = pixels(config)
    count = counts.get("train")
    if not counts and config.has_model:
        unknown.append(f"steps and pixel cache: no images in {config.data.root}")
    trains = config.trains
    shape = family(config.model).shape(config.model) if trains else None
    if trains and shape is None:
        unknown.append(f"memory: the sizes of {config.model.checkpoint} are not known without its config")
    kind = "cuda" if config.device == "auto" else config.device
    model = shape and Model(shape, config.train, kind, _half(config.train, kind))
    return {
        "steps": (None if count is None else steps(config.train, count)) if trains else [],
        "has_model": config.has_model,
        "accumulation": accumulation(config.train),
        "pixel_cache": _disk(to_build) if counts and config.data.cache else None,
        "memory": model and _memory(model),
        "unknown": unknown,
    }


def _disk(to_build: Caches) -> dict[str, Any]:
    rows = [{"split": split, "side": side, "bytes": size} for (split, side), size in to_build.items()]
    return {"to_build": rows, "free": free(RUNS)}


def steps(config: TrainConfig, count: int) -> list[dict[str, int]]:
    """Epochs, optimiser steps and micro batches (over all devices) of each stage, for `count` images."""
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
    """By number of devices, the micro batches that each accumulates for one optimiser step."""
    parts = config.batch_size // config.micro_batch_size
    return {devices: parts // devices for devices in memory.DEVICES if parts % devices == 0}


def _half(config: TrainConfig, kind: str) -> bool:
    if config.precision == "auto" and kind == "cpu":
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
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
    """A forecast as lines of text."""
    out = [
        f"stage {row['stage']}: {row['epochs']} epochs, {row['optimiser_steps']} optimiser steps, "
        f"{row['micro_batches']} micro batches over all devices"
        for row in found["steps"] or ()
    ]
    if found["steps"] == []:
        model = "the checkpoint captions as it is" if found["has_model"] else "the captions are of other runs"
        out.append(f"nothing is trained: {model}")
    else:
        parts = ", ".join(f"{count} on {devices}" for devices, count in found["accumulation"].items())
        out.append(f"micro batches that each device accumulates for a step: {parts}")
    if found["pixel_cache"]:
        out.append(_cache_line(found["pixel_cache"]))
    if found["memory"]:
        out += _memory_lines(found["memory"])
    return out + [f"unknown: {reason}" for reason in found["unknown"]]


def _cache_line(found: dict[str, Any]) -> str:
    to_build = {(row["split"], row["side"]): row["bytes"] for row in found["to_build"]}
    if not to_build:
        return "pixel cache: built"
    line = f"pixel cache to build: {listed(to_build)}; {gb(found['free'])} free"
    if (lacking := sum(to_build.values()) - found["free"]) <= 0:
        return line
    return f"{line}, {gb(lacking)} missing: free some, or decode in every epoch: --set data.cache=false"


def listed(caches: Caches) -> str:
    """The sizes of pixel caches as text."""
    return "; ".join(
        ", ".join(f"{split} {gb(size)}" for (split, n), size in caches.items() if n == side)
        + f" at {side} pixels"
        for side in dict.fromkeys(side for _, side in caches)
    )


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
    """A set-up from `memory.smallest` as text: its number of devices and options."""
    if setup is None:
        return f"not on {memory.DEVICES[-1]} devices, whatever the options"
    return _worded(setup.devices, setup.options(model.config))


def _worded(devices: int, options: str) -> str:
    return f"{devices} device{'s' if devices > 1 else ''}, {options or 'as configured'}"


def largest(models: Sequence[Model]) -> Model:
    """The model whose configured training needs the most memory on one device."""
    return max(models, key=lambda model: memory.needed(model, memory.configured(model.config, 1)))
