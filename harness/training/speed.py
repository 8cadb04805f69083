"""A forecast of time, without torch: hours of a run, and what several devices gain.

The time of a training step is that of its arithmetic and that of its communication. FLOPs are those of the
config (`models.base.Shape`). The FLOP/s that a device reaches come from finished runs on the same kind of
device, or else from measurements on one H200 at the real size.
"""

import contextlib
import functools
import json
import math
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from harness import records
from harness.metrics import METRICS
from harness.models import family
from harness.models.base import FLOAT
from harness.models.measured import Unmeasured
from harness.models.settings import ModelConfig
from harness.training import fit, memory
from harness.training.memory import Model, Setup
from harness.training.resume import LOSSES, rows_of
from harness.training.schedule import Stage, stages
from harness.training.settings import TrainConfig

if TYPE_CHECKING:
    from harness.config.schema import Config

PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "V100": 125e12,
    "T4": 65e12,
    "Ascend910A": 256e12,
}
"""FLOP/s of dense matrix products in half precision, by the makers' data sheets."""
REACHED = 0.8
"""Share of the data sheet that large products reach: 790 of 989 TFLOP/s on an H200."""
SHARE, MEASURED = 0.42, Setup(1, 32, False, 0, False)
"""Share of the rate of its products that training reaches on an H200 at 364 pixels, and in which set-up."""
LARGE = 1e12
"""FLOPs of one image for which these shares were measured (5.3e12); smaller models wait for the host."""
STEP, ROW = 3.9e-3, 46e-6
"""Seconds of a step of decoding on an H200 at the real size, and of each caption in it.

From 4.6 ms for 16 captions and 9.7 ms for 128, with transformers' static cache.
"""
PAIR = {"bertscore": 2.3e-3}
"""Seconds of a metric for a caption on an H200, with an encoder of DeBERTa-xlarge's size in fp32."""
EARLY = 3  # steps that warm up: kernels are compiled and memory is allocated
_RECENT = 20  # finished runs that are read


LINKS = {
    "NVLink 4 (H100, H200)": 450e9,
    "NVLink 3 (A100)": 300e9,
    "PCIe 5.0 x16": 63e9,
    "PCIe 4.0 x16": 31.5e9,
    "HCCS (Ascend 910)": 30e9,
}
"""Bytes per second that one device can send to others of its machine, by the makers' figures."""
NETWORKS = {"100 Gb/s": 12.5e9, "200 Gb/s": 25e9, "400 Gb/s": 50e9}
"""Bytes per second of one network adapter, Ethernet or InfiniBand."""
LINE = 0.8
"""Share of these that collectives are taken to reach. This is an assumption."""


@dataclass(frozen=True)
class Pace:
    """FLOP/s of training on one device in the set-up `MEASURED`, and how they are known."""

    flops: float
    how: str


@dataclass(frozen=True)
class Guess:
    """Seconds of a part of a run and how they are known; None and what is missing to know them."""

    seconds: float | None
    how: str

    def __str__(self) -> str:
        return f"{'not known' if self.seconds is None else duration(self.seconds)} ({self.how})"


def rate(device: str) -> float | None:
    """FLOP/s of matrix products in half precision for the name of a device; None if it is not in `PEAKS`."""
    words = [name for name in PEAKS if all(re.search(rf"\b{word}\b", device) for word in name.split())]
    return REACHED * PEAKS[max(words, key=len)] if words else None


def pace(device: str, model: Model, root: Path) -> Pace | str:
    """What one device, such as `cuda (NVIDIA H200)`, reaches; else what is missing to know it."""
    found = [one for one in map(_reached, _finished(root, device, "train")) if one is not None]
    if found:
        return Pace(statistics.median(found), _runs(len(found)))
    known = rate(device)
    if known is None:
        return "no training has finished on this device, and the rate of its products is not known"
    if max(model.flops(stage) for stage in stages(model.config)) < LARGE:
        return "no training has finished on this device, and the model is smaller than what was measured"
    how = "measured on an H200" if "H200" in device else "from an H200, scaled by the rate of products"
    return Pace(SHARE * known, how)


def of_run(
    config: "Config",
    model: Model | None,
    setup: Setup | None,
    counts: Mapping[str, int],
    device: str,
    root: Path,
) -> dict[str, dict[str, Guess]]:
    """The parts of a run, and the time of their steps on `setup.devices` devices; `counts`: images by split.

    `model` and `setup` are None if nothing is trained or if the sizes of the model are not known.
    """
    found: dict[str, dict[str, Guess]] = {}
    if model and setup:
        images = sum(counts.get(split, 0) for split in config.data.fit_on)
        try:
            found["training"] = {"train": training(model, images, setup, device, root)}
            if model.config.rewards:
                sampled = sampling(config.model, model, images, setup, device, root)
                found["sampling and rewards"] = {"train": sampled}
        except Unmeasured as error:
            found["training"] = {"train": Guess(None, str(error))}
    same = json.loads(config.model_dump_json(include={"model", "predict", "score", "edition"}))
    runs = [record for _, record in _finished(root, device, "predict-valid")]
    splits = [split for split in config.predicted if split in counts and config.captions]
    predicted = {} if config.retrieval else {f"predict-{split}": split for split in splits}
    scored = dict.fromkeys(("score-before", "score-after"), "valid") if "valid" in splits else {}
    parts = {
        "prediction": (predicted, ("model", "predict")),
        "scoring": (scored, ("score", "edition", "predict")),
    }
    for part, (steps, keys) in parts.items():
        alike = [run for run in runs if all(run["config"].get(key) == same[key] for key in keys)]
        each = [seconds for run in alike for seconds in _per_image(run, steps)]
        if not each and steps:
            missing = f"no run with the same {' and '.join(keys)} has finished on this device"
            found[part] = dict.fromkeys(steps, Guess(None, missing))
        elif steps:
            image = statistics.median(each) / (setup.devices if setup else 1)
            how = _runs(len(alike))
            found[part] = {step: Guess(counts[split] * image, how) for step, split in steps.items()}
    return found


def together(guesses: Collection[Guess]) -> Guess:
    """The time of all these, which are known, or not, in the same way."""
    seconds = [guess.seconds for guess in guesses]
    return Guess(None if None in seconds else sum(seconds), next(iter(guesses)).how)


def _per_image(record: Mapping[str, Any], steps: Mapping[str, str]) -> Iterator[float]:
    """Seconds of one device for an image in each of these steps; `steps` have a split.

    Only the run that built a step has its time, but each run that shares it knows how it was made.
    """
    for name, split in steps.items():
        made = record["made"].get(name) or {}
        seconds = record["seconds"].get(name, made.get("seconds"))
        if seconds is not None and (images := record["data"]["splits"].get(split)):
            yield seconds * made.get("ranks", 1) / images


def training(model: Model, images: int, setup: Setup, device: str, root: Path) -> Guess:
    """The time of all training steps, without validation and communication."""
    reached = pace(device, model, root)
    if isinstance(reached, str):
        return Guess(None, reached)
    epoch = math.ceil(images / model.config.batch_size) * model.config.batch_size
    flops = sum(stage.epochs * epoch * model.flops(stage) for stage in stages(model.config))
    return Guess(flops / setup.devices / reached.flops * slowdown(setup, model.kind), reached.how)


def sampling(
    settings: ModelConfig, model: Model, images: int, setup: Setup, device: str, root: Path
) -> Guess:
    """The time of the samples and rewards of self-critical stages; `training` has their updates.

    It is what their steps took beyond the updates in finished runs of this model with the same metrics; else
    on a card, for a model of the real size, from measurements on an H200.
    """
    steps = math.ceil(images / model.config.batch_size)
    work = [(stage.epochs * steps, stage) for stage in stages(model.config) if stage.reward]
    reached = pace(device, model, root)
    named = {name for _, stage in work for name in stage.reward.metrics}
    runs = _finished(root, device, "train") if isinstance(reached, Pace) else ()
    found = [seconds for run in runs for seconds in _beyond_updates(run, settings, reached, named)]
    if found:
        units = sum(count * _decoded(stage, model, setup) for count, stage in work)
        return Guess(units * statistics.median(found), _runs(len(found)))
    flops = max(model.flops(stage) for _, stage in work)
    if rate(device) is None or flops < LARGE:
        return Guess(None, "no self-critical training of this model and reward has finished on this device")
    rows = [(count, stage.reward, _passes(stage, model, setup)) for count, stage in work]
    seconds = 0.0
    for count, reward, passes in rows:
        seconds += count * passes * (STEP + ROW * reward.samples * setup.micro_batch)
        pairs = count * reward.samples * model.config.batch_size
        seconds += pairs * sum(PAIR.get(name, 0.0) for name in reward.metrics)
    unknown = sorted(name for name in named - PAIR.keys() if name in METRICS and METRICS[name].weights)
    without = f"; without {', '.join(unknown)}" if unknown else ""
    return Guess(seconds, f"from an H200{without}")


def _passes(stage: Stage, model: Model, setup: Setup) -> int:
    """Steps of decoding of one device in an optimiser step, if each sample has all its tokens."""
    parts = model.config.batch_size // (setup.micro_batch * setup.devices)
    return parts * stage.reward.max_new_tokens * (1 + (stage.reward.baseline == "greedy"))


def _decoded(stage: Stage, model: Model, setup: Setup) -> int:
    """What the time of samples grows with: steps of decoding, on a CPU times their captions."""
    rows = setup.micro_batch * stage.reward.samples if model.kind == "cpu" else 1
    return _passes(stage, model, setup) * rows


def _beyond_updates(
    run: tuple[Path, Mapping[str, Any]], settings: ModelConfig, reached: Pace, named: Collection[str]
) -> Iterator[float]:
    """Seconds of samples and rewards for each unit of `_decoded` in a run's stages with these metrics.

    None of them if the run is of another model.
    """
    known = _speeds(run)
    if known is None or ModelConfig.model_validate(run[1]["config"]["model"]) != settings:
        return
    model, setup, rows = known
    for stage in stages(model.config):
        own = [row["images_per_second"] for row in rows if row.get("stage") == stage.number][EARLY:]
        if stage.reward and own and named == set(stage.reward.metrics):
            step = model.config.batch_size / statistics.median(own)
            flops = model.flops(stage) * model.config.batch_size / setup.devices
            beyond = step - flops / reached.flops * slowdown(setup, model.kind)
            yield max(beyond, 0.0) / max(_decoded(stage, model, setup), 1)


def slowdown(setup: Setup, kind: str) -> float:
    """The time of an image, compared with that in the set-up `MEASURED`."""
    return memory.relative_time(setup, kind) / memory.relative_time(MEASURED, kind)


def _runs(count: int) -> str:
    return f"from {count} run{'s' if count > 1 else ''} on this device"


def _finished(root: Path, device: str, name: str) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Folder and record of the last finished runs whose step `name` was made on this kind of device.

    Runs that share the step count once.
    """
    files = [(file, file.stat()) for file in records.below(root.resolve()) if file.is_file()]
    seen: set[str] = set()
    for folder, record in _done(tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in files)):
        step, made = record["steps"].get(name), record["made"].get(name) or {}
        if step and step not in seen and made.get("environment", {}).get("device") == device:
            seen.add(step)
            yield folder, record
        if len(seen) == _RECENT:
            return


@functools.lru_cache(maxsize=1)  # a command forecasts many runs, and a project may have a thousand records
def _done(files: tuple[tuple[Path, int, int], ...]) -> list[tuple[Path, Mapping[str, Any]]]:
    """Folder and record of the finished runs among these files, with date and size; the last one first."""
    found, _ = records.read_all([file for file, *_ in files], ("data", "made", "seconds", "steps"))
    done = [one for one in found if one[1]["status"] == "FINISHED"]
    return sorted(done, key=lambda one: one[1].get("ended") or "", reverse=True)


def _reached(run: tuple[Path, Mapping[str, Any]]) -> float | None:
    """FLOP/s of one device in a finished training, as if in the set-up `MEASURED`; None if not known.

    Stages that sample captions take longer, so they do not count.
    """
    known = _speeds(run)
    if known is None:
        return None
    model, then, rows = known
    flops = {stage.number: model.flops(stage) for stage in stages(model.config) if not stage.reward}
    speeds = [
        row["images_per_second"] * flops[row["stage"]] for row in rows[EARLY:] if row.get("stage") in flops
    ]
    if not speeds:
        return None
    return statistics.median(speeds) / then.devices * slowdown(then, model.kind)


def _speeds(run: tuple[Path, Mapping[str, Any]]) -> tuple[Model, Setup, list[dict[str, Any]]] | None:
    """Model and set-up of a finished training, and the rows of its steps; None if they are not known."""
    folder, record = run
    place = records.root(folder, record) / record["steps"]["train"]
    kind = record["made"]["train"]["environment"]["device"].partition(" ")[0]
    if (model := _trained(record["config"], kind)) is None or not (place / LOSSES).is_file():
        return None
    rows = [row for row in rows_of(place / LOSSES) if row.get("images_per_second")]
    train = model.config  # records of older versions have no set-up of their own
    setup = {key: getattr(train, key) for key in ("micro_batch_size", "gradient_checkpointing")}
    setup |= fit.recorded(place)
    how = (setup.get("micro_batch_size"), setup.get("gradient_checkpointing"))
    devices = record["made"]["train"].get("ranks")
    if not all(isinstance(value, int) and value >= 0 for value in (*how, devices)):
        return None
    return model, Setup(max(devices, 1), max(how[0], 1), bool(how[1]), 0, False), rows


def _trained(config: Mapping[str, Any], kind: str) -> Model | None:
    """The model of a record's config; None if it is of another version or its sizes are not known."""
    try:
        settings = ModelConfig.model_validate(config["model"])
        train = TrainConfig.model_validate(config["train"])
    except (KeyError, ValidationError):
        return None
    shape = family(settings).shape(settings, train)
    model = shape and Model(shape, train, kind, False)
    with contextlib.suppress(Unmeasured):
        return model if model and model.flops(stages(train)[0]) else None
    return None


def remaining(speeds: Sequence[float], left: int) -> Guess:
    """The time of `left` images after steps at these speeds in images/s; the first steps don't count."""
    speed = statistics.median(speeds[EARLY:] or speeds)
    return Guess(left / speed, f"{speed:.3g} images/s in the first {len(speeds)} steps")


def duration(seconds: float) -> str:
    """Seconds in words: seconds, minutes, hours or days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.1f} {unit}"
    return f"about {seconds:.0f} s"


# several devices


def passed_on(size: float, devices: int) -> float:
    """Bytes that each device of a ring sends to reduce a tensor of `size` bytes, or to gather it.

    An all-reduce does both, so it sends twice as much.
    """
    return size * (devices - 1) / devices


def sent(model: Model, setup: Setup) -> float:
    """Bytes that each device sends in one optimiser step.

    As DeepSpeed 0.19.8 does it: without ZeRO one all-reduce of the fp32 gradients. ZeRO 1 also gathers the
    new weights. ZeRO 2 does the all-reduce after each micro batch. ZeRO 3 only reduces, after each micro
    batch, and gathers all weights for each forward and each backward pass.
    """
    gradients = passed_on(FLOAT * model.trained, setup.devices)
    parts = model.config.batch_size // (setup.micro_batch * setup.devices)
    if setup.zero_stage < 3:
        return 2 * gradients * (parts if setup.zero_stage == 2 else 1) + gradients * (setup.zero_stage > 0)
    return parts * (2 * passed_on(model.weights, setup.devices) + gradients)


def bandwidth(inside: float, between: float | None = None) -> float:
    """Bytes per second that a ring moves per device.

    `inside`: a device to its neighbour on the same machine; `between`: all adapters of a machine together,
    because each ring between machines uses another adapter.
    """
    return LINE * min(inside, between or math.inf)


def step(model: Model, setup: Setup, reached: float, moved: float) -> tuple[float, float]:
    """Seconds of arithmetic and of communication in one optimiser step of the first stage.

    `reached`: FLOP/s from `pace`; `moved`: bytes per second from `bandwidth`. Communication is not hidden
    behind arithmetic.
    """
    flops = model.flops(stages(model.config)[0]) * model.config.batch_size / setup.devices
    return flops / reached * slowdown(setup, model.kind), sent(model, setup) / moved
