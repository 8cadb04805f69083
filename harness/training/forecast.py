"""A forecast of what a run needs, without torch: steps, pixel cache, memory per device."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import data
from harness.config.sections import AUTO, DataConfig
from harness.data import fraction
from harness.data.images import unbuilt
from harness.data.listing import Example
from harness.errors import UserError
from harness.machine import device
from harness.models import family
from harness.models.measured import Unmeasured
from harness.models.settings import RetrievedPrompt, longest_prompt
from harness.store import RUNS, free, gb
from harness.training import fit, judges, memory, patience, speed
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
    by_neighbours = config.concepts and config.concepts.own and config.concepts.predictor == "knn"
    prompted = isinstance(config.model.prompt, RetrievedPrompt)
    searched = config.retrieval or by_neighbours or prompted
    trained = ("train", "valid") if config.trains else ("train",) if searched else ()
    trained = (*trained, "valid") if config.soup else trained
    wanted = dict.fromkeys([*trained, *config.predicted] if config.has_model else ())
    sides = {split: [side] for split in wanted}
    built_from = family(config.model).built_from(config.model) if config.has_model else None
    if built_from:
        sides.setdefault("train", []).append(built_from)
    if source.root.is_dir():
        splits = _examples(source)
        counts = {split: len(splits[split]) for split in sides if split in splits}
        sized = {(s, n): unbuilt(splits[s], n, RUNS / "cache") for s in counts for n in sides[s]}
    elif source.phantom:
        shares = {split: getattr(source.fraction, split, 1) for split in sides}
        counts = {split: round(getattr(source.phantom, split) * shares[split]) for split in sides}
        sized = {(s, n): counts[s] * n * n * 3 for s in counts for n in sides[s]}
    else:
        counts, sized = {}, {}
    cached = source.cache and not family(config.model).WHOLE_IMAGES
    return counts, {key: size for key, size in sized.items() if size and cached}


@functools.lru_cache(maxsize=1)  # called for each variant of an experiment
def _examples(source: DataConfig) -> Mapping[str, Sequence[Example]]:
    """The existing images of each split, without those that `data.skip_bad` is known to exclude."""
    listing = data.listed(source)
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
    count = sum(counts[split] for split in config.data.fit_on) if "train" in counts else None
    if not counts and config.has_model:
        unknown.append(f"steps and pixel cache: no images in {config.data.root}")
    trains = config.trains
    shape = family(config.model).shape(config.model, config.train) if trains else None
    if trains and shape is None:
        names = " and ".join(family(config.model).checkpoints(config.model).values())
        unknown.append(f"memory: the sizes of {names} are not known without its config")
    kind = "cuda" if config.device == "auto" else config.device
    prompt = longest_prompt(config.model.prompt)
    model = shape and Model(shape, config.train, kind, _half(config.train, kind), prompt, judges.size(config))
    fitting = auto = None
    try:
        fitting = model and _memory(model)
        auto = model and _auto(config, model)
    except Unmeasured as error:
        unknown.append(f"memory: {error}")
    return {
        "steps": (None if count is None else steps(config.train, count)) if trains else [],
        "ends_early": _ends_early(config),
        "notes": list(_notes(config)),
        "captions": _origin(config),
        "accumulation": accumulation(config.train),
        "pixel_cache": _disk(to_build) if counts and config.data.cache else None,
        "memory": fitting,
        "auto": auto,
        "time": time(config, counts, RUNS) if counts else None,
        "unknown": unknown,
    }


def _auto(config: "Config", model: Model) -> str | None:
    """What auto takes on one device of this machine, and why; None without auto or a usable device.

    The free memory of an accelerator is known to torch only, so there torch is imported.
    """
    if not memory.is_auto(config.train):
        return None
    try:
        kind = device.probe(config.device).kind
        free = _free(kind)
    except (UserError, RuntimeError):  # an accelerator that is full gives no context
        return None
    here = replace(model, kind=kind, half=_half(config.train, kind))
    setup, why = fit.fastest(here, 1, free)
    return f"{worded(setup)}, {why}"


@functools.cache  # else the runs of a command would differ by what was free a moment later
def _free(kind: device.Kind) -> float:
    return device.memory(kind)


def _ends_early(config: "Config") -> str:
    """The keys that may end a stage early, as text; empty if none does."""
    if not config.trains:
        return ""
    if config.full_fit:  # has no validations
        return "train.epochs_of" if config.train.epochs_of else ""
    return " or ".join(patience.enders(config.train))


def _notes(config: "Config") -> Iterator[str]:
    if share := fraction.worded(config.data.fraction):
        yield f"a quick look at {share}"
    if config.trains and (start := config.train.start_from):
        yield f"starts from the best weights of {start}"
    if config.full_fit:
        epochs = f", for the epochs that {of} found" if (of := config.train.epochs_of) else ""
        yield f"trains on train and valid{epochs}; there will be no scores"


def time(
    config: "Config", counts: Mapping[str, int], root: Path, setup: Setup | None = None
) -> dict[str, Any] | None:
    """The time of each part and long step of a run on this machine's device; None if it can't be used.

    Without `setup`: on one device, in the fastest set-up that the config allows.
    """
    try:
        found = device.probe(config.device)
    except UserError:
        return None
    parts = _times(config, counts, root, found, setup)
    together = {part: vars(speed.together(steps.values())) for part, steps in parts.items()}
    return {"device": str(found), "parts": together, "steps": _by_step(parts)}


def by_step(config: "Config", counts: Mapping[str, int], root: Path, devices: int) -> dict[str, float | None]:
    """Seconds of the long steps of a run on this machine's devices; None if not known."""
    return _by_step(_times(config, counts, root, device.probe(config.device), devices=devices))


def _by_step(parts: Mapping[str, Mapping[str, speed.Guess]]) -> dict[str, float | None]:
    seconds: dict[str, float | None] = {}
    for steps in parts.values():
        for name, guess in steps.items():
            known = seconds.get(name, 0.0)
            seconds[name] = None if known is None or guess.seconds is None else known + guess.seconds
    return seconds


def _times(
    config: "Config",
    counts: Mapping[str, int],
    root: Path,
    found: device.Device,
    setup: Setup | None = None,
    devices: int = 1,
) -> dict[str, dict[str, speed.Guess]]:
    shape = family(config.model).shape(config.model, config.train) if config.trains else None
    prompt = longest_prompt(config.model.prompt)
    half = _half(config.train, found.kind)
    model = shape and Model(shape, config.train, found.kind, half, prompt, judges.size(config))
    if model and not setup:
        setup = memory.choices(config.train, devices, found.kind)[0]
    return speed.of_run(config, model, setup, counts, str(found), root)


def _origin(config: "Config") -> str:
    """Where captions, or concepts, are from if nothing is trained."""
    if not config.captions:
        return "the concepts are of " + ("similar images" if config.has_model else "other runs")
    if not config.has_model:
        return "the captions are of other runs"
    if config.soup:
        return "the weights are an average of other runs'"
    return "the captions are of similar images" if config.retrieval else "the checkpoint captions as it is"


def _disk(to_build: Caches) -> dict[str, Any]:
    rows = [{"split": split, "side": side, "bytes": size} for (split, side), size in to_build.items()]
    return {"to_build": rows, "free": free(RUNS)}


def steps(config: TrainConfig, count: int) -> list[dict[str, int | None]]:
    """Epochs, optimiser steps and micro batches (over all devices) of each stage, for `count` images.

    Micro batches are None if their size is auto.
    """
    per_epoch, parts = math.ceil(count / config.batch_size), _parts(config)
    return [
        {
            "stage": stage.number,
            "epochs": stage.epochs,
            "optimiser_steps": stage.epochs * per_epoch,
            "micro_batches": parts and stage.epochs * per_epoch * parts,
        }
        for stage in stages(config)
    ]


def accumulation(config: TrainConfig) -> dict[int, int]:
    """By number of devices, the micro batches that each accumulates for one optimiser step; {} for auto."""
    parts = _parts(config)
    return {devices: parts // devices for devices in memory.DEVICES if parts and parts % devices == 0}


def _parts(config: TrainConfig) -> int | None:
    """The micro batches of one optimiser step over all devices; None if their size is auto."""
    return None if config.micro_batch_size == AUTO else config.batch_size // config.micro_batch_size


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
    out = [*found["notes"]]
    out += [
        f"stage {row['stage']}: {row['epochs']} epochs, {row['optimiser_steps']} optimiser steps"
        + (f", {row['micro_batches']} micro batches over all devices" if row["micro_batches"] else "")
        for row in found["steps"] or ()
    ]
    if found["steps"] and found["ends_early"]:
        out.append(f"at most these epochs, since {found['ends_early']} may end a stage early")
    if found["steps"] == []:
        out.append(f"nothing is trained: {found['captions']}")
    elif found["accumulation"]:
        parts = ", ".join(f"{count} on {devices}" for devices, count in found["accumulation"].items())
        out.append(f"micro batches that each device accumulates for a step: {parts}")
    if found["pixel_cache"]:
        out.append(_cache_line(found["pixel_cache"]))
    if found["memory"]:
        out += _memory_lines(found["memory"])
    if found["auto"]:
        out.append(f"on one device here, auto takes {found['auto']}")
    if found["time"] and found["time"]["parts"]:
        out.append(f"time on one {found['time']['device']}: {timed(found['time'])}")
    return out + [f"unknown: {reason}" for reason in found["unknown"]]


def timed(found: dict[str, Any]) -> str:
    """What `time` found, as text."""
    return "; ".join(f"{part} {speed.Guess(**guess)}" for part, guess in found["parts"].items())


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
    ways = "with / without gradient checkpointing"
    if micro == AUTO:
        ways = "smallest with / largest without gradient checkpointing"
    out = [f"memory per device in GB, micro batch {micro}, {computed}; {ways}"]
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
    """A set-up from `memory.smallest` as text: its number of devices, options, and what auto chooses."""
    if setup is None:
        return f"not on {memory.DEVICES[-1]} devices, whatever the options"
    devices = f"{setup.devices} device{'s' if setup.devices > 1 else ''}"
    words = f"{devices}, {setup.options(model.config) or 'as configured'}"
    return (
        f"{words} (auto: {worded(setup)}, {gb(memory.needed(model, setup))})"
        if memory.is_auto(model.config)
        else words
    )


def worded(setup: Setup) -> str:
    """Micro batch and gradient checkpointing of a set-up as text."""
    way = "with" if setup.checkpointing else "without"
    return f"micro batch {setup.micro_batch} {way} gradient checkpointing"


def largest(models: Sequence[Model]) -> Model:
    """The model whose configured training, the fastest if it says auto, needs the most memory on a device."""
    return max(models, key=lambda model: memory.needed(model, memory.choices(model.config, 1, model.kind)[0]))
